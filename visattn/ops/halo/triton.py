"""Halo attention by the fused Triton kernels; see `visattn.ops.fused`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.geometry import Halo

if TYPE_CHECKING:
    from visattn.ops.halo import HaloProblem


def _rel_pos(q: Tensor, axes: Sequence[Halo], tables: Sequence[Tensor | None]) -> Tensor:
    """Lay out [B, H', W', N, R]: what each query adds to the keys of a window's row and of a window's column.

    Turned round within the window so that entry i belongs to all key positions that are i modulo the window, wherever
    the query's block is: the kernels need not know it.
    """
    half, rel_pos = max(8, *(1 << (axis.window - 1).bit_length() for axis in axes)), []
    for a, (axis, table) in enumerate(zip(axes, tables, strict=True)):
        if table is None:
            rel_pos.append(q.new_zeros(()).expand(*q.shape[:-1], half))
            continue
        query = torch.arange(axis.queries, device=q.device)[:, None]
        block, rank = query // axis.queries_per_block, query % axis.queries_per_block
        slot = (torch.arange(axis.window, device=q.device) - block * axis.block) % axis.window
        entry = slot - rank + axis.window - 1  # [queries, window]
        entry = entry[:, None, None] if a == 0 else entry[:, None]
        products = q @ table.to(q.dtype).mT  # [B, H', W', N, 2 * window - 1]
        found = products.gather(-1, entry.expand(*q.shape[:-1], -1))  # [B, H', W', N, window]
        rel_pos.append(F.pad(found, (0, half - axis.window)))
    return torch.cat(rel_pos, dim=-1)


def attend(problem: HaloProblem) -> Tensor:
    """See `visattn.ops.halo_attention`."""
    from visattn.ops.fused.attention import flat, fused_attention

    problem = problem.clipped()
    q, v, axes, rel_pos = problem.q, problem.v, problem.axes, None
    if problem.rel_h is not None or problem.rel_w is not None:
        rel_pos = flat(_rel_pos(q, axes, problem.tables))  # [B, S, N, R]
    how = {"rel_pos": rel_pos, "zero_keys": not problem.mask_border}
    out, _ = fused_attention(flat(q), flat(problem.k), flat(v), axes, problem.scale, **how)
    return out.view(*q.shape[:-1], v.shape[-1])  # [B, H', W', N, Dv]
