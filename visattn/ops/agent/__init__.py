"""Agent attention: a few agents gather from all keys, and queries read from the agents. See README.md here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from visattn.ops.agent.bias import position_bias
from visattn.ops.agent.op import attend
from visattn.ops.checks import spatial_axes


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
        [B, *spatial, N, Dv] of v's dtype.

    Raises:
        ValueError: Shapes that do not fit.
        TypeError: q, k, v, agents of different dtypes, or not floating point.
        BackendError: The requested backend cannot run this call.

    Source: arXiv:2312.08874, equations 5 and 6.
    """
    spatial_axes(q)
    return attend(q, k, v, agents, agent_bias, query_bias, scale, backend)


def agent_position_bias(
    table: Tensor, rows: Tensor, columns: Tensor, size: Sequence[int], agent_size: Sequence[int]
) -> Tensor:
    """A bias between agents and the tokens of a map, made of tables of other sizes by linear interpolation.

    bias[n, a, (y, x)] = table[n, a, y, x] + rows[n, a, y] + columns[n, a, x], each resized to the map and to the grid
    of agents (bilinear, `align_corners=False`). Differentiable in the tables.

    Args:
        table: [N, A, h, w]; A = p * p agents, row by row.
        rows: [N, A, H0], a term of each row of the map that they were learned for.
        columns: [N, A, W0].
        size: (H, W) of the map.
        agent_size: (ph, pw), the grid of agents.

    Returns:
        [N, ph * pw, H * W] of the table's dtype.

    Raises:
        ValueError: Tables that do not fit together, a number of agents that is not a square, sizes below 1.

    Source: arXiv:2312.08874, section 4.3; the resizing is that of the official detection backbones.
    """
    return position_bias(table, rows, columns, list(size), list(agent_size))
