"""Neighborhood mix as a few products of matrices: weights of a tile's tokens spread over the union of their windows.

That takes a small multiple of the logits' memory, and values are copied once per tile, not once per window. A small map
is one tile. Nothing of the size of the logits outlives a chunk of tiles.

Shapes: [T_h, T_w] tiles of [t_h, t_w] tokens, t = t_h t_w; the union of a tile's windows has U = u_h u_w; M taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visattn.ops import chunking
from visattn.ops.cut import cut_blocks, join_blocks
from visattn.ops.geometry import Axis, Tiles, is_symbolic, tiles, window
from visattn.ops.padding import fit

if TYPE_CHECKING:
    from visattn.ops.mix import MixProblem


def _taps(cut: Tiles) -> tuple[Tensor, Tensor]:
    """Find [T, t, K] where a token's taps lie in the union of windows, and their displacement + K - 1."""
    start, _ = window(cut.query, cut.group_length, cut.axis)
    key = start[..., None] + torch.arange(cut.axis.kernel_size, device=start.device)
    return key - cut.key[:, :1, None], key - cut.query[..., None] + cut.axis.kernel_size - 1


class _Tiles:
    """Some rows of tiles, and what is done with them."""

    def __init__(self, cut: Sequence[Tiles], run: slice) -> None:
        height, width = (part.axis.length for part in cut)
        (_, t_h), (number, t_w) = (part.query.shape for part in cut)
        first = 0 if run.start is None else run.start
        stop = height if run.stop is None else min(run.stop * t_h, height)
        self.rows = slice(None) if run == slice(None) else slice(first * t_h, stop)
        self.size = stop - first * t_h, width
        self.tile, self.map = (t_h, t_w), (height, width)
        self.key = [part.key_index() for part in cut]
        self.key[0] = self.key[0][run]  # [T_h, u_h]; [T_w, u_w]
        (row, self.row), (column, self.column) = (_taps(part) for part in cut)
        row, self.row = row[run], self.row[run]  # [T_h, t_h, K_h]; columns [T_w, t_w, K_w]
        self.number = row.shape[0], number
        self.union = self.key[0].shape[1] * self.key[1].shape[1]
        place = row[:, None, :, None, :, None] * self.key[1].shape[1] + column[:, None, :, None]
        self.place = place.flatten(-2)[:, :, None]  # [T_h, T_w, 1, t_h, t_w, M]

    def cut(self, x: Tensor) -> Tensor:
        """Cut some rows [B, r, W, N, D] -> [B, T_h, t_h, T_w, t_w, N, D], zero where a tile has no token."""
        sizes = [n * t for n, t in zip(self.number, self.tile, strict=True)]
        tiled = fit(x[:, self.rows].flatten(3), sizes)  # [B, T_h t_h, T_w t_w, N D]
        tiled = tiled.unflatten(2, (self.number[1], self.tile[1]))
        return tiled.unflatten(1, (self.number[0], self.tile[0])).unflatten(-1, x.shape[3:])

    def join(self, x: Tensor) -> Tensor:
        """Undo `cut`."""
        joined = x.flatten(3, 4).flatten(1, 2).flatten(3)  # [B, T_h t_h, T_w t_w, N D]
        return fit(joined, self.size).unflatten(-1, x.shape[-2:])

    def weights(self, logits: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Make the softmax [B, T_h, t_h, T_w, t_w, N, M]."""
        scores = self.cut(logits).to(dtype)
        if bias is not None:
            table = bias.to(dtype).index_select(
                2, self.column.flatten()
            )  # [N, 2 K_h - 1, T_w t_w K_w]
            table = table.index_select(1, self.row.flatten())  # [N, T_h t_h K_h, T_w t_w K_w]
            table = table.unflatten(2, self.column.shape).unflatten(1, self.row.shape)
            table = table.permute(1, 2, 4, 5, 0, 3, 6)  # [T_h, t_h, T_w, t_w, N, K_h, K_w]
            scores = (scores.unflatten(-1, table.shape[-2:]) + table).flatten(-2)
        return scores.softmax(-1)

    def _where(self, x: Tensor) -> Tensor:
        return self.place.expand(*x.shape[:6], -1)

    def spread(self, weights: Tensor) -> Tensor:
        """Spread weights over the union of windows: [B, T_h, T_w, N, t, U]."""
        weights = weights.permute(0, 1, 3, 5, 2, 4, 6)  # [B, T_h, T_w, N, t_h, t_w, M]
        wide = weights.new_zeros(*weights.shape[:6], self.union)
        return wide.scatter(-1, self._where(weights), weights).flatten(4, 5)

    def gather(self, wide: Tensor) -> Tensor:
        """Undo `spread`."""
        wide = wide.unflatten(4, self.tile)  # [B, T_h, T_w, N, t_h, t_w, U]
        return wide.gather(-1, self._where(wide)).permute(0, 1, 4, 2, 5, 3, 6)

    def values(self, v: Tensor) -> Tensor:
        """Copy the values [B, T_h, T_w, N, U, C] of the unions of windows."""
        return cut_blocks(v, self.key)

    def add_values(self, x: Tensor) -> Tensor:
        """Add up what `values` copied: [B, T_h, T_w, N, U, C] -> [B, H, W, N, C]."""
        x = x.unflatten(4, [key.shape[1] for key in self.key])  # [B, T_h, T_w, N, u_h, u_w, C]
        x = (
            x.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)
        )  # [B, T_h u_h, T_w u_w, N, C]
        for axis, (key, length) in enumerate(zip(self.key, self.map, strict=True), 1):
            shape = *x.shape[:axis], length, *x.shape[axis + 1 :]
            x = x.new_zeros(shape).index_add(axis, key.flatten(), x)
        return x


def _chunks(logits: Tensor, cut: Sequence[Tiles]) -> list[tuple[slice, list[_Tiles]]]:
    """Slice the batch, and for each slice the rows of tiles."""
    images, heads = logits.shape[0], int(logits.shape[3])
    (rows, t_h), (columns, t_w) = (part.query.shape for part in cut)
    (_, u_h), (_, u_w) = (part.key.shape for part in cut)
    row = heads * columns * t_h * t_w * u_h * u_w
    step = max(1, chunking.chunk_size(logits.device) // row)
    runs = [_Tiles(cut, run) for run in chunking.slices(rows, step)]
    # A graph for any number of images cannot hold its parts.
    whole = is_symbolic(images) or torch.jit.is_tracing()
    return [
        (x, runs)
        for x in ([slice(None)] if whole else chunking.slices(images, max(1, step // rows)))
    ]


def _mix(part: _Tiles, logits: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Make some rows [B, r, W, N, C] of the result."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    weights = part.spread(part.weights(logits, bias, dtype).to(v.dtype))
    return join_blocks(weights @ part.values(v), part.tile, part.size)


def _forward(logits: Tensor, v: Tensor, bias: Tensor | None, axes: tuple[Axis, ...]) -> Tensor:
    cut = [tiles(axis, chunking.TILE[2], v.device) for axis in axes]
    found = [
        torch.cat([_mix(part, logits[images], v[images], bias) for part in parts], 1)
        for images, parts in _chunks(logits, cut)
    ]
    return torch.cat(found) if found else torch.empty_like(v)


def attend(problem: MixProblem) -> Tensor:
    """See `visattn.ops.neighborhood_mix`."""
    logits, v, bias, axes = problem.logits, problem.v, problem.bias, problem.axes
    if is_symbolic(*problem.size):
        return _mix(
            _Tiles([tiles(axis, chunking.TILE[2], v.device) for axis in axes], slice(None)),
            logits,
            v,
            bias,
        )
    return _forward(logits, v, bias, axes)
