"""Routed attention by the fused Triton kernels; see `visattn.ops.fused`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from visattn.ops.routed import RoutedProblem


def attend(problem: RoutedProblem) -> Tensor:
    """See `visattn.ops.routed_attention`."""
    from visattn.ops.fused.attention import flat, fused_attention

    q, k, v = problem.q, problem.k, problem.v
    out, _ = fused_attention(
        flat(q),
        flat(k),
        flat(v),
        (*problem.q_axes, *problem.k_axes),
        problem.scale,
        kv_indices=problem.index,
        weight=problem.weight,
        zero_keys=not problem.mask_border,
    )
    return out.view(*q.shape[:-1], v.shape[-1])  # [B, H, W, N, Dv]
