"""Agent attention as two calls of the fused Triton kernels; see `visattn.ops.fused`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visattn.ops import _legacy as support
from visattn.ops.geometry import Whole


def refusal(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, agent_bias: Tensor | None, query_bias: Tensor | None, *args: Any
) -> str | None:
    """Why the kernels cannot run this call."""
    return support.attention_refusal(q, v, k, agents, agent_bias, query_bias)


def agent_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """See `visattn.ops.agent_attention`; q [B, L, N, D], k and v [B, M, N, D]."""
    from visattn.ops.fused.attention import fused_attention

    number = agents.shape[1]
    gathered, _ = fused_attention(agents, k, v, [Whole(number, k.shape[1])], scale, bias=agent_bias)
    out, _ = fused_attention(q, agents, gathered, [Whole(q.shape[1], number)], scale, bias=query_bias)
    return out
