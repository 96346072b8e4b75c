"""Gated positional attention with that to content by the fused Triton kernels; see `visattn.ops.fused`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from visattn.ops.gated_positional.eager import add_positional
from visattn.ops.geometry import Whole

if TYPE_CHECKING:
    from visattn.ops.gated_positional import GatedPositionalProblem


def automatic(problem: GatedPositionalProblem) -> str:
    """Say why "auto" does not take the kernels."""
    return "PyTorch's own fused attention does the same: the rest are two small products"


def attend(problem: GatedPositionalProblem) -> Tensor:
    """See `visattn.ops.gated_positional_attention`; S tokens."""
    from visattn.ops.fused.attention import flat, fused_attention

    q, k, v = flat(problem.q), flat(problem.k), flat(problem.v)  # [B, S, N, D]
    content, _ = fused_attention(q, k, v, [Whole(q.shape[1], q.shape[1])], problem.scale)
    return add_positional(problem, content)
