"""Neighborhood mix as a few products of matrices: weights of a tile's tokens spread over the union of their windows.

That takes a small multiple of the logits' memory, and values are copied once per tile, not once per window. A small map
is one tile. Nothing of the size of the logits outlives a chunk of tiles: the backward pass makes the weights again.

Shapes: [T_h, T_w] tiles of [t_h, t_w] tokens, t = t_h t_w; the union of a tile's windows has U = u_h u_w; M taps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visattn.ops import chunking
from visattn.ops.cut import contiguous_copy, join_blocks
from visattn.ops.geometry import Axis, Tiles, is_symbolic, tiles, window
from visattn.ops.padding import fit

if TYPE_CHECKING:
    from visattn.ops.mix import MixProblem


@dataclass(frozen=True)
class _Run:
    """Consecutive tiles [T] of an axis."""

    tokens: slice  # the tokens of the map in them
    length: int  # how many
    key: Tensor  # [T, u] the union of a tile's windows
    place: Tensor  # [T, t, K] where a token's taps lie in it
    entry: Tensor  # [T, t, K] displacement + K - 1 of a tap


def _runs(cut: Tiles, step: int | None) -> list[_Run]:
    """Cut an axis into runs of `step` tiles, or into one run."""
    start, _ = window(cut.query, cut.group_length, cut.axis)
    key, length = cut.key_index(), cut.axis.length
    taps = start[..., None] + torch.arange(cut.axis.kernel_size, device=key.device)  # [T, t, K]
    place, entry = taps - cut.key[:, :1, None], taps - cut.query[..., None] + taps.shape[-1] - 1
    if step is None:
        return [_Run(slice(None), length, key, place, entry)]
    number, t = cut.query.shape
    tokens = chunking.slices(length, step * t)
    return [
        _Run(part, part.stop - part.start, key[run], place[run], entry[run])
        for part, run in zip(tokens, chunking.slices(number, step), strict=True)
    ]


class _Tiles:
    """Runs of both axes, and what is done with the tiles."""

    def __init__(self, rows: _Run, columns: _Run) -> None:
        self.runs = runs = (rows, columns)
        self.number, self.tile, self.kernel = zip(*(run.place.shape for run in runs), strict=True)
        self.size = [run.length for run in runs]
        self.key = [run.key for run in runs]
        place = rows.place[:, None, :, None, :, None] * columns.key.shape[1]
        place = place + columns.place[:, None, :, None]  # [T_h, T_w, t_h, t_w, K_h, K_w]
        self.place = place.flatten(-2)[:, :, None]  # [T_h, T_w, 1, t_h, t_w, M]

    def cut(self, x: Tensor) -> Tensor:
        """Cut a map [B, H, W, N, D] -> [B, T_h, t_h, T_w, t_w, N, D], zero where a tile has no token."""
        rows, columns = (run.tokens for run in self.runs)
        sizes = [number * t for number, t in zip(self.number, self.tile, strict=True)]
        tiled = fit(x[:, rows, columns].flatten(3), sizes)  # [B, T_h t_h, T_w t_w, N D]
        for axis in (1, 0):
            tiled = tiled.unflatten(1 + axis, (self.number[axis], self.tile[axis]))
        return tiled.unflatten(-1, x.shape[3:])

    def join(self, x: Tensor) -> Tensor:
        """Undo `cut`, for the tokens of these tiles."""
        joined = x.flatten(3, 4).flatten(1, 2).flatten(3)  # [B, T_h t_h, T_w t_w, N D]
        return fit(joined, self.size).unflatten(-1, x.shape[-2:])

    def weights(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        """Make the softmax [B, T_h, t_h, T_w, t_w, N, M], in float32 at least."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        scores = self.cut(logits).to(dtype)
        if bias is not None:
            rows, columns = (run.entry for run in self.runs)
            table = bias.to(dtype).index_select(2, columns.flatten())
            table = table.index_select(1, rows.flatten())  # [N, T_h t_h K_h, T_w t_w K_w]
            table = table.unflatten(2, columns.shape).unflatten(1, rows.shape)
            table = table.permute(1, 2, 4, 5, 0, 3, 6)  # [T_h, t_h, T_w, t_w, N, K_h, K_w]
            scores = (scores.unflatten(-1, self.kernel) + table).flatten(-2)
        return scores.softmax(-1)

    def add_table(self, scores: Tensor, bias: Tensor) -> Tensor:
        """Add up what `weights` read: the gradient of the bias from [B, T_h, t_h, T_w, t_w, N, M]."""
        rows, columns = (run.entry.flatten() for run in self.runs)
        scores = scores.sum(0).unflatten(-1, self.kernel)
        scores = scores.permute(4, 0, 1, 5, 2, 3, 6)  # [N, T_h, t_h, K_h, T_w, t_w, K_w]
        scores = scores.flatten(4).flatten(1, 3)  # [N, T_h t_h K_h, T_w t_w K_w]
        grad = scores.new_zeros(*bias.shape[:2], scores.shape[2]).index_add(1, rows, scores)
        return grad.new_zeros(bias.shape).index_add(2, columns, grad)

    def _where(self, x: Tensor) -> Tensor:
        return self.place.expand(*x.shape[:6], -1)

    def spread(self, weights: Tensor) -> Tensor:
        """Spread weights over the union of windows: [B, T_h, T_w, N, t, U]."""
        weights = weights.permute(0, 1, 3, 5, 2, 4, 6)  # [B, T_h, T_w, N, t_h, t_w, M]
        wide = weights.new_zeros(*weights.shape[:6], math.prod(key.shape[1] for key in self.key))
        scatter = wide.scatter if is_symbolic(*self.size) else wide.scatter_
        return scatter(-1, self._where(weights), weights).flatten(4, 5)

    def gather(self, wide: Tensor) -> Tensor:
        """Undo `spread`."""
        wide = wide.unflatten(4, self.tile)  # [B, T_h, T_w, N, t_h, t_w, U]
        return wide.gather(-1, self._where(wide)).permute(0, 1, 4, 2, 5, 3, 6)

    def values(self, v: Tensor) -> Tensor:
        """Copy the values [B, T_h, T_w, N, U, C] of the unions of windows."""
        rows, columns = self.key
        v = v.index_select(1, rows.flatten()).index_select(2, columns.flatten())
        v = v.unflatten(2, columns.shape).unflatten(1, rows.shape)  # [B, T_h, u_h, T_w, u_w, N, C]
        return contiguous_copy(v.permute(0, 1, 3, 5, 2, 4, 6)).flatten(4, 5)

    def mix(self, logits: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Make the result for the tokens of these tiles."""
        weights = self.spread(self.weights(logits, bias).to(v.dtype))
        return join_blocks(weights @ self.values(v), self.tile, self.size)

    def gradients(
        self, grad_out: Tensor, logits: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Make those of these tokens' logits, of the copied values [B, T_h u_h, T_w u_w, N, C] and of the bias."""
        weights, values = self.weights(logits, bias), self.values(v)
        grad = self.cut(grad_out).permute(0, 1, 3, 5, 2, 4, 6)  # [B, T_h, T_w, N, t_h, t_w, C]
        grad = grad.flatten(4, 5)
        grad_values = self.spread(weights.to(v.dtype)).mT @ grad  # [B, T_h, T_w, N, U, C]
        grad_values = grad_values.unflatten(4, [key.shape[1] for key in self.key])
        grad_values = grad_values.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)
        grad_weights = self.gather(grad @ values.mT).to(weights.dtype)
        # The derivative of softmax: weights * (grad - sum of weights * grad).
        scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_bias = None if bias is None else self.add_table(scores, bias)
        return self.join(scores).to(logits.dtype), grad_values, grad_bias


def _add(x: Tensor, dim: int, cut: Tiles) -> Tensor:
    """Add up what was copied of an axis for each of its tiles: [..., T u, ...] -> [..., L, ...]."""
    shape = [*x.shape[:dim], cut.axis.length, *x.shape[dim + 1 :]]
    return x.new_zeros(shape).index_add(dim, cut.key_index().flatten(), x)


def _cut(axes: Sequence[Axis], device: torch.device) -> list[Tiles]:
    return [tiles(axis, chunking.TILE[2], device) for axis in axes]


def _chunks(logits: Tensor, cut: Sequence[Tiles]) -> list[tuple[slice, list[list[_Tiles]]]]:
    """Slice the batch, and give for each slice the tiles, in rows and columns of chunks."""
    (rows, t_h), (columns, t_w) = (part.query.shape for part in cut)
    union = math.prod(part.key.shape[1] for part in cut)
    tile = int(logits.shape[3]) * t_h * t_w * union
    most = max(1, chunking.chunk_size(logits.device) // tile)  # tiles of all images
    across, down = min(most, columns), max(1, most // columns)
    runs = _runs(cut[1], across)
    chunks = [[_Tiles(row, run) for run in runs] for row in _runs(cut[0], down)]
    # A graph for any number of images cannot hold its parts.
    if is_symbolic(logits.shape[0]) or torch.jit.is_tracing():
        return [(slice(None), chunks)]
    return [
        (part, chunks)
        for part in chunking.slices(logits.shape[0], max(1, most // (rows * columns)))
    ]


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _forward(logits: Tensor, v: Tensor, bias: Tensor | None, axes: tuple[Axis, ...]) -> Tensor:
    found = []
    for images, chunks in _chunks(logits, _cut(axes, v.device)):
        given = logits[images], v[images], bias
        found.append(_cat([_cat([part.mix(*given) for part in row], 2) for row in chunks], 1))
    return _cat(found, 0) if found else torch.empty_like(v)


class _Mix(chunking.Recomputed):
    """`_forward`, keeping only its inputs for the backward pass."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _forward(*inputs)

    @staticmethod
    # pyrefly: ignore[bad-override]: as many gradients as forward has results
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (logits, v, bias), (axes,) = ctx.saved_tensors, ctx.how
        cut = _cut(axes, v.device)
        grads_logits, grads_v = [], []
        dtype = torch.promote_types(logits.dtype, torch.float32)
        table = None if bias is None else torch.zeros_like(bias, dtype=dtype)
        for images, chunks in _chunks(logits, cut):
            given, rows = (grad_out[images], logits[images], v[images], bias), []
            for row in chunks:
                parts, values, tables = zip(*(part.gradients(*given) for part in row), strict=True)
                rows.append((_cat([*parts], 2), _add(_cat([*values], 2), 2, cut[1])))
                table = None if table is None else sum(tables, table)
            grads_logits.append(_cat([x for x, _ in rows], 1))
            grads_v.append(_add(_cat([x for _, x in rows], 1), 1, cut[0]))
        grad_logits, grad_v = (
            _cat(grads, 0) if grads else torch.empty_like(x)
            for grads, x in ((grads_logits, logits), (grads_v, v))
        )
        grad_bias = None if bias is None or table is None else table.to(bias.dtype)
        return grad_logits, grad_v, grad_bias, None


def attend(problem: MixProblem) -> Tensor:
    """See `visattn.ops.neighborhood_mix`."""
    logits, v, bias, axes = problem.logits, problem.v, problem.bias, problem.axes
    if is_symbolic(*problem.size):
        rows, columns = (_runs(part, None) for part in _cut(axes, v.device))
        return _Tiles(*rows, *columns).mix(logits, v, bias)
    run = _Mix.apply if problem.trains() else _forward
    return run(logits, v, bias, axes)
