"""Routed attention by the fused Triton kernels; see `visattn.ops.fused`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from visattn.ops.routed import RoutedProblem


def attend(problem: RoutedProblem) -> Tensor | tuple[Tensor, Tensor]:
    """See `visattn.ops.routed_attention`."""
    from visattn.ops.fused.attention import flat, fused_attention

    q, k, v = flat(problem.q), flat(problem.k), flat(problem.v)
    axes, zero_keys = (*problem.q_axes, *problem.k_axes), not problem.mask_border
    how = {"kv_indices": problem.index, "weight": problem.weight, "zero_keys": zero_keys}
    out, lse = fused_attention(q, k, v, axes, problem.scale, **how)
    out = out.view(*problem.q.shape[:-1], problem.v.shape[-1])  # [B, H, W, N, Dv]
    return (out, lse.view(problem.q.shape[:-1])) if problem.return_lse else out
