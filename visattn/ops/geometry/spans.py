"""Every relation between queries and keys as intervals: per group of an axis, a query sees a run of key positions.

Both ends of the run grow with the query's position, so the queries that see a key are a run too: the relation can be
turned round. Kernels read nothing else: neither of the two directions needs to know which attention it is.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.geometry.arithmetic import ceil_div
from visattn.ops.geometry.blocks import Halo, Partition
from visattn.ops.geometry.sliding import Axis, window

OUTSIDE, NONE = -1, -2  # a place outside the map; no place at all


@dataclass(frozen=True)
class Whole:
    """One axis on which every query sees every key."""

    queries: int
    keys: int


@dataclass(frozen=True)
class Clipped:
    """One axis on which a query sees the at most `kernel_size` (odd) keys around it that exist."""

    length: int
    kernel_size: int


AnyAxis = Axis | Partition | Halo | Whole | Clipped


@dataclass(frozen=True)
class Spans:
    """One axis: `G` groups of `P` query positions and `K` key positions.

    Attributes:
        query: [G, P] token at a query position, OUTSIDE where there is none.
        key: [G, K] the same for keys.
        start, stop: [G, P] the query sees key positions [start, stop); both grow with the position.
        offset: Entry of a position table for equal positions.
        entries: How many entries the table has.
        sign: 1 if entries grow with key position - query position, -1 if with the opposite.
    """

    query: Tensor
    key: Tensor
    start: Tensor
    stop: Tensor
    offset: int = 0
    entries: int = 1
    sign: int = 1

    def reversed(self) -> Spans:
        """The same relation with keys in the role of queries."""
        position = torch.arange(self.key.shape[1]).expand_as(self.key).contiguous()
        edges = self.stop.contiguous(), self.start.contiguous()
        first, last = (torch.searchsorted(edge, position, right=True) for edge in edges)
        return Spans(self.key, self.query, first, last, self.offset, self.entries, -self.sign)

    def sees_all(self) -> bool:
        """Whether every query sees every key of its group."""
        return bool((self.stop - self.start == self.key.shape[1]).all())

    def cut(self, size: int) -> Cut:
        """Cut the queries of every group into tiles of `size`."""
        (groups, places), keys = self.query.shape, self.key.shape[1]
        more = -places % size
        query = F.pad(self.query, (0, more), value=OUTSIDE).view(-1, size)  # [T, t]
        edges = (torch.cat([x, x[:, -1:].expand(-1, more)], 1) for x in (self.start, self.stop))
        start, stop = (x.view(-1, size) for x in edges)  # [T, t]
        position = torch.arange(places + more).expand(groups, -1).reshape(-1, size)  # [T, t]
        group = torch.arange(groups).repeat_interleave((places + more) // size)  # [T]
        there = query >= 0
        tiles = there.any(1)
        query, start, stop, position = (x[tiles] for x in (query, start, stop, position))
        group, there = group[tiles], there[tiles]
        first = start.masked_fill(~there, keys).amin(1)
        union = max(1, int((stop.masked_fill(~there, 0).amax(1) - first).amax()))
        first = first.clamp(max=max(keys - union, 0))
        place = first[:, None] + torch.arange(union)  # [T, U]
        key = self.key[group[:, None], place.clamp(max=keys - 1)]
        key = key.masked_fill(place >= keys, NONE)  # [T, U]
        if self.entries == 1 and self.sees_all():
            pattern = torch.zeros(1, 1, 1, dtype=torch.long).expand(1, size, union)
            kind = torch.zeros(len(query), dtype=torch.long)
            return Cut(query, key, position, place, pattern, kind, False)
        visible = (place[:, None] >= start[..., None]) & (place[:, None] < stop[..., None])
        entry = self.sign * (place[:, None] - position[..., None]) + self.offset  # [T, t, U]
        entry = entry.clamp(0, self.entries - 1).masked_fill(~visible, -1)
        masked = bool((~visible & there[..., None] & (key != NONE)[:, None]).any())
        pattern, kind = torch.unique(entry, dim=0, return_inverse=True)
        return Cut(query, key, position, place, pattern, kind, masked)


@dataclass(frozen=True)
class Cut:
    """An axis cut into `T` tiles of `t` queries, each with the `U` keys that hold the runs of all of them.

    Attributes:
        query: [T, t] tokens, negative where there is none.
        key: [T, U] tokens, OUTSIDE or NONE where there is none.
        query_position, key_position: [T, t] and [T, U].
        pattern: [C, t, U] the C different tiles: the entry of a position table for each pair, -1 if it is not visible.
        kind: [T] which of them a tile is.
        masked: Whether a query and a key of the same tile do not see each other.
    """

    query: Tensor
    key: Tensor
    query_position: Tensor
    key_position: Tensor
    pattern: Tensor
    kind: Tensor
    masked: bool


def _rank(length: int) -> Tensor:
    return torch.arange(length)[None]


@functools.singledispatch
def spans(axis: AnyAxis) -> Spans:
    """The relation of one axis; key positions of a `Halo` begin `halo` places before the map."""
    raise TypeError(f"expected a geometry of one axis, got {type(axis).__name__}")


@spans.register
def _(axis: Axis) -> Spans:
    group, position = _rank(axis.dilation).mT, _rank(ceil_div(axis.length, axis.dilation))
    token = position * axis.dilation + group
    token = token.masked_fill(token >= axis.length, OUTSIDE)
    start, stop = window(position, (token >= 0).sum(1, keepdim=True), axis)
    start, stop = (x.expand_as(token) for x in (start, stop))
    return Spans(token, token, start, stop, axis.kernel_size - 1, 2 * axis.kernel_size - 1)


@spans.register
def _(axis: Partition) -> Spans:
    windows, slots, _ = axis.layout()
    token = torch.full((windows, slots), OUTSIDE)
    token[axis.place()] = torch.arange(axis.length)
    start, stop = torch.zeros_like(token), torch.full_like(token, slots)
    return Spans(token, token, start, stop, axis.window - 1, 2 * axis.window - 1)


@spans.register
def _(axis: Halo) -> Spans:
    key = _rank(axis.blocks * axis.block + 2 * axis.halo) - axis.halo
    key = key.masked_fill((key < 0) | (key >= axis.length), OUTSIDE)
    query = _rank(axis.queries)
    start = query // axis.queries_per_block * axis.block
    return Spans(query, key, start, start + axis.window)


@spans.register
def _(axis: Whole) -> Spans:
    query = _rank(axis.queries)
    start, stop = torch.zeros_like(query), torch.full_like(query, axis.keys)
    return Spans(query, _rank(axis.keys), start, stop)


@spans.register
def _(axis: Clipped) -> Spans:
    token, reach = _rank(axis.length), axis.kernel_size // 2
    start, stop = (token - reach).clamp(min=0), (token + reach + 1).clamp(max=axis.length)
    return Spans(token, token, start, stop, reach, axis.kernel_size)


def padded_rows(number: int) -> int:
    """Rows of a tile in blocks of 64, or one block of 16 or 32."""
    return 16 if number <= 16 else 32 if number <= 32 else ceil_div(number, 64) * 64


def _even(length: int, size: int) -> int:
    return ceil_div(length, ceil_div(length, size))


def tile_plan(axes: Sequence[Spans], extra: int = 0) -> tuple[Cut, ...]:
    """Cut all axes into the tiles that cost least: pairs of a padded tile, and loads of its keys for every 64 rows.

    Keys come in steps of 16, 32 or 64. A key that is loaded counts as 64 pairs, and so does each of 64 rows once; every
    tile meets `extra` more keys. Larger tiles win ties.
    """
    options: list[list[tuple[int, Cut]]] = []
    for axis in axes:
        longest = axis.query.shape[1]
        sizes = sorted({_even(longest, 2**n) for n in range(8)} | {longest}, reverse=True)
        if axis.sees_all():
            sizes = [longest]  # nothing to gain
        options.append([(size, axis.cut(size)) for size in sizes if size <= 128 or size == longest])

    def cost(cuts: Sequence[Cut]) -> int:
        tiles = math.prod(len(c.query) for c in cuts)
        rows = padded_rows(math.prod(c.query.shape[1] for c in cuts))
        keys = padded_rows(math.prod(c.key.shape[1] for c in cuts)) + extra
        blocks = ceil_div(rows, 64)
        return tiles * (keys * (rows + 64 * blocks) + 64 * 64 * blocks)

    choices = itertools.product(*options)
    return min((tuple(cut for _, cut in choice) for choice in choices), key=cost)
