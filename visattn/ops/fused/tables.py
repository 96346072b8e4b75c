"""What the attention kernels read to find queries and keys: the tiles of a relation as tables of tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.geometry import NONE, OUTSIDE, AnyAxis, Axis, Clipped, Cut, Halo, Partition, Whole, spans, tile_plan

_KINDS: tuple[type[AnyAxis], ...] = (Axis, Partition, Halo, Whole, Clipped)
STEP = 16  # columns of a tile are a multiple of this, so that rows of position tiles begin at 16-byte borders


def encode(axes: Sequence[AnyAxis]) -> list[int]:
    """Axes as ints, the form in which they pass through registered ops."""
    found = []
    for axis in axes:
        values = [int(x) for x in vars(axis).values()]
        found += [_KINDS.index(type(axis)), len(values), *values]
    return found


def decode(code: Sequence[int]) -> tuple[AnyAxis, ...]:
    """Inverse of `encode`."""
    axes, rest = [], list(code)
    while rest:
        (kind, number), rest = rest[:2], rest[2:]
        axes.append(_KINDS[kind](*rest[:number]))
        rest = rest[number:]
    return tuple(axes)


def _outer(per_axis: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """[T, n] row-major token of the product of axes [T_a, n_a]; the smallest negative mark of any axis wins."""
    index, mark = per_axis[0].clamp(min=0), per_axis[0].clamp(max=0)
    for values, size in zip(per_axis[1:], sizes[1:], strict=True):
        index = index[:, None, :, None] * size + values.clamp(min=0)[None, :, None, :]
        mark = torch.minimum(mark[:, None, :, None], values.clamp(max=0)[None, :, None, :])
        index, mark = (x.flatten(2).flatten(0, 1) for x in (index, mark))
    return torch.where(mark < 0, mark, index)


def _interleave(table: Tensor, axes: int) -> Tensor:
    """[n, C_1, t_1, U_1, C_2, t_2, U_2, ...] -> [C_1 C_2 ..., n, t_1 t_2 ..., U_1 U_2 ...]."""
    kind, row, column = ([1 + 3 * a + part for a in range(axes)] for part in range(3))
    table = table.permute(*kind, 0, *row, *column)
    return table.flatten(-axes).flatten(-1 - axes, -2).flatten(0, axes - 1)


@dataclass(frozen=True)
class Tiling:
    """Tiles of rows and the columns that each of them meets; rows are queries and columns keys, or the reverse.

    Attributes:
        rows: int32 [T, M] tokens, negative where there is none.
        columns: int32 [T, U] tokens, OUTSIDE or NONE where there is none; U is a multiple of `STEP`.
        kind: int32 [T] which of the `kinds` different tiles a tile is.
        members: int32 [T] tiles in the order of their kinds.
        first: [kinds + 1] where the tiles of a kind begin in `members`.
        cuts: The axes.
        codes: int32 of the side that holds the keys of halos, row position + 65536 * column position, each modulo the
            window.
    """

    rows: Tensor
    columns: Tensor
    kind: Tensor
    members: Tensor
    first: Tensor
    cuts: tuple[Cut, ...]
    codes: Tensor | None

    @property
    def kinds(self) -> int:
        return len(self.first) - 1

    @functools.cached_property
    def has_holes(self) -> bool:
        """Whether some tile has a column at a place outside the map."""
        return bool((self.columns == OUTSIDE).any())

    @property
    def masked(self) -> bool:
        """Whether some row and column of a tile do not see each other."""
        return any(cut.masked for cut in self.cuts)

    def position_tiles(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[kinds, N or 1, M, U] what logits get: the position table [N, entries per axis], -inf where hidden."""
        device, axes = self.rows.device, len(self.cuts)
        zero = torch.zeros((), dtype=dtype, device=device)
        if bias is None:
            table = zero.view((1,) * (1 + 3 * axes))
        else:
            table = bias.to(dtype)
            for a in reversed(range(axes)):
                entry = self.cuts[a].pattern.clamp(min=0).to(device)
                table = table.index_select(a + 1, entry.flatten())
            for a in reversed(range(axes)):
                table = table.unflatten(a + 1, self.cuts[a].pattern.shape)
        for a, cut in enumerate(self.cuts):
            hidden = zero.new_zeros(cut.pattern.shape).masked_fill((cut.pattern < 0).to(device), float("-inf"))
            table = table + hidden.view((1,) * (1 + 3 * a) + cut.pattern.shape + (1,) * (3 * (axes - 1 - a)))
        return self.pad(_interleave(table, axes), dtype)

    def pad(self, tiles: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., U] from fewer columns, hidden ones behind."""
        return F.pad(tiles.to(dtype), (0, self.columns.shape[1] - tiles.shape[-1]), value=float("-inf")).contiguous()

    def position_gradient(self, grad: Tensor, entries: Sequence[int]) -> Tensor:
        """[N, entries per axis] from the gradient [kinds, N, M, U] of `position_tiles`, summed in one fixed order."""
        shapes = [cut.pattern.shape for cut in self.cuts]
        kinds, rows, columns = zip(*shapes, strict=True)
        axes = len(shapes)
        grad = grad[..., : math.prod(columns)].unflatten(3, columns).unflatten(2, rows).unflatten(0, kinds)
        order = [n for a in range(axes) for n in (a, axes + 1 + a, 2 * axes + 1 + a)]
        grad = grad.permute(axes, *order)  # [N, C_1, t_1, U_1, ...]
        for a in range(axes):
            grad = grad.flatten(1 + a, 3 + a)
        for a, (cut, number) in enumerate(zip(self.cuts, entries, strict=True)):
            grad = add_up(grad, 1 + a, cut.pattern.flatten(), number)
        return grad


def add_up(x: Tensor, dim: int, index: Tensor, number: int) -> Tensor:
    """Transpose of `index_select`: entry i of axis `dim` is the sum of those of x where `index` (on the CPU) is i.

    In one fixed order, which `index_add` has not on a GPU. Negative values of `index` are left out.
    """
    places = _places(index, number).to(x.device)
    x = torch.cat([x, x.new_zeros(()).expand_as(x.narrow(dim, 0, 1))], dim=dim)
    return x.index_select(dim, places.flatten()).unflatten(dim, places.shape).sum(dim + 1)


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dim: int, index: Tensor) -> Tensor:
        return x.index_select(dim, index.to(x.device))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.dim, index = inputs
        ctx.number = x.shape[ctx.dim]
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return add_up(grad, ctx.dim, index, ctx.number), None, None


def select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """`index_select` with an index on the CPU and a gradient that is the same in every run."""
    return _Select.apply(x, dim, index)


def _places(values: Tensor, number: int) -> Tensor:
    """[number, most] where each of 0 ... number - 1 stands in `values`, filled up with the length of `values`."""
    order, kept = torch.sort(values, stable=True).indices, values[values >= 0]
    order = order[len(values) - len(kept) :]
    counts = torch.bincount(kept, minlength=number)
    places = torch.full((number, int(counts.max())), len(values))
    rank = torch.arange(len(kept)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    places[values[order], rank] = order
    return places


def _codes(axes: Sequence[AnyAxis], positions: Sequence[Tensor]) -> Tensor:
    """[T, n] of two axes of halos."""
    rows, columns = (p % axis.window for p, axis in zip(positions, axes, strict=True))
    return (rows[:, None, :, None] + (columns << 16)[None, :, None, :]).flatten(2).flatten(0, 1)


@functools.lru_cache(maxsize=256)
def tiling(axes: tuple[AnyAxis, ...], keys_hold: bool, device: torch.device, extra: int = 0) -> Tiling:
    """Tiles of queries that stream keys, or, with `keys_hold`, tiles of keys that stream the queries that see them.

    With `extra`, every tile meets so many more columns, which are not in the tables.
    """
    with torch.device("cpu"), torch.inference_mode(False):
        relation = [spans(axis) for axis in axes]
        sizes = [int(s.key.amax()) + 1 for s in relation], [int(s.query.amax()) + 1 for s in relation]
        column_sizes, row_sizes = reversed(sizes) if keys_hold else sizes
        cuts = tile_plan([s.reversed() for s in relation] if keys_hold else relation, extra)
        rows = _outer([cut.query for cut in cuts], row_sizes)
        columns = _outer([cut.key for cut in cuts], column_sizes)
        kind, kinds = torch.zeros(1, dtype=torch.long), 1
        for cut in cuts:
            kind = (kind[:, None] * len(cut.pattern) + cut.kind).flatten()
            kinds *= len(cut.pattern)
        codes = None
        if all(isinstance(axis, Halo) for axis in axes):
            codes = _codes(axes, [cut.query_position if keys_hold else cut.key_position for cut in cuts])
        more = -columns.shape[1] % STEP
        columns = F.pad(columns, (0, more), value=NONE)
        if codes is not None and not keys_hold:
            codes = F.pad(codes, (0, more))
        first = F.pad(torch.bincount(kind, minlength=kinds).cumsum(0), (1, 0))
        members = torch.sort(kind, stable=True).indices
        moved = [x.to(device, torch.int32) for x in (rows, columns, kind, members, first)]
        return Tiling(*moved, cuts, None if codes is None else codes.to(device, torch.int32))


@functools.lru_cache(maxsize=256)
def regions(axes: tuple[Partition, Partition], device: torch.device) -> Tensor:
    """int32 [R, t] the token of every place of every region, OUTSIDE where there is none; regions row by row."""
    with torch.device("cpu"), torch.inference_mode(False):
        tokens = _outer([spans(axis).query for axis in axes], [axis.length for axis in axes])
        return tokens.clamp(min=OUTSIDE).to(device, torch.int32)
