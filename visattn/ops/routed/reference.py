"""Routed attention by its definition: list the keys of every query, softmax, weighted sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.routed.routing import region_of, token_table

if TYPE_CHECKING:
    from visattn.ops.routed import RoutedProblem


def attend(problem: RoutedProblem) -> Tensor | tuple[Tensor, Tensor]:
    """See `visattn.ops.routed_attention`; `t` are tokens, `m` the keys of a query."""
    q, v, weight, k_axes = problem.q, problem.v, problem.weight, problem.k_axes
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, h, w, heads, _ = q.shape
    query = q.to(dtype).flatten(1, 2)  # [B, t, N, D]
    # One more token, zero, stands for the places outside the map.
    key, value = (F.pad(x.to(dtype).flatten(1, 2), (0, 0, 0, 0, 0, 1)) for x in (problem.k, v))
    region = region_of(problem.q_axes, q.device)  # [t]
    tokens = token_table(k_axes, q.device)
    index = problem.index.expand(-1, heads, -1, -1)[:, :, region]  # [B, N, t, topk]
    listed = tokens[index].flatten(3)  # [B, N, t, m]
    image = torch.arange(batch, device=q.device)[:, None, None, None]
    head = torch.arange(heads, device=q.device)[:, None, None]
    keys, values = key[image, listed, head], value[image, listed, head]  # [B, N, t, m, D]
    if weight is not None:
        factor = weight.to(dtype).expand(-1, heads, -1, -1)[:, :, region]  # [B, N, t, topk]
        factor = factor.repeat_interleave(tokens.shape[1], dim=3)[..., None]  # [B, N, t, m, 1]
        keys, values = keys * factor, values * factor
    scores = problem.scale * torch.einsum("btnd,bntmd->bntm", query, keys)
    if problem.mask_border:
        scores = scores.masked_fill(listed == key.shape[1] - 1, float("-inf"))
    out = torch.einsum("bntm,bntmd->btnd", scores.softmax(-1), values)
    out = out.unflatten(1, (h, w)).to(v.dtype)  # [B, H, W, N, Dv]
    lse = scores.logsumexp(-1).transpose(1, 2).unflatten(1, (h, w))  # [B, H, W, N]
    return (out, lse) if problem.return_lse else out
