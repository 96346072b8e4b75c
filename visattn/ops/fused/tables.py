"""What the attention kernels read to find queries and keys: block masks, as tables of tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from visattn.ops.fused.launch import power_of_2
from visattn.ops.geometry import (
    NONE,
    OUTSIDE,
    AnyAxis,
    Axis,
    Clipped,
    Halo,
    Partition,
    Whole,
    ceil_div,
    interleave,
    outer_index,
    padded_rows,
    relation,
    spans,
    tile_plan,
)

_KINDS: tuple[type[AnyAxis], ...] = (Axis, Partition, Halo, Whole, Clipped)
CPU = torch.device("cpu")
STEP = 16  # columns of a tile are a multiple of this
MOST_LANES = 64  # of the product that hides what lies outside of rectangles


def hidden(dtype: torch.dtype) -> float:
    """What hides a pair in logits of a dtype: finite, so that products with zero are zero."""
    return -6e4 if dtype == torch.float16 else -1e30


def padded_columns(number: int) -> int:
    """A whole number of steps of any size that is worth a try for so many columns."""
    return max(16, power_of_2(number)) if number <= 64 else ceil_div(number, 128) * 128


def encode(axes: Sequence[AnyAxis]) -> list[int]:
    """Axes as ints, the form in which they pass through custom ops."""
    return list(_encode(tuple(axes)))


@functools.lru_cache(maxsize=4096)
def _encode(axes: tuple[AnyAxis, ...]) -> list[int]:
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
        make: Any = _KINDS[kind]
        axes.append(make(*rest[:number]))
        rest = rest[number:]
    return tuple(axes)


def _outer(per_axis: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """int32 [T, n] row-major token of the product of axes [T_a, n_a]; the smallest negative mark of any axis wins."""
    per_axis = [x.to(torch.int32) for x in per_axis]
    index = outer_index([x.clamp(min=0) for x in per_axis], sizes)
    if not any((x < 0).any() for x in per_axis):
        return index
    mark = per_axis[0].clamp(max=0)
    for values in per_axis[1:]:
        mark = torch.minimum(mark[:, None, :, None], values.clamp(max=0)[None, :, None, :])
        mark = mark.flatten(2).flatten(0, 1)
    return torch.where(mark < 0, mark, index)


class Lookup:
    """An index into an axis of `number` entries, `number` itself for none, with a gradient that is summed in one order.

    The order of `index_add` on a GPU is another in every run. `index` is on the CPU, where all is found out that has to
    be known about it; a device only gets copies, once.
    """

    def __init__(self, index: Tensor, number: int, device: torch.device) -> None:
        self.shape, self.number, self.device = index.shape, number, device
        self._values = index.flatten()
        self.index = self._values.to(device)

    @functools.cached_property
    def places(self) -> Tensor:
        """[number, most] where each entry stands in the flattened index, filled up with the index's length."""
        counts = torch.bincount(self._values, minlength=self.number + 1).tolist()
        places = torch.argsort(self._values, stable=True).split(counts)[: self.number]
        return pad_sequence(list(places), True, len(self._values)).to(self.device)

    def read(self, x: Tensor, none: float = 0.0) -> Tensor:
        """[..., number] -> [..., *index], `none` where the index is no entry."""
        x = F.pad(x, (0, 1), value=none)
        return x.index_select(-1, self.index).unflatten(-1, self.shape)

    def add(self, x: Tensor) -> Tensor:
        """Transpose of `read`: [..., *index] -> [..., number]."""
        leading = x.shape[: -len(self.shape)]
        lines = F.pad(x.reshape(-1, len(self.index)), (0, 1))
        step = max(1, _MOST // self.places.numel())
        parts = [part.index_select(1, self.places.flatten()) for part in lines.split(step)]
        found = torch.cat([part.unflatten(1, self.places.shape).sum(2) for part in parts])
        return found.view(*leading, self.number)


_MOST = 1 << 26  # numbers that `Lookup.add` gathers at a time


@dataclass(frozen=True)
class BlockMask:
    """Tiles of rows and the columns that each of them meets; rows are queries and columns keys, or the reverse.

    Attributes:
        rows: int32 [T, M] tokens, negative where there is none; M is a whole number of blocks of rows.
        columns: int32 [T, U] tokens, OUTSIDE or NONE where there is none; U is a multiple of `STEP`.
        kind: int32 [T] which of the `kinds` different tiles a tile is.
        members: int32 [T] tiles in the order of their kinds.
        counts: How many tiles there are of each kind.
        codes: int32 of the side that holds the keys of halos, row position + 65536 * column position, each modulo the
            window.
        patterns: On the CPU, per axis [C, t, U] the entry of a position table for each pair, -1 where not visible.
        entries: Of a position table per axis.
        masked: Whether some row and column of a tile do not see each other.
        has_holes: Whether some column is a place outside the map.
    """

    rows: Tensor
    columns: Tensor
    kind: Tensor
    members: Tensor
    codes: Tensor | None
    patterns: tuple[Tensor, ...]
    entries: tuple[int, ...]
    counts: tuple[int, ...]
    masked: bool
    has_holes: bool

    @functools.cached_property
    def _parts(self) -> dict[tuple[int, int], tuple[Tensor, list[int]]]:
        return {}

    def parts(self, images: int, number: int) -> tuple[Tensor, list[int]]:
        """The tiles of all images in about `number` equal parts of one kind each, and how many parts a kind has.

        Parts are int32 [parts, 4]: kind, first of its tiles in `members`, start and stop among their images.
        """
        if (images, number) not in self._parts:
            size, parts, first, numbers = ceil_div(sum(self.counts) * images, number), [], 0, []
            for kind, count in enumerate(self.counts):
                starts = range(0, count * images, size)
                parts += [
                    (kind, first, start, min(start + size, count * images)) for start in starts
                ]
                numbers.append(len(starts))
                first += count
            found = torch.tensor(parts, dtype=torch.int32, device=CPU).to(self.rows.device)
            self._parts[images, number] = found, numbers
        return self._parts[images, number]

    @functools.cached_property
    def lookup(self) -> Lookup:
        """[kinds, M, U] into a flattened position table."""
        axes = len(self.patterns)
        index = hidden = torch.zeros((1,) * (1 + 3 * axes), dtype=torch.int64, device=CPU)
        for a, (pattern, number) in enumerate(zip(self.patterns, self.entries, strict=True)):
            pattern = pattern.view((1,) * (1 + 3 * a) + pattern.shape + (1,) * (3 * (axes - 1 - a)))
            index, hidden = index * number + pattern, hidden + (pattern < 0)
        number = math.prod(self.entries)
        index = interleave(index.masked_fill(hidden > 0, number), axes).squeeze(1)
        return Lookup(self.pad(index, number), number, self.rows.device)

    @functools.cached_property
    def width(self) -> int:
        """Columns of position tiles."""
        return padded_columns(self.columns.shape[1])

    @functools.cached_property
    def _lanes(self) -> dict[torch.dtype, tuple[Tensor, Tensor]]:
        return {}

    def lanes(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """hidden [kinds, M, R] and spread [width, R], whose product hides what is not visible; None if R were large.

        A column has a one in a lane per axis, and each row sees a run of lanes of each axis; so one that is in all of
        them lies in the row's rectangle. The last lane is that of columns which are not there.
        """
        sizes = [pattern.shape[2] for pattern in self.patterns]
        number = max(16, power_of_2(sum(sizes) + 1))
        if number > MOST_LANES:
            return None
        if dtype not in self._lanes:
            rows, columns, device = [], [], CPU
            for a, (pattern, size) in enumerate(zip(self.patterns, sizes, strict=True)):
                shape = [1] * (2 * len(sizes) + 1)
                shape[2 * a], shape[2 * a + 1], shape[-1] = pattern.shape
                rows.append((pattern < 0).view(shape))
                lane = torch.eye(size, dtype=torch.bool, device=device)
                columns.append(
                    lane.view([size if i == a else 1 for i in range(len(sizes))] + [size])
                )
            whole = [max(n) for n in zip(*(x.shape[:-1] for x in rows), strict=True)]
            rows = torch.cat(
                [x.expand(*whole, -1) for x in rows], -1
            )  # [C_1, t_1, C_2, t_2, ..., sum of U_a]
            axes = range(0, 2 * len(sizes), 2)
            rows = (
                rows.permute(*axes, *(a + 1 for a in axes), -1)
                .flatten(len(sizes), -2)
                .flatten(0, len(sizes) - 1)
            )
            columns = torch.cat([x.expand(*sizes, -1) for x in columns], -1).flatten(0, -2)
            more = number - rows.shape[2]
            rows = F.pad(
                F.pad(rows, (0, more), value=True), (0, 0, 0, self.rows.shape[1] - rows.shape[1])
            )
            none = F.pad(
                torch.zeros(self.width - len(columns), number - 1, dtype=torch.bool, device=device),
                (0, 1),
                value=True,
            )
            columns = torch.cat([F.pad(columns, (0, more)), none]).to(dtype)
            rows = rows.to(dtype) * hidden(dtype)
            self._lanes[dtype] = rows.to(self.rows.device), columns.to(self.rows.device)
        return self._lanes[dtype]

    @functools.cached_property
    def masks(self) -> dict[torch.dtype, Tensor]:
        """Per dtype [1, kinds, M, width]: 0 for pairs that are visible; made when asked for."""
        return {}

    def mask(self, dtype: torch.dtype) -> Tensor:
        """The position tiles of a call without a position table."""
        if dtype not in self.masks:
            self.masks[dtype] = self.position_tiles(
                self.rows.new_zeros((1, *self.entries), dtype=dtype)
            )
        return self.masks[dtype]

    def position_tiles(self, table: Tensor) -> Tensor:
        """[N, kinds, M, width] what logits get: the position table [N, entries per axis], or what hides."""
        return self.lookup.read(table.flatten(1), hidden(table.dtype))

    def position_gradient(self, grad: Tensor) -> Tensor:
        """[N, entries per axis] from the gradient [N, kinds, M, width] of `position_tiles`, summed in one order."""
        return self.lookup.add(grad).unflatten(1, self.entries)

    def pad(self, tiles: Tensor, value: float) -> Tensor:
        """[..., M, width] from fewer rows and columns."""
        more = self.rows.shape[1] - tiles.shape[-2], self.width - tiles.shape[-1]
        return F.pad(tiles, (0, more[1], 0, more[0]), value=value).contiguous()


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, lookup: Lookup) -> Tensor:
        return lookup.read(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.lookup = inputs[1]

    @staticmethod
    # pyrefly: ignore[bad-override]: as many gradients as forward has results
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.lookup.add(grad), None


def select(x: Tensor, lookup: Lookup) -> Tensor:
    """`Lookup.read` of the last axis, differentiable."""
    return _Select.apply(x, lookup)


def _codes(axes: Sequence[Halo], positions: Sequence[Tensor]) -> Tensor:
    """[T, n] of two axes of halos."""
    rows, columns = (p % axis.window for p, axis in zip(positions, axes, strict=True))
    return (rows[:, None, :, None] + (columns << 16)[None, :, None, :]).flatten(2).flatten(0, 1)


def pad_rows(tokens: Tensor) -> Tensor:
    """[T, M] whole blocks of rows."""
    number = padded_rows(tokens.shape[1])
    number = number if number <= 64 else ceil_div(number, 128) * 128
    return F.pad(tokens, (0, number - tokens.shape[1]), value=NONE)


@functools.lru_cache(maxsize=4096)
def block_mask(
    axes: tuple[AnyAxis, ...], keys_hold: bool, device: torch.device, extra: int = 0
) -> BlockMask:
    """Tiles of queries that stream keys, or, with `keys_hold`, tiles of keys that stream the queries that see them.

    With `extra`, every tile meets so many more columns, which are not in the tables.
    """
    with torch.inference_mode(False):
        relations = [relation(axis, keys_hold) for axis in axes]
        cuts = tile_plan(axes, keys_hold, extra)
        rows = _outer([cut.query for cut in cuts], [int(s.query.amax()) + 1 for s in relations])
        columns = _outer([cut.key for cut in cuts], [int(s.key.amax()) + 1 for s in relations])
        kind, kinds = torch.zeros(1, dtype=torch.long, device=CPU), 1
        for cut in cuts:
            kind = (kind[:, None] * len(cut.pattern) + cut.kind).flatten()
            kinds *= len(cut.pattern)
        codes = None
        halos = [axis for axis in axes if isinstance(axis, Halo)]
        if len(halos) == len(axes):
            codes = _codes(
                halos, [cut.query_position if keys_hold else cut.key_position for cut in cuts]
            )
        rows, columns = pad_rows(rows), F.pad(columns, (0, -columns.shape[1] % STEP), value=NONE)
        if codes is not None:
            codes = F.pad(codes, (0, (rows if keys_hold else columns).shape[1] - codes.shape[1]))
        members = torch.sort(kind, stable=True).indices
        counts = torch.bincount(kind, minlength=kinds).tolist()
        rows, columns, kind, members = (
            x.to(device, torch.int32) for x in (rows, columns, kind, members)
        )
        return BlockMask(
            rows,
            columns,
            kind,
            members,
            None if codes is None else codes.to(device, torch.int32),
            patterns=tuple(cut.pattern for cut in cuts),
            entries=tuple(s.entries for s in relations),
            counts=tuple(counts),
            masked=any(cut.masked for cut in cuts),
            has_holes=any(bool((cut.key == OUTSIDE).any()) for cut in cuts),
        )


@functools.lru_cache(maxsize=4096)
def regions(axes: tuple[Partition, Partition], device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 [R, M] and [R, t] the token of every place of every region, negative where there is none; row by row."""
    with torch.inference_mode(False):
        tokens = _outer([spans(axis).query for axis in axes], [axis.length for axis in axes]).clamp(
            min=OUTSIDE
        )
        return pad_rows(tokens).to(device), tokens.to(device)
