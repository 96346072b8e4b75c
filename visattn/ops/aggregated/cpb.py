"""The position bias of pooled keys: a perceptron of log-distances, read where queries and keys are.

The perceptron is evaluated on the grid of the distances that exist per axis, a few rows at a time: nothing of the size
of grid x hidden units, or of queries x keys, ever exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visattn.ops import chunking
from visattn.ops.aggregated.reference import log_coordinates
from visattn.ops.cut import contiguous_copy
from visattn.ops.geometry import Pooled, ceil_div, interpolated, is_symbolic

if TYPE_CHECKING:
    from visattn.ops.aggregated import AggregatedProblem


class _Grid(chunking.Recomputed):
    """Sum weight[n, f] * relu(rows[u, f] + columns[v, f]) over f: [U, F], [V, F], [N, F] -> [N, U, V]."""

    @staticmethod
    def _chunks(rows: Tensor, columns: Tensor) -> list[slice]:
        number, width = int(rows.shape[0]), max(1, int(columns.numel()))
        step = max(1, chunking.chunk_size(rows.device) // width, ceil_div(number, chunking.MOST))
        return chunking.slices(number, step)

    @staticmethod
    def forward(rows: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
        parts = _Grid._chunks(rows, columns)
        hidden = ((rows[p, None] + columns).relu_().flatten(0, 1) for p in parts)  # [u V, F]
        found = torch.cat([weight @ x.mT for x in hidden], dim=1)  # [N, U V]
        return found.unflatten(1, (rows.shape[0], columns.shape[0]))  # [N, U, V]

    @staticmethod
    # pyrefly: ignore[bad-override]: as many gradients as forward has results
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Find all three from the gradient summed over columns, and over rows, where a hidden unit is active."""
        rows, columns, weight = ctx.saved_tensors
        # [U, N, V] and [V, N, U]
        by_row, by_column = (grad.permute(*order).contiguous() for order in ((1, 0, 2), (2, 0, 1)))
        found, over_rows = [], grad.new_zeros(columns.shape[0], *weight.shape)
        for part in _Grid._chunks(rows, columns):
            # Of ones and zeros: [u, V, F].
            active = (rows.detach()[part, None] + columns.detach()).gt_(0)
            found.append(by_row[part] @ active)
            over_rows.baddbmm_(by_column[..., part], active.transpose(0, 1))
        over_columns = torch.cat(found)  # [U, N, F]; over_rows [V, N, F]
        grad_weight = (over_columns * rows[:, None]).sum(0) + (over_rows * columns[:, None]).sum(0)
        return (over_columns * weight).sum(1), (over_rows * weight).sum(1), grad_weight


def position_table(problem: AggregatedProblem) -> Tensor:
    """Evaluate the perceptron for each pair of a distance of rows and one of columns: [N, U, V]."""
    w1, w2 = problem.cpb_weight1, problem.cpb_weight2
    rows, columns = (
        torch.outer(log_coordinates(axis, n, w1.dtype, w1.device), w)
        for axis, n, w in zip(problem.axes, problem.pretrain_size, w1.unbind(1), strict=True)
    )
    rows = rows + problem.cpb_bias1  # [U, F]; columns [V, F]
    if is_symbolic(*problem.size, *problem.pooled):
        # How many rows make a chunk may not be known, but hidden units are as many for every size.
        parts = zip(*(x.split(chunking.HIDDEN, dim=1) for x in (rows, columns, w2)), strict=True)
        found = [(w @ (r[:, None] + c).relu().flatten(0, 1).mT) for r, c, w in parts]  # [N, U V]
        shape = rows.shape[0], columns.shape[0]
        table = torch.stack(found).sum(0).unflatten(1, shape)  # [N, U, V]
    else:
        table = _Grid.apply(rows, columns, w2)
    return table + problem.cpb_bias2[:, None, None]


class PositionBias:
    """Reads a table [N, U, V] for some rows of queries and all pooled keys: at one entry, or as a mean of 4 x 4."""

    def __init__(
        self, axes: Sequence[Pooled], size: Sequence[int], pooled: Sequence[int], table: Tensor
    ) -> None:
        sizes = zip(axes, size, pooled, strict=True)
        self.rows, self.columns = (interpolated(*each, table.device) for each in sizes)
        self.table, self.grid = table, contiguous_copy(table.permute(1, 2, 0))  # [U, V, N]

    @staticmethod
    def _read(x: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
        """Read x [U, ...] at index [queries, keys, m] with weights like it: [keys, queries, ...]."""
        index = contiguous_copy(index.transpose(0, 1))  # [keys, queries, m]
        found = x.index_select(0, index.flatten())  # [keys queries m, ...]
        found = found.unflatten(0, index.shape)  # [keys, queries, m, ...]
        if weight is None:
            return found.squeeze(2)  # [keys, queries, ...]
        weight = weight.transpose(0, 1).to(x.dtype)  # [keys, queries, m]
        return (found * weight.view(*index.shape, *[1] * (x.ndim - 1))).sum(2)

    @staticmethod
    def _add(x: Tensor, index: Tensor, weight: Tensor | None, size: int) -> Tensor:
        """Transpose `_read`: [keys, queries, ...] -> [U, ...]."""
        index, x = (
            index.transpose(0, 1),
            x.unsqueeze(2),
        )  # [keys, queries, m], [keys, queries, 1, ..]
        if weight is not None:
            weight = weight.transpose(0, 1).to(x.dtype)  # [keys, queries, m]
            x = x * weight.view(*index.shape, *[1] * (x.ndim - 3))  # [keys, queries, m, ...]
        return x.new_zeros(size, *x.shape[3:]).index_add(0, index.flatten(), x.flatten(0, 2))

    def _part(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        index, weight = self.rows
        return index[rows], None if weight is None else weight[rows]

    def read(self, rows: slice) -> Tensor:
        """Read the bias of some rows of queries: [N, PH, PW, rows, W], a view."""
        by_row = self._read(self.grid, *self._part(rows)).permute(2, 3, 0, 1)  # [V, N, PH, rows]
        by_row = contiguous_copy(by_row)
        return self._read(by_row, *self.columns).permute(2, 3, 0, 4, 1)  # [N, PH, PW, rows, W]

    def all(self) -> Tensor:
        """Read the bias of all queries, in operations that do not depend on the sizes: [N, H * W, PH * PW]."""
        bias = self.read(slice(None)).permute(0, 3, 4, 1, 2)  # [N, H, W, PH, PW]
        return contiguous_copy(bias).flatten(3).flatten(1, 2)  # [N, H W, PH PW]

    def add(self, rows: slice, grad: Tensor) -> Tensor:
        """Transpose `read`: the part [N, U, V] of the table's gradient."""
        _, u, v = self.table.shape
        grad = grad.permute(2, 4, 0, 1, 3)  # [PW, W, N, PH, rows]
        by_row = self._add(grad, *self.columns, v)  # [V, N, PH, rows]
        by_row = by_row.permute(2, 3, 0, 1).contiguous()  # [PH, rows, V, N]
        return self._add(by_row, *self._part(rows), u).permute(2, 0, 1)  # [N, U, V]
