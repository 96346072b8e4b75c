"""Halo attention by its definition: gather the window of every query, softmax, weighted sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from visattn.ops.halo import HaloProblem


def attend(problem: HaloProblem) -> Tensor:
    """See `visattn.ops.halo_attention`; `y, x` are a query's row and column, `i, j` those of a slot of its window."""
    q, v, axes, rel_h, rel_w = problem.q, problem.v, problem.axes, problem.rel_h, problem.rel_w
    dtype = torch.promote_types(q.dtype, torch.float32)
    query = q.to(dtype)
    key, value = problem.k.to(dtype), v.to(dtype)
    inside, displacement = [], []
    for a, axis in enumerate(axes, start=1):
        rank = torch.arange(axis.queries, device=q.device)
        index = axis.key_index(q.device)[rank // axis.queries_per_block]  # [queries, window]
        inside.append((index >= 0) & (index < axis.length))
        displacement.append(axis.displacement(q.device)[rank % axis.queries_per_block])
        index = index.clamp(0, axis.length - 1).flatten()
        place, sizes = 2 * a - 1, (axis.queries, axis.window)
        key = key.index_select(place, index).unflatten(
            place, sizes
        )  # [B, y, i, x, j, N, D] in the end
        value = value.index_select(place, index).unflatten(
            place, sizes
        )  # [B, y, i, x, j, N, Dv] in the end
    there = (inside[0][:, :, None, None] & inside[1])[..., None, None]  # [y, i, x, j, 1, 1]
    key, value = key * there, value * there
    scores = problem.scale * torch.einsum("byxnd,byixjnd->byxnij", query, key)
    if rel_h is not None:
        scores = (
            scores
            + torch.einsum("byxnd,yid->byxni", query, rel_h.to(dtype)[displacement[0]])[..., None]
        )
    if rel_w is not None:
        scores = (
            scores
            + torch.einsum("byxnd,xjd->byxnj", query, rel_w.to(dtype)[displacement[1]])[
                ..., None, :
            ]
        )
    if problem.mask_border:
        scores = scores.masked_fill(
            ~there[..., 0, 0].permute(0, 2, 1, 3)[:, :, None], float("-inf")
        )
    weights = scores.flatten(-2).softmax(dim=-1).view_as(scores)
    return torch.einsum("byxnij,byixjnd->byxnd", weights, value).to(v.dtype)
