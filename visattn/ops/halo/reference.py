"""Halo attention by its definition: gather the window of every query, softmax, weighted sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from visattn.ops.halo import HaloProblem


def attend(problem: HaloProblem) -> Tensor | tuple[Tensor, Tensor]:
    """See `visattn.ops.halo_attention`; `y, x` are a query's row and column, `i, j` those of a slot of its window."""
    axes, dtype, device = problem.axes, problem.dtype, problem.q.device
    query, key, value = (x.to(dtype) for x in (problem.q, problem.k, problem.v))
    inside, displacement = [], []
    for a, axis in enumerate(axes, start=1):
        rank = torch.arange(axis.queries, device=device)
        index = axis.key_index(device)[rank // axis.queries_per_block]  # [queries, window]
        inside.append((index >= 0) & (index < axis.length))
        displacement.append(axis.displacement(device)[rank % axis.queries_per_block])
        index = index.clamp(0, axis.length - 1).flatten()
        place, sizes = 2 * a - 1, (axis.queries, axis.window)
        key, value = (
            x.index_select(place, index).unflatten(place, sizes)  # in the end [B, y, i, x, j, N, D]
            for x in (key, value)
        )
    there = (inside[0][:, :, None, None] & inside[1])[..., None, None]  # [y, i, x, j, 1, 1]
    key, value = key * there, value * there
    scores = problem.scale * torch.einsum("byxnd,byixjnd->byxnij", query, key)
    if problem.rel_h is not None:
        table = problem.rel_h.to(dtype)[displacement[0]]  # [y, i, D]
        scores = scores + torch.einsum("byxnd,yid->byxni", query, table)[..., None]
    if problem.rel_w is not None:
        table = problem.rel_w.to(dtype)[displacement[1]]  # [x, j, D]
        scores = scores + torch.einsum("byxnd,xjd->byxnj", query, table)[..., None, :]
    if problem.mask_border:
        outside = ~there[..., 0, 0].permute(0, 2, 1, 3)  # [y, x, i, j]
        scores = scores.masked_fill(outside[:, :, None], float("-inf"))
    weights = scores.flatten(-2).softmax(dim=-1).view_as(scores)
    out = torch.einsum("byxnij,byixjnd->byxnd", weights, value).to(problem.v.dtype)
    return (out, scores.flatten(-2).logsumexp(dim=-1)) if problem.return_lse else out
