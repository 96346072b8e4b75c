"""The position bias between agents and tokens, as an op: `torch.ops.visattn.agent_position_bias`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops._legacy import define_op


def _check(table: Tensor, rows: Tensor, columns: Tensor, size: Sequence[int], agent_size: Sequence[int]) -> int:
    """Agents per axis of the tables."""
    lead = tuple(table.shape[:2])
    if (table.ndim, rows.ndim, columns.ndim) != (4, 3, 3) or any(tuple(t.shape[:2]) != lead for t in (rows, columns)):
        raise ValueError(
            f"expected table [N, A, h, w], rows [N, A, H] and columns [N, A, W], got {tuple(table.shape)}, "
            f"{tuple(rows.shape)} and {tuple(columns.shape)}"
        )
    side = math.isqrt(table.shape[1])
    if side * side != table.shape[1]:
        raise ValueError(f"expected a square number of agents, got {table.shape[1]}; try {max(1, side) ** 2}")
    if len(size) != 2 or len(agent_size) != 2 or min(*size, *agent_size) < 1:
        raise ValueError(f"expected size and agent_size of 2 ints >= 1, got {list(size)} and {list(agent_size)}")
    return side


def _resize(x: Tensor, axis: int, size: int) -> Tensor:
    """Linear interpolation of an axis, as a product: that of PyTorch has no deterministic backward pass on GPUs."""
    if x.shape[axis] == size:
        return x
    identity = torch.eye(x.shape[axis], dtype=x.dtype, device=x.device)
    weight = F.interpolate(identity[None], size=size, mode="linear", align_corners=False)[0]
    return (x.movedim(axis, -1) @ weight).movedim(-1, axis)


def _run(table: Tensor, rows: Tensor, columns: Tensor, size: list[int], agent_size: list[int]) -> Tensor:
    side, dtype = _check(table, rows, columns, size, agent_size), table.dtype
    device = table.device.type
    has_autocast = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if has_autocast else contextlib.nullcontext():
        wide = torch.promote_types(dtype, torch.float32)
        table, rows, columns = (t.to(wide).unflatten(1, (side, side)) for t in (table, rows, columns))
        # The agents first: axes are interpolated one by one in any order, and the tables are smaller than the map.
        table, rows, columns = (_resize(_resize(t, 1, agent_size[0]), 2, agent_size[1]) for t in (table, rows, columns))
        bias = _resize(_resize(table, 3, size[0]), 4, size[1])
        bias = bias + _resize(rows, 3, size[0])[..., None] + _resize(columns, 3, size[1])[..., None, :]
        return bias.flatten(3).flatten(1, 2).to(dtype)


def _fake(table: Tensor, rows: Tensor, columns: Tensor, size: list[int], agent_size: list[int]) -> Tensor:
    return table.new_empty((table.shape[0], agent_size[0] * agent_size[1], size[0] * size[1]))


position_bias = define_op(
    "agent_position_bias(Tensor table, Tensor rows, Tensor columns, SymInt[] size, SymInt[] agent_size) -> Tensor",
    _run,
    _fake,
)
