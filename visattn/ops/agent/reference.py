"""Agent attention by its definition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from visattn.ops.agent import AgentProblem


def attend(problem: AgentProblem) -> Tensor:
    """See `visattn.ops.agent_attention`; A agents, L queries, M keys."""
    q, v, scale = problem.q, problem.v, problem.scale
    dtype = problem.dtype
    query, key, value = (x.flatten(1, -3).to(dtype) for x in (q, problem.k, v))  # [B, L or M, N, D]
    agent = problem.agents.to(dtype)
    logits = scale * torch.einsum("band,bmnd->bnam", agent, key)
    if problem.agent_bias is not None:
        logits = logits + problem.agent_bias.to(dtype)
    gathered = torch.einsum("bnam,bmnd->bnad", logits.softmax(dim=-1), value)
    logits = scale * torch.einsum("blnd,band->bnla", query, agent)
    if problem.query_bias is not None:
        logits = logits + problem.query_bias.to(dtype)
    out = torch.einsum("bnla,bnad->blnd", logits.softmax(dim=-1), gathered)
    return out.to(v.dtype).reshape(*q.shape[:-1], v.shape[-1])  # [B, *spatial, N, Dv]
