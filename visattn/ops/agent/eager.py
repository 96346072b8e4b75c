"""Agent attention as two fused attentions, or as products: where a bias trains, and where queries have few agents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops import chunking
from visattn.ops.cut import contiguous_copy
from visattn.ops.geometry import is_symbolic

if TYPE_CHECKING:
    from visattn.ops.agent import AgentProblem


def _logits(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Add bias [N, t, U] to q k^T for q [B, N, t, D] and k [B, N, U, D]: [B, N, t, U], in float32 at least."""
    # Matmul would copy k^T in the order of k^T, slowly.
    k = contiguous_copy(k) if is_symbolic(k.shape[2]) else k.contiguous()
    logits = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    if bias is None:
        return logits
    # With symbolic sizes nothing may be written to.
    return logits + bias if is_symbolic(*logits.shape[2:]) else logits.add_(bias)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attend from [B, N, t, D] to [B, N, U, D]: [B, N, t, Dv]."""
    # A mask that requires a gradient takes SDPA off its fast path on a CPU, even where none is computed.
    mask = None if bias is None else bias.detach().to(q.dtype)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def attend(problem: AgentProblem) -> Tensor:
    """See `visattn.ops.agent_attention`; A agents, L queries, M keys."""
    agent_bias, query_bias, scale = problem.agent_bias, problem.query_bias, problem.scale
    # With symbolic sizes SDPA ties the graph to more than one image.
    symbolic = is_symbolic(*problem.size, *problem.k.shape[1:-2])
    maps = (problem.q, problem.k, problem.v)
    if symbolic:  # whether flattening copies is then not asked
        maps = (contiguous_copy(x) for x in maps)
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in maps)  # [B, N, L or M, D]
    agents = problem.agents.transpose(1, 2)  # [B, N, A, D]
    scaled = agents * scale  # for both products: queries are many
    biases, has_grad = (agent_bias, query_bias), torch.is_grad_enabled()
    trains = [has_grad and bias is not None and bias.requires_grad for bias in biases]
    if trains[0] or symbolic:
        gathered = _logits(scaled, k, agent_bias).softmax(dim=-1).to(v.dtype) @ v  # [B, N, A, Dv]
    else:
        gathered = _attend(agents, k, v, agent_bias, scale)
    if not is_symbolic(agents.shape[2]) and agents.shape[2] < chunking.FEW_KEYS:
        # [B, N, A, L]: the softmax goes along the short axis, many queries at a time.
        bias = None if query_bias is None else query_bias.mT  # [N, A, L]
        weights = _logits(scaled, q, bias).softmax(dim=-2).mT  # [B, N, L, A]
        out = weights.to(v.dtype) @ gathered
    elif trains[1] or symbolic:
        out = _logits(q, scaled, query_bias).softmax(dim=-1).to(v.dtype) @ gathered
    else:
        out = _attend(q, agents, gathered, query_bias, scale)
    return out.transpose(1, 2).reshape(*problem.q.shape[:-1], v.shape[-1])  # [B, *spatial, N, Dv]
