"""Agent attention as two fused attentions, or as products: where a bias trains, and where queries have few agents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# From this number of keys on, SDPA on a CPU keeps its vectors busy: fewer keys, of each query, are taken one by one.
_MANY = 16


def _logits(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """q k^T + bias, in float32 at least; of [B, N, tokens, D], the bias without a batch axis."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = (q @ k.contiguous().mT).to(dtype)  # matmul would copy k^T in the order of k^T, slowly
    return logits if bias is None else logits.add_(bias)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    # A mask that requires a gradient takes SDPA off its fast path on a CPU, even where none is computed.
    mask = None if bias is None else bias.detach().to(q.dtype)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def agent_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """See `visattn.ops.agent_attention`; q [B, L, N, D], k and v [B, M, N, D]."""
    q, k, v, agents = (x.transpose(1, 2) for x in (q, k, v, agents))
    scaled = agents * scale  # for both products: queries are many
    trains = [torch.is_grad_enabled() and bias is not None and bias.requires_grad for bias in (agent_bias, query_bias)]
    if trains[0]:
        gathered = _logits(scaled, k, agent_bias).softmax(dim=-1).to(v.dtype) @ v
    else:
        gathered = _attend(agents, k, v, agent_bias, scale)
    if agents.shape[2] < _MANY:
        # [B, N, A, L]: the softmax goes along the short axis, many queries at a time.
        weights = _logits(scaled, q, None if query_bias is None else query_bias.mT).softmax(dim=-2).mT
        out = weights.to(v.dtype) @ gathered
    elif trains[1]:
        out = _logits(q, scaled, query_bias).softmax(dim=-1).to(v.dtype) @ gathered
    else:
        out = _attend(q, agents, gathered, query_bias, scale)
    return out.transpose(1, 2)
