"""Agent attention as a registered op: `torch.ops.visattn.agent_attention`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from visattn.ops._legacy import Backend, Dispatcher, always, automatic, define_op
from visattn.ops.agent.eager import agent_eager
from visattn.ops.agent.reference import agent_reference
from visattn.ops.agent.triton import agent_triton, refusal
from visattn.ops.checks import check_dtypes

dispatcher = Dispatcher(
    "agent_attention",
    (
        Backend("triton", refusal, agent_triton, automatic),
        Backend("eager", always, agent_eager),
        Backend("reference", always, agent_reference),
    ),
)


def _check(q: Tensor, k: Tensor, v: Tensor, agents: Tensor, biases: Sequence[Tensor | None]) -> None:
    b, (n, d) = q.shape[0], q.shape[-2:]
    fits = k.ndim >= 4 and k.shape[0] == b and k.shape[-2:] == (n, d) and v.shape[:-1] == k.shape[:-1]
    if not fits or (agents.shape[0], *agents.shape[2:]) != (b, n, d):
        raise ValueError(
            f"expected q [B, *spatial, N, D], k [B, *other, N, D], v [B, *other, N, Dv] and agents [B, A, N, D], got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, agents {tuple(agents.shape)}"
        )
    number, names = agents.shape[1], ("agent_bias", "query_bias")
    shapes = (n, number, math.prod(k.shape[1:-2])), (n, math.prod(q.shape[1:-2]), number)
    for name, bias, shape in zip(names, biases, shapes, strict=True):
        if bias is not None and tuple(bias.shape) != shape:
            raise ValueError(f"expected {name} {shape} without a batch axis, got {tuple(bias.shape)}")
    check_dtypes(q, k, v, agents)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    agent_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    _check(q, k, v, agents, (agent_bias, query_bias))
    tokens = (x.flatten(1, -3) for x in (q, k, v))
    out = dispatcher(backend, *tokens, agents, agent_bias, query_bias, q.shape[-1] ** -0.5 if scale is None else scale)
    return out.reshape(*q.shape[:-1], v.shape[-1])


def _fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return v.new_empty((*q.shape[:-1], v.shape[-1]))


def _flops(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    agents_shape: Sequence[int],
    *args: Any,
) -> int:
    """Twice the multiply-adds of the four products."""
    tokens = math.prod(q_shape[1:-2]) + math.prod(k_shape[1:-2])
    return 2 * q_shape[0] * q_shape[-2] * agents_shape[1] * tokens * (q_shape[-1] + v_shape[-1])


attend = define_op(
    "agent_attention(Tensor q, Tensor k, Tensor v, Tensor agents, Tensor? agent_bias=None, Tensor? query_bias=None, "
    "float? scale=None, str backend='auto') -> Tensor",
    _run,
    _fake,
    _flops,
)
