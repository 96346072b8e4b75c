"""What the attention kernels read to find queries and keys: block masks, as tables of tokens.

All is found out on the CPU; a device only gets copies, once, and nothing waits for it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from visattn.ops.fused.launch import power_of_2
from visattn.ops.geometry import (
    CPU,
    NONE,
    OUTSIDE,
    TOGETHER,
    AnyAxis,
    Partition,
    ceil_div,
    interleave,
    outer_index,
    padded_rows,
    relation,
    tile_plan,
)

STEP = 16  # columns of a tile are a multiple of this
MOST_LANES = 64  # of the product that hides what lies outside of rectangles
_MOST = 1 << 26  # numbers that `Lookup.add` gathers at a time
_keep = functools.lru_cache(
    maxsize=4096
)  # sizes of maps in training are many, and a miss costs about a millisecond


def hidden(dtype: torch.dtype) -> float:
    """What hides a pair in logits of a dtype: finite, so that products with zero are zero."""
    return -6e4 if dtype == torch.float16 else -1e30


def tile_unit(dtype: torch.dtype) -> float:
    """Of position tiles: what hides is more than float16 holds, since logits are."""
    return 256.0 if dtype == torch.float16 else 1.0


def padded_columns(number: int) -> int:
    """A whole number of steps of any size that is worth a try for so many columns."""
    return max(16, power_of_2(number)) if number <= 64 else ceil_div(number, 128) * 128


def encode(axes: Sequence[AnyAxis]) -> list[int]:
    """Axes as ints, the form in which they pass through custom ops."""
    return list(_encode(tuple(axes)))


@functools.lru_cache(maxsize=4096)
def _encode(axes: tuple[AnyAxis, ...]) -> list[int]:
    fields = [[int(x) for x in vars(axis).values()] for axis in axes]
    return [n for axis, x in zip(axes, fields, strict=True) for n in (axis.code, len(x), *x)]


def decode(code: Sequence[int]) -> tuple[AnyAxis, ...]:
    """Inverse of `encode`."""
    rest = iter(code)
    return tuple(AnyAxis.kinds[kind](*itertools.islice(rest, next(rest))) for kind in rest)


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


def _side_by_side(per_axis: Sequence[Tensor]) -> Tensor:
    """[sum of n_a, *of all axes] from [n_a, *of an axis], which has the same numbers all along the others."""
    shapes, found = [x.shape[1:] for x in per_axis], []
    for a, x in enumerate(per_axis):
        shape = [n if i == a else 1 for i, sizes in enumerate(shapes) for n in sizes]
        found.append(x.reshape(-1, *shape).expand(-1, *itertools.chain(*shapes)))
    return torch.cat(found)


class Lookup:
    """An index into an axis of `number` entries, `number` itself for none, with a gradient that is summed in one order.

    The order of `index_add` on a GPU is another in every run.
    """

    def __init__(self, index: Tensor, number: int, device: torch.device) -> None:
        self.shape, self.number, self.device = index.shape, number, device
        self._values = index.flatten()  # on the CPU
        self.index = self._values.to(device)

    @functools.cached_property
    def places(self) -> Tensor:
        """[number, most] where each entry stands in the flattened index, filled up with the index's length."""
        counts = torch.bincount(self._values, minlength=self.number + 1).tolist()
        places = torch.argsort(self._values, stable=True).split(counts)[: self.number]
        return pad_sequence(list(places), True, len(self._values)).to(self.device)

    def read(self, x: Tensor, none: float = 0.0) -> Tensor:
        """[..., number] -> [..., *index], `none` where the index is no entry."""
        return F.pad(x, (0, 1), value=none).index_select(-1, self.index).unflatten(-1, self.shape)

    def add(self, x: Tensor) -> Tensor:
        """Transpose of `read`: [..., *index] -> [..., number]."""
        leading = x.shape[: -len(self.shape)]
        lines = F.pad(x.reshape(-1, len(self.index)), (0, 1))
        step = max(1, _MOST // self.places.numel())
        parts = [part.index_select(1, self.places.flatten()) for part in lines.split(step)]
        found = torch.cat([part.unflatten(1, self.places.shape).sum(2) for part in parts])
        return found.view(*leading, self.number)


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


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Tiles of rows and the columns that each of them meets; rows are queries and columns keys, or the reverse.

    Attributes:
        rows: int32 [T, M] tokens, negative where there is none; M is a whole number of blocks of rows.
        columns: int32 [T, U] tokens, OUTSIDE or NONE where there is none; U is a multiple of `STEP`.
        kind: int32 [T] which of the `kinds` different tiles a tile is.
        members: int32 [sum(counts) * together] tiles in the order of their kinds, NONE where groups are not full.
        counts: How many groups of `together` tiles there are of each kind.
        codes: With decomposed relative positions, int32 of the side that holds the keys, [T, M] or [T, U]: lane of the
            rows' position + 65536 * that of the columns'; see `Spans.window`.
        patterns: On the CPU, per axis [C, t, U] the entry of a position table for each pair, -1 where not visible.
        entries: Of a position table per axis.
        masked: Whether some row and column of a tile do not see each other.
        has_holes: Whether some column is a place outside the map.
        together: Tiles that a program holds, each with its own columns; T is a multiple of it.
    """

    rows: Tensor
    columns: Tensor
    kind: Tensor
    members: Tensor
    counts: tuple[int, ...]
    codes: Tensor | None
    patterns: tuple[Tensor, ...]
    entries: tuple[int, ...]
    masked: bool
    has_holes: bool
    together: int = 1

    @_keep
    def parts(self, images: int, number: int) -> tuple[Tensor, list[int]]:
        """The tiles of all images in about `number` equal parts of one kind each, and how many parts a kind has.

        Parts are int32 [parts, 4]: kind, first of its groups in `members`, start and stop among their images.
        """
        size, parts, first, numbers = ceil_div(sum(self.counts) * images, number), [], 0, []
        for kind, count in enumerate(self.counts):
            starts, most = range(0, count * images, size), count * images
            parts += [(kind, first, start, min(start + size, most)) for start in starts]
            numbers.append(len(starts))
            first += count
        return torch.tensor(parts, dtype=torch.int32, device=CPU).to(self.rows.device), numbers

    @functools.cached_property
    def lookup(self) -> Lookup:
        """[kinds, M, width] into a flattened position table."""
        axes, number = len(self.patterns), math.prod(self.entries)
        index = torch.zeros((1,) * (1 + 3 * axes), dtype=torch.int32, device=CPU)
        for a, pattern in enumerate(self.patterns):
            entry = pattern * math.prod(self.entries[a + 1 :])
            entry = entry.masked_fill(pattern < 0, -number).to(torch.int32)  # sums are negative
            index = index + entry.view(
                (1,) * (1 + 3 * a) + entry.shape + (1,) * (3 * (axes - 1 - a))
            )
        index = interleave(index.masked_fill(index < 0, number), axes).squeeze(1)
        return Lookup(self.pad(index, number), number, self.rows.device)

    @property
    def width(self) -> int:
        """Columns of position tiles."""
        return padded_columns(self.columns.shape[1])

    @_keep
    def lanes(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """hidden [kinds, M, R] and spread [width, R], whose product hides what is not visible; None if R were large.

        A column has a `tile_unit` in a lane per axis, and each row sees a run of lanes of each axis; so one that is in
        all of them lies in the row's rectangle. The last lane is that of columns which are not there.
        """
        sizes = [pattern.shape[2] for pattern in self.patterns]
        number = max(16, power_of_2(sum(sizes) + 1))
        if number > MOST_LANES:
            return None
        outside = _side_by_side([(pattern < 0).movedim(2, 0) for pattern in self.patterns])
        outside = interleave(outside, len(sizes)).permute(1, 2, 0)  # [kinds, rows, sum of U_a]
        at = _side_by_side([torch.eye(n, device=CPU) for n in sizes]).flatten(1).mT
        unseen = torch.ones(len(outside), outside.shape[1], number, device=CPU)
        unseen[..., : sum(sizes)] = outside
        unseen = F.pad(unseen, (0, 0, 0, self.rows.shape[1] - unseen.shape[1])) * hidden(dtype)
        spread = F.pad(at, (0, number - at.shape[1], 0, self.width - len(at)))
        spread[len(at) :, -1] = 1
        spread = spread * tile_unit(dtype)
        return unseen.to(self.rows.device, dtype), spread.to(self.rows.device, dtype)

    @_keep
    def mask(self, dtype: torch.dtype) -> Tensor:
        """The position tiles [1, kinds, M, width] of a call without a position table: 0 for pairs that are visible."""
        return self.position_tiles(self.rows.new_zeros((1, *self.entries), dtype=dtype))

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


def pad_rows(tokens: Tensor) -> Tensor:
    """[T, M] whole blocks of rows."""
    return F.pad(tokens, (0, padded_rows(tokens.shape[1]) - tokens.shape[1]), value=NONE)


@_keep
def block_mask(
    axes: tuple[AnyAxis, ...],
    keys_hold: bool,
    device: torch.device,
    extra: int = 0,
    few: bool = False,
) -> BlockMask:
    """Tiles of queries that stream keys, or, with `keys_hold`, tiles of keys that stream the queries that see them.

    With `extra`, every tile meets so many more columns, which are not in the tables; with `few`, tiles of few rows may
    be held together.
    """

    def put(x: Tensor) -> Tensor:
        return x.to(device, torch.int32)

    with torch.inference_mode(False):
        spans = [relation(axis, keys_hold) for axis in axes]
        cuts = tile_plan(axes, keys_hold, extra, few)
        rows = _outer([cut.query for cut in cuts], [int(s.query.amax()) + 1 for s in spans])
        columns = _outer([cut.key for cut in cuts], [int(s.key.amax()) + 1 for s in spans])
        rows, columns = pad_rows(rows), F.pad(columns, (0, -columns.shape[1] % STEP), value=NONE)
        kinds = [len(cut.pattern) for cut in cuts]
        kind = outer_index([cut.kind[:, None] for cut in cuts], kinds).flatten()
        codes = None
        if len(axes) <= 2 and all(s.window for s in spans):
            place = [cut.query_position if keys_hold else cut.key_position for cut in cuts]
            place = [
                p % s.window << 16 * a for a, (p, s) in enumerate(zip(place, spans, strict=True))
            ]
            codes = outer_index(place, [1] * len(axes))
            codes = F.pad(codes, (0, (rows if keys_hold else columns).shape[1] - codes.shape[1]))
            codes = put(codes)
        together = TOGETHER if few and rows.shape[1] == 16 and len(rows) >= TOGETHER else 1
        more = (0, 0, 0, -len(rows) % together)
        counts = torch.bincount(kind, minlength=math.prod(kinds)).tolist()
        members = torch.sort(kind, stable=True).indices.split(counts)
        members = torch.cat([F.pad(m, (0, -len(m) % together), value=NONE) for m in members])
        rows, columns = (F.pad(x, more, value=NONE) for x in (rows, columns))
        kind = F.pad(kind, more[2:])
        return BlockMask(
            put(rows),
            put(columns),
            put(kind),
            members=put(members),
            counts=tuple(ceil_div(count, together) for count in counts),
            together=together,
            codes=codes,
            patterns=tuple(cut.pattern for cut in cuts),
            entries=tuple(s.entries for s in spans),
            masked=any(cut.masked for cut in cuts),
            has_holes=any(bool((cut.key == OUTSIDE).any()) for cut in cuts),
        )


@_keep
def lane_terms(axes: tuple[AnyAxis, ...], device: torch.device) -> Tensor:
    """int16 [queries, R] which relative term of a query each lane is, -1 for none.

    Terms and lanes of both axes stand side by side, R / 2 lanes of each: a power of 2 from 8.
    """
    with torch.inference_mode(False):
        spans, found, first = [relation(axis) for axis in axes], [], 0
        half = max(8, *(power_of_2(s.window) for s in spans))
        for s in spans:
            terms = cast(Tensor, s.terms) + first
            found.append(F.pad(terms, (0, 0, 0, half - s.window), value=-1))
            first += 2 * s.window - 1
        return _side_by_side(found).flatten(1).mT.contiguous().to(device, torch.int16)


@_keep
def regions(axes: tuple[Partition, Partition], device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 [T, M] and [R, t] the token of every place of every region, negative where there is none; row by row."""
    with torch.inference_mode(False):
        tokens = _outer([relation(axis).query for axis in axes], [axis.length for axis in axes])
        rows = pad_rows(tokens)
        rows = F.pad(rows, (0, 0, 0, -len(rows) % TOGETHER), value=NONE)
        return rows.to(device, torch.int32), tokens.to(device, torch.int32)
