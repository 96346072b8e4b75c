"""Neighborhood attention by the fused Triton kernels; see `visattn.ops.fused`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visattn.ops.fused import support
from visattn.ops.geometry import Axis


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: tuple[Axis, ...],
    bias: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    extra_bias: Tensor | None,
    *args: Any,
) -> str | None:
    """Why the kernels cannot run this call."""
    return support.attention_refusal(q, v, k, bias, extra_k, extra_v, extra_bias)


def neighborhood_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: tuple[Axis, ...],
    bias: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    extra_bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, ...]:
    """See `visattn.ops.neighborhood_attention`."""
    from visattn.ops.fused.attention import flat, fused_attention

    if extra_bias is not None:
        # One axis of tokens instead of the spatial ones: all of them, or 1 if the bias is the same for all tokens.
        wide = extra_bias.expand(*(1,) * (q.ndim - extra_bias.ndim), *extra_bias.shape)
        spatial = (1,) * len(axes) if wide.shape[1:-2].numel() == 1 else q.shape[1:-2]
        extra_bias = flat(wide.expand(-1, *spatial, -1, -1))
    out, lse = fused_attention(
        flat(q), flat(k), flat(v), axes, scale, bias=bias, extra_k=extra_k, extra_v=extra_v, extra_bias=extra_bias
    )
    out = out.view(*q.shape[:-1], v.shape[-1])
    return (out, lse.view(q.shape[:-1])) if return_lse else (out,)
