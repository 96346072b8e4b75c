"""Window attention by the fused Triton kernels; see `visattn.ops.fused`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visattn.ops.fused import support
from visattn.ops.geometry import Partition


def refusal(
    q: Tensor, k: Tensor, v: Tensor, axes: tuple[Partition, ...], bias: Tensor | None, *args: Any
) -> str | None:
    """Why the kernels cannot run this call."""
    return support.attention_refusal(q, v, k, bias)


def window_triton(
    q: Tensor, k: Tensor, v: Tensor, axes: tuple[Partition, ...], bias: Tensor | None, scale: float
) -> Tensor:
    """See `visattn.ops.window_attention`."""
    from visattn.ops.fused.attention import flat, fused_attention

    out, _ = fused_attention(flat(q), flat(k), flat(v), axes, scale, bias=bias)
    return out.view(v.shape)
