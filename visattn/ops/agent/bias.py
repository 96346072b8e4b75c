"""The position bias between agents and the tokens of a map."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.autocast import without_autocast
from visattn.ops.checks import check_floating, check_tensors, per_axis
from visattn.ops.geometry import is_symbolic
from visattn.ops.registration import custom_op


def _check(table: Tensor, rows: Tensor, columns: Tensor, *sizes: Sequence[int]) -> int:
    """Check what makes a bias, and find the agents per axis of the tables."""
    check_tensors(table=table, rows=rows, columns=columns)
    check_floating(table=table, rows=rows, columns=columns)
    fits = (table.ndim, rows.ndim, columns.ndim) == (4, 3, 3)
    if not fits or not table.shape[:2] == rows.shape[:2] == columns.shape[:2]:
        expected = "table [N, A, h, w], rows [N, A, H] and columns [N, A, W]"
        got = f"{tuple(table.shape)}, {tuple(rows.shape)} and {tuple(columns.shape)}"
        raise ValueError(f"expected {expected}, got {got}")
    number = table.shape[1]
    side = math.isqrt(number)
    if side * side != number:
        near = max(1, side) ** 2
        raise ValueError(f"expected a square number of agents, got {number}; try {near}")
    if any(len(size) != 2 for size in sizes) or any(n < 1 for size in sizes for n in size):
        got = " and ".join(str(list(size)) for size in sizes)
        raise ValueError(f"expected size and agent_size of 2 ints >= 1, got {got}")
    return side


def _resize(x: Tensor, axis: int, size: int) -> Tensor:
    """Interpolate an axis linearly to `size`, as a product: PyTorch's has no deterministic backward pass on GPUs."""
    if not is_symbolic(size) and x.shape[axis] == size:
        return x
    identity = torch.eye(x.shape[axis], dtype=x.dtype, device=x.device)
    # [old, size]
    weight = F.interpolate(identity[None], size=size, mode="linear", align_corners=False)[0]
    return (x.movedim(axis, -1) @ weight).movedim(-1, axis)  # [..., size, ...]


def _empty(
    table: Tensor, rows: Tensor, columns: Tensor, size: Sequence[int], agent_size: Sequence[int]
) -> Tensor:
    return table.new_empty((table.shape[0], agent_size[0] * agent_size[1], size[0] * size[1]))


@custom_op(fake=_empty)
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
        TypeError: Tables that are not floating point.
        ValueError: Tables that do not fit together, a number of agents that is not a square, sizes below 1.

    Source: arXiv:2312.08874, section 4.3; the resizing is that of the official detection backbones.
    """
    side, dtype = _check(table, rows, columns, size, agent_size), table.dtype
    height, width = per_axis("size", size, int, 2)
    agents = per_axis("agent_size", agent_size, int, 2)
    with without_autocast(table.device):
        wide = torch.promote_types(dtype, torch.float32)
        tables = (t.to(wide).unflatten(1, (side, side)) for t in (table, rows, columns))
        table, rows, columns = tables  # [N, p, p, ...]
        # The agents first: axes are interpolated one by one in any order, and the tables are smaller than the map.
        tables = (_resize(_resize(t, 1, agents[0]), 2, agents[1]) for t in (table, rows, columns))
        table, rows, columns = tables  # [N, ph, pw, ...]
        bias = _resize(_resize(table, 3, height), 4, width)  # [N, ph, pw, H, W]
        bias = bias + _resize(rows, 3, height)[..., None] + _resize(columns, 3, width)[..., None, :]
        return bias.flatten(3).flatten(1, 2).to(dtype)  # [N, ph pw, H W]
