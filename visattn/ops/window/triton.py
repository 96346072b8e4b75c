"""Window attention by the fused Triton kernels; see `visattn.ops.fused`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from visattn.ops.window import WindowProblem


def attend(problem: WindowProblem) -> Tensor | tuple[Tensor, Tensor]:
    """See `visattn.ops.window_attention`."""
    from visattn.ops.fused.attention import flat, fused_attention

    q, k, v = flat(problem.q), flat(problem.k), flat(problem.v)
    out, lse = fused_attention(q, k, v, problem.axes, problem.scale, bias=problem.bias)
    out = out.view(problem.v.shape)  # [B, *spatial, N, Dv]
    return (out, lse.view(problem.q.shape[:-1])) if problem.return_lse else out
