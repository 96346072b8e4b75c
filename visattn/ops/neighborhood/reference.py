"""Neighborhood attention by its definition: gather the keys of every query, softmax, weighted sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visattn.ops.geometry import neighbors, outer_index

if TYPE_CHECKING:
    from visattn.ops.neighborhood import NeighborhoodProblem


def attend(problem: NeighborhoodProblem) -> Tensor | tuple[Tensor, Tensor]:
    """See `visattn.ops.neighborhood_attention`; `S` below is the number of tokens, `M` the keys of one query."""
    q, bias, axes = problem.q, problem.bias, problem.axes
    k, v = problem.visible_kv
    extra_k, extra_v, extra_bias = problem.extra_k, problem.extra_v, problem.extra_bias
    found = [neighbors(axis, q.device) for axis in axes]
    index = outer_index([n.index for n in found], [a.length for a in axes])  # [S, M]
    hidden = outer_index([(~n.visible).long() for n in found], [2] * len(axes)) > 0
    if problem.key_mask is not None:
        hidden = hidden | ~problem.key_mask.flatten(1)[:, index]  # [B, S, M]

    dtype = problem.dtype
    query = q.flatten(1, -3).to(dtype) * problem.scale  # [B, S, N, D]
    keys = k.flatten(1, -3).to(dtype)[:, index]  # [B, S, M, N, D]
    values = v.flatten(1, -3).to(dtype)[:, index]
    scores = torch.einsum("bsnd,bsmnd->bsnm", query, keys)
    if bias is not None:
        widths = [2 * a.kernel_size - 1 for a in axes]
        entry = outer_index([n.displacement for n in found], widths)  # [S, M]
        scores = scores + bias.to(dtype).flatten(1)[:, entry].transpose(0, 1)  # [S, N, M]
    scores = scores.masked_fill(hidden[..., None, :], float("-inf"))
    if extra_k is not None and extra_v is not None:
        extra = torch.einsum("bsnd,bend->bsne", query, extra_k.to(dtype))
        if extra_bias is not None:
            extra = extra + extra_bias.to(dtype).expand(*q.shape[:-1], -1).flatten(1, -3)
        scores = torch.cat([scores, extra], dim=-1)
    blind = (scores == float("-inf")).all(-1, keepdim=True)  # [B, S, N, 1], queries without any key
    scores = scores.masked_fill(blind, 0)  # whose softmax has a gradient
    weights = scores.softmax(dim=-1).masked_fill(blind, 0)
    weights, rest = weights[..., : index.shape[1]], weights[..., index.shape[1] :]
    out = torch.einsum("bsnm,bsmnd->bsnd", weights, values)
    if extra_v is not None:
        out = out + torch.einsum("bsne,bend->bsnd", rest, extra_v.to(dtype))
    out = out.to(v.dtype).reshape(*q.shape[:-1], v.shape[-1])
    lse = scores.logsumexp(dim=-1).masked_fill(blind.squeeze(-1), float("-inf"))
    return (out, lse.reshape(q.shape[:-1])) if problem.return_lse else out
