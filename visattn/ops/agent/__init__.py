"""Agent attention: a few agents gather from all keys, and queries read from the agents. See README.md here."""

import math
from dataclasses import dataclass

from torch import Tensor

from visattn.ops import checks
from visattn.ops.agent import eager, reference, triton
from visattn.ops.agent.bias import agent_position_bias as agent_position_bias
from visattn.ops.autocast import to_autocast, without_autocast
from visattn.ops.checks import check_shape, check_tensors, default_scale, spatial_axes
from visattn.ops.dispatch import AttentionProblem, Backends
from visattn.ops.registration import traced_as_one


@dataclass(frozen=True, eq=False)
class AgentProblem(AttentionProblem):
    """q [B, *spatial, N, D], k [B, *other, N, D], v [B, *other, N, Dv], agents [B, A, N, D]; L queries and M keys.

    Biases [N, A, M] of the agents' logits and [N, L, A] of the queries'.
    """

    agents: Tensor
    agent_bias: Tensor | None
    query_bias: Tensor | None
    scale: float

    def __post_init__(self) -> None:
        q, k, v, agents = self.q, self.k, self.v, self.agents
        check_tensors(q=q, k=k, v=v, agents=agents)
        checks.check_floating(agent_bias=self.agent_bias, query_bias=self.query_bias)
        b, (n, d) = q.shape[0], q.shape[-2:]
        fits = k.ndim >= 4 and (k.shape[0], *k.shape[-2:]) == (b, n, d)
        fits = fits and v.shape[:-1] == k.shape[:-1]
        if not fits or (agents.shape[0], *agents.shape[2:]) != (b, n, d):
            expected = "q [B, *spatial, N, D], k [B, *other, N, D], v [B, *other, N, Dv]"
            got = checks.shapes(q=q, k=k, v=v, agents=agents)
            raise ValueError(f"expected {expected} and agents [B, A, N, D], got {got}")
        number, queries, keys = agents.shape[1], math.prod(q.shape[1:-2]), math.prod(k.shape[1:-2])
        meaning = "without a batch axis"
        check_shape("agent_bias", self.agent_bias, (n, number, keys), meaning)
        check_shape("query_bias", self.query_bias, (n, queries, number), meaning)
        checks.check_dtypes(q, k, v, agents)

    def flops(self) -> int:
        """Those of the four products."""
        tokens = math.prod(self.q.shape[1:-2]) + math.prod(self.k.shape[1:-2])
        b, agents, heads, d = self.agents.shape
        return 2 * b * heads * agents * tokens * (d + self.v.shape[-1])


_backends = Backends("agent_attention", AgentProblem, triton.attend, eager.attend, reference.attend)


@traced_as_one
def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    agent_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale * q agents^T + query_bias) softmax(scale * agents k^T + agent_bias) v, per head.

    A agents attend to all M keys, then all L queries attend to the agents: linear in L and M. Differentiable in every
    tensor.

    Args:
        q: Queries [B, *spatial, N, D] with one, two or three spatial axes (L tokens); N heads of D channels. Any
            strides.
        k: Keys [B, *other, N, D], of M tokens; `other` may differ from `spatial`, in the number of axes too.
        v: Values [B, *other, N, Dv].
        agents: [B, A, N, D], in the papers the queries averaged over a grid of bins.
        agent_bias: Added to the agents' logits, [N, A, M].
        query_bias: Added to the queries' logits, [N, L, A].
        scale: Factor of both products. Default: D ** -0.5.
        backend: "auto", "triton", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, *spatial, N, Dv] of v's dtype; under autocast of its dtype, to which q, k, v and the agents are cast.

    Raises:
        ValueError: Shapes that do not fit.
        TypeError: q, k, v, agents of different dtypes, or tensors that are not floating point.
        BackendError: The requested backend cannot run this call.

    Source: arXiv:2312.08874, equations 5 and 6.
    """
    spatial_axes(q)
    q, k, v, agents = to_autocast(q, k, v, agents)
    scale = default_scale(q.shape[-1], scale)
    problem = AgentProblem(q, k, v, agents, agent_bias, query_bias, scale)
    with without_autocast(q.device):
        return _backends.choose(problem, backend)(problem)
