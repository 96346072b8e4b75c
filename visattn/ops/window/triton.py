"""Window attention by the fused Triton kernels; see `visattn.ops.fused`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from visattn.ops.window import WindowProblem


def attend(problem: WindowProblem) -> Tensor:
    """See `visattn.ops.window_attention`."""
    from visattn.ops.fused.attention import flat, fused_attention

    q, k, v = flat(problem.q), flat(problem.k), flat(problem.v)
    out, _ = fused_attention(q, k, v, problem.axes, problem.scale, bias=problem.bias)
    return out.view(problem.v.shape)  # [B, *spatial, N, Dv]
