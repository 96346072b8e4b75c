"""Agent attention as two calls of the fused Triton kernels; see `visattn.ops.fused`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from visattn.ops.geometry import Whole

if TYPE_CHECKING:
    from visattn.ops.agent import AgentProblem


def attend(problem: AgentProblem) -> Tensor:
    """See `visattn.ops.agent_attention`; A agents, L queries, M keys."""
    from visattn.ops.fused.attention import flat, fused_attention

    agents, scale, number = problem.agents, problem.scale, problem.agents.shape[1]
    q, k, v = flat(problem.q), flat(problem.k), flat(problem.v)  # [B, L or M, N, D]
    keys, queries = [Whole(number, k.shape[1])], [Whole(q.shape[1], number)]
    gathered, _ = fused_attention(agents, k, v, keys, scale, bias=problem.agent_bias)
    out, _ = fused_attention(q, agents, gathered, queries, scale, bias=problem.query_bias)
    return out.view(*problem.q.shape[:-1], problem.v.shape[-1])  # [B, *spatial, N, Dv]
