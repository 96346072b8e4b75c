"""Halo attention by the fused Triton kernels; see `visattn.ops.fused`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from visattn.ops.halo import HaloProblem


def _rel_pos(problem: HaloProblem) -> Tensor | None:
    """[B, H', W', N, 2 * w_h - 1 + 2 * w_w - 1] q times both tables, zeros where there is none."""
    if problem.rel_h is None and problem.rel_w is None:
        return None
    q, pairs = problem.q, zip(problem.axes, problem.tables, strict=True)
    tables = [
        q.new_zeros(2 * axis.window - 1, q.shape[-1]) if table is None else table.to(q.dtype)
        for axis, table in pairs
    ]
    return q @ torch.cat(tables).mT


def attend(problem: HaloProblem) -> Tensor | tuple[Tensor, Tensor]:
    """See `visattn.ops.halo_attention`."""
    from visattn.ops.fused.attention import flat, fused_attention

    problem = problem.clipped()
    q, v, rel_pos = problem.q, problem.v, _rel_pos(problem)
    how = {
        "rel_pos": None if rel_pos is None else flat(rel_pos),
        "zero_keys": not problem.mask_border,
    }
    out, lse = fused_attention(
        flat(q), flat(problem.k), flat(v), problem.axes, problem.scale, **how
    )
    out = out.view(*q.shape[:-1], v.shape[-1])  # [B, H', W', N, Dv]
    return (out, lse.view(q.shape[:-1])) if problem.return_lse else out
