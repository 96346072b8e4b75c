"""Window attention by its definition: attention over the whole map, restricted to pairs of the same window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from visattn.ops.window import WindowProblem


def attend(problem: WindowProblem) -> Tensor | tuple[Tensor, Tensor]:
    """See `visattn.ops.window_attention`; `S` below is the number of tokens."""
    q, v, bias, axes = problem.q, problem.v, problem.bias, problem.axes
    sizes = [axis.length for axis in axes]
    together = torch.ones((), dtype=torch.bool, device=q.device)
    entry = []  # per axis, where a pair's displacement lies in the table
    for a, axis in enumerate(axes):
        window, rank = axis.place(q.device)
        outer = [1] * (2 * len(axes))
        outer[a] = outer[a + len(axes)] = axis.length
        together = together & (window[:, None] == window).reshape(outer)
        displacement = rank - rank[:, None] + axis.window - 1  # [length, length]
        entry.append(displacement.clamp(0, 2 * axis.window - 2).reshape(outer))
    together = together.expand(*sizes, *sizes)
    tokens = q.shape[1:-2].numel()

    dtype = problem.dtype
    query, key, value = (x.flatten(1, -3).to(dtype) for x in (q, problem.k, v))  # [B, S, N, D]
    scores = torch.einsum("bqnd,bknd->bnqk", query * problem.scale, key)
    if bias is not None:
        table = bias.to(dtype)[(slice(None), *(e.expand(*sizes, *sizes) for e in entry))]
        scores = scores + table.reshape(len(bias), tokens, tokens)
    scores = scores.masked_fill(~together.reshape(tokens, tokens), float("-inf"))
    out = torch.einsum("bnqk,bknd->bqnd", scores.softmax(dim=-1), value)
    out = out.to(v.dtype).reshape(*q.shape[:-1], v.shape[-1])
    lse = scores.logsumexp(dim=-1).transpose(1, 2)  # [B, S, N]
    return (out, lse.reshape(q.shape[:-1])) if problem.return_lse else out
