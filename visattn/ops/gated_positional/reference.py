"""Gated positional attention by its definition: the mixed weights of all pairs in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from visattn.ops.gated_positional import GatedPositionalProblem


def weights(problem: GatedPositionalProblem) -> tuple[Tensor, Tensor]:
    """Make the softmaxes over keys by content [B, S, N, S] and by position [S, N, S], query first."""
    q, dtype = problem.q, problem.dtype
    rows, columns = (torch.arange(n, dtype=dtype, device=q.device) for n in problem.size)
    y, x = (t.flatten() for t in torch.meshgrid(rows, columns, indexing="ij"))  # [S]
    dy, dx = y - y[:, None], x - x[:, None]  # [S, S]
    steps = torch.stack([dx, dy, dx**2 + dy**2], dim=-1)  # [S, S, 3]
    logits = torch.einsum("qkc,nc->qnk", steps, problem.pos_weight.to(dtype))
    if problem.pos_bias is not None:
        logits = logits + problem.pos_bias.to(dtype)[:, None]
    query, key = (t.flatten(1, 2).to(dtype) for t in (q, problem.k))  # [B, S, N, D]
    scores = problem.scale * torch.einsum("bqnd,bknd->bqnk", query, key)
    return scores.softmax(dim=-1), logits.softmax(dim=-1)


def attend(problem: GatedPositionalProblem) -> Tensor:
    """See `visattn.ops.gated_positional_attention`; S tokens."""
    content, positional = weights(problem)
    gate = problem.gate.to(problem.dtype).sigmoid()[:, None]  # [N, 1]
    attention = (1 - gate) * content + gate * positional  # [B, S, N, S]
    attention = attention / attention.sum(dim=-1, keepdim=True)
    value = problem.v.flatten(1, 2).to(problem.dtype)  # [B, S, N, Dv]
    out = torch.einsum("bqnk,bknd->bqnd", attention, value)
    return out.to(problem.v.dtype).unflatten(1, problem.size)  # [B, H, W, N, Dv]
