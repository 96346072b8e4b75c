"""Routed attention by the fused Triton kernels; see `visattn.ops.fused`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visattn.ops import _legacy as support
from visattn.ops.routed.routing import Axes


def refusal(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, q_axes: Axes, k_axes: Axes, weight: Tensor | None, *args: Any
) -> str | None:
    """Why the kernels cannot run this call."""
    return support.attention_refusal(q, v, k, index, weight)


def routed_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    q_axes: Axes,
    k_axes: Axes,
    weight: Tensor | None,
    mask_border: bool,
    scale: float,
) -> Tensor:
    """See `visattn.ops.routed_attention`."""
    from visattn.ops.fused.attention import flat, fused_attention

    zero_keys = not mask_border
    axes = (*q_axes, *k_axes)
    out, _ = fused_attention(
        flat(q), flat(k), flat(v), axes, scale, kv_indices=index.long(), weight=weight, zero_keys=zero_keys
    )
    return out.view(*q.shape[:-1], v.shape[-1])
