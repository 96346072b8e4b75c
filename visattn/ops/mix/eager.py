"""Neighborhood mix as a few products of matrices: weights of a tile's tokens spread over the union of their windows.

That takes a small multiple of the logits' memory, and values are copied once per tile, not once per window. A small map
is one tile. Nothing of the size of the logits outlives a chunk of tiles.

Shapes: [T_h, T_w] tiles of [t_h, t_w] tokens, t = t_h t_w; the union of a tile's windows has U = u_h u_w; M taps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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

    def weights(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        """Make the softmax [B, T_h, t_h, T_w, t_w, N, M], in float32 at least."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        scores = self.cut(logits).to(dtype)
        if bias is not None:
            table = bias.to(dtype).index_select(2, self.column.flatten())
            table = table.index_select(1, self.row.flatten())  # [N, T_h t_h K_h, T_w t_w K_w]
            table = table.unflatten(2, self.column.shape).unflatten(1, self.row.shape)
            table = table.permute(1, 2, 4, 5, 0, 3, 6)  # [T_h, t_h, T_w, t_w, N, K_h, K_w]
            scores = (scores.unflatten(-1, table.shape[-2:]) + table).flatten(-2)
        return scores.softmax(-1)

    def add_table(self, scores: Tensor, bias: Tensor) -> Tensor:
        """Add up what `weights` read: the gradient of the bias from [B, T_h, t_h, T_w, t_w, N, M]."""
        scores = scores.sum(0).unflatten(-1, (self.row.shape[-1], self.column.shape[-1]))
        scores = scores.permute(4, 0, 1, 5, 2, 3, 6)  # [N, T_h, t_h, K_h, T_w, t_w, K_w]
        scores = scores.flatten(4).flatten(1, 3)  # [N, T_h t_h K_h, T_w t_w K_w]
        grad = scores.new_zeros(*bias.shape[:2], scores.shape[2])
        grad = grad.index_add(1, self.row.flatten(), scores)
        return scores.new_zeros(bias.shape).index_add(2, self.column.flatten(), grad).to(bias.dtype)

    def _where(self, x: Tensor) -> Tensor:
        return self.place.expand(*x.shape[:6], -1)

    def spread(self, weights: Tensor) -> Tensor:
        """Spread weights over the union of windows: [B, T_h, T_w, N, t, U]."""
        weights = weights.permute(0, 1, 3, 5, 2, 4, 6)  # [B, T_h, T_w, N, t_h, t_w, M]
        wide = weights.new_zeros(*weights.shape[:6], self.union)
        scatter = wide.scatter if is_symbolic(*self.size) else wide.scatter_
        return scatter(-1, self._where(weights), weights).flatten(4, 5)

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


def _cut(axes: Sequence[Axis], device: torch.device) -> list[Tiles]:
    return [tiles(axis, chunking.TILE[2], device) for axis in axes]


def _chunks(logits: Tensor, axes: Sequence[Axis]) -> list[tuple[slice, list[_Tiles]]]:
    """Slice the batch, and for each slice the rows of tiles."""
    images, heads, cut = logits.shape[0], int(logits.shape[3]), _cut(axes, logits.device)
    numbers = [part.query.numel() for part in cut], [part.key.shape[1] for part in cut]
    rows, columns = (part.query.shape[0] for part in cut)
    row = heads * math.prod(numbers[0]) * math.prod(numbers[1]) // rows
    limit = max(1, chunking.chunk_size(logits.device) // row)
    runs = [_Tiles(cut, run) for run in chunking.slices(rows, limit)]
    # A graph for any number of images cannot hold its parts.
    whole = is_symbolic(images) or torch.jit.is_tracing()
    batch = [slice(None)] if whole else chunking.slices(images, max(1, limit // rows))
    return [(part, runs) for part in batch]


def _mix(part: _Tiles, logits: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Make some rows [B, r, W, N, C] of the result."""
    weights = part.weights(logits, bias).to(v.dtype)
    return join_blocks(part.spread(weights) @ part.values(v), part.tile, part.size)


def _gradients(
    part: _Tiles, grad_out: Tensor, logits: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Make those of some rows [B, r, W, N, M] of the logits, of v and of the bias."""
    weights, values = part.weights(logits, bias), part.values(v)
    grad = part.cut(grad_out).permute(0, 1, 3, 5, 2, 4, 6)  # [B, T_h, T_w, N, t_h, t_w, C]
    grad = grad.flatten(4, 5)  # [B, T_h, T_w, N, t, C]
    grad_values = part.spread(weights.to(v.dtype)).mT @ grad
    grad_weights = part.gather(grad @ values.mT).to(weights.dtype)
    # The derivative of softmax: weights * (grad - sum of weights * grad).
    scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    grad_bias = None if bias is None else part.add_table(scores, bias)
    return part.join(scores).to(logits.dtype), part.add_values(grad_values), grad_bias


def _forward(logits: Tensor, v: Tensor, bias: Tensor | None, axes: tuple[Axis, ...]) -> Tensor:
    found = [
        torch.cat([_mix(part, logits[images], v[images], bias) for part in parts], 1)
        for images, parts in _chunks(logits, axes)
    ]
    return torch.cat(found) if found else torch.empty_like(v)


class _Mix(chunking.Recomputed):
    """`_forward`, keeping only its inputs for the backward pass."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _forward(*inputs)

    @staticmethod
    # pyrefly: ignore[bad-override]: as many gradients as forward has results
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (logits, v, bias), (axes,) = ctx.saved_tensors, ctx.how
        grads: tuple[list[Tensor], list[Tensor]] = [], []
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for images, parts in _chunks(logits, axes):
            rows = []
            grad_v = torch.zeros_like(v[images])
            for part in parts:
                row, values, table = _gradients(
                    part, grad_out[images], logits[images], v[images], bias
                )
                rows.append(row)
                grad_v = grad_v + values
                grad_bias = None if table is None else grad_bias + table
            grads[0].append(torch.cat(rows, 1))
            grads[1].append(grad_v)
        grad_logits, grad_v = (
            torch.cat(x) if x else torch.zeros_like(y)
            for x, y in zip(grads, (logits, v), strict=True)
        )
        return grad_logits, grad_v, grad_bias, None


def attend(problem: MixProblem) -> Tensor:
    """See `visattn.ops.neighborhood_mix`."""
    logits, v, bias, axes = problem.logits, problem.v, problem.bias, problem.axes
    if is_symbolic(*problem.size):
        return _mix(_Tiles(_cut(axes, v.device), slice(None)), logits, v, bias)
    run = _Mix.apply if problem.trains() else _forward
    return run(logits, v, bias, axes)
