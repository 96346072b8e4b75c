"""Agent attention by its definition."""

from __future__ import annotations

import torch
from torch import Tensor


def agent_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """See `visattn.ops.agent_attention`; q [B, L, N, D], k and v [B, M, N, D]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    query, key, value, agent = (x.to(dtype) for x in (q, k, v, agents))
    logits = scale * torch.einsum("band,bmnd->bnam", agent, key)
    if agent_bias is not None:
        logits = logits + agent_bias.to(dtype)
    gathered = torch.einsum("bnam,bmnd->bnad", logits.softmax(dim=-1), value)
    logits = scale * torch.einsum("blnd,band->bnla", query, agent)
    if query_bias is not None:
        logits = logits + query_bias.to(dtype)
    return torch.einsum("bnla,bnad->blnd", logits.softmax(dim=-1), gathered).to(v.dtype)
