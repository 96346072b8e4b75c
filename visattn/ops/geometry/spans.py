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
from torch import Tensor

from visattn.ops.geometry.arithmetic import ceil_div
from visattn.ops.geometry.blocks import Halo, Partition
from visattn.ops.geometry.sliding import Axis, window

OUTSIDE, NONE = -1, -2  # a place outside the map; no place at all
_CPU = torch.device("cpu")  # said in every call: a context would cost more than the calls


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


@dataclass(frozen=True, eq=False)
class Spans:
    """One axis: `G` groups of `P` query positions and `K` key positions; the tokens of a group lie together.

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
        position = torch.arange(self.key.shape[1], device=_CPU).expand_as(self.key).contiguous()
        edges = self.stop.contiguous(), self.start.contiguous()
        first, last = (torch.searchsorted(edge, position, right=True) for edge in edges)
        return Spans(self.key, self.query, first, last, self.offset, self.entries, -self.sign)

    @functools.cached_property
    def held(self) -> tuple[Tensor, Tensor, range]:
        """Where the tokens of queries lie: [G, 1] the first position and the one after the last, and of all groups."""
        there = self.query >= 0
        first = there.long().argmax(1, keepdim=True)
        last = first + there.sum(1, keepdim=True)
        return first, last, range(int(first.amin()), int(last.amax()))

    @functools.cached_property
    def sees_all(self) -> bool:
        """Whether every query sees every key of its group."""
        return bool((self.stop - self.start == self.key.shape[1]).all())

    @functools.cached_property
    def options(self) -> list[tuple[int, int, int, int]]:
        """Ways to cut the queries, larger tiles first: size, position of the first tile, tiles, and keys of each.

        Tiles begin with the first token, or with the multiple of their size before it: blocks begin there.
        """
        first, last, held = self.held
        even = {ceil_div(len(held), ceil_div(len(held), 2**n)) for n in range(8)}
        sizes = sorted({n for n in even if n <= 128} | {len(held)}, reverse=True)
        if self.sees_all:
            sizes = sizes[:1]  # nothing to gain
        cuts = [
            (n, begin)
            for n in sizes
            for begin in sorted({held.start, held.start // n * n}, reverse=True)
        ]
        begins = [torch.arange(begin, held.stop, n, device=_CPU) for n, begin in cuts]
        begin, end = (
            torch.cat(begins),
            torch.cat([x + n for x, (n, _) in zip(begins, cuts, strict=True)]),
        )
        begin, end = torch.maximum(begin, first), torch.minimum(end, last)  # [G, tiles of all]
        union = self.stop.gather(1, (end - 1).clamp(min=0)) - self.start.gather(
            1, begin.clamp(max=held.stop - 1)
        )
        there = begin < end
        tiles, keys = iter(there.sum(0).tolist()), iter((union * there).amax(0).tolist())
        return [
            (*cut, sum(itertools.islice(tiles, len(x))), max(1, *itertools.islice(keys, len(x))))
            for cut, x in zip(cuts, begins, strict=True)
        ]

    def cut(self, size: int, begin: int = 0) -> Cut:
        """Cut the queries of every group into tiles of `size` from a position on; tiles without any are left out."""
        first, last, held = self.held
        position = torch.arange(
            begin, begin + ceil_div(held.stop - begin, size) * size, device=_CPU
        )
        position = position.view(-1, size)  # [n, t]
        there = (position >= first[..., None]) & (position < last[..., None])  # [G, n, t]
        group, tile = there.any(2).nonzero(as_tuple=True)  # [T]
        there, position, group = there[group, tile], position[tile], group[:, None]
        last_place = position.clamp(max=self.query.shape[1] - 1)  # [T, t]
        query, start, stop = (x[group, last_place] for x in (self.query, self.start, self.stop))
        query = query.masked_fill(~there, OUTSIDE)
        keys = self.key.shape[1]
        low = start.masked_fill(~there, keys).amin(1)
        union = max(1, int((stop.masked_fill(~there, 0).amax(1) - low).amax()))
        low = low.clamp(max=max(keys - union, 0))
        place = low[:, None] + torch.arange(union, device=_CPU)  # [T, U]
        key = self.key[group, place.clamp(max=keys - 1)].masked_fill(place >= keys, NONE)
        if self.entries == 1 and self.sees_all:
            pattern = query.new_zeros(1, 1, 1).expand(1, size, union)
            return Cut(query, key, position, place, pattern, torch.zeros_like(low), False)
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
    return torch.arange(length, device=_CPU)[None]


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
    token = torch.full((windows, slots), OUTSIDE, device=_CPU)
    token[axis.place(_CPU)] = _rank(axis.length)
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


@functools.lru_cache(maxsize=4096)
def relation(axis: AnyAxis, keys_hold: bool = False) -> Spans:
    """`spans`, with `keys_hold` reversed, kept."""
    return spans(axis).reversed() if keys_hold else spans(axis)


@functools.lru_cache(maxsize=4096)
def _cut(axis: AnyAxis, keys_hold: bool, size: int, begin: int) -> Cut:
    return relation(axis, keys_hold).cut(size, begin)


def tile_plan(axes: Sequence[AnyAxis], keys_hold: bool = False, extra: int = 0) -> tuple[Cut, ...]:
    """Cut all axes into the tiles that cost least: pairs of a padded tile, and loads of its keys for every 64 rows.

    Keys come in steps of 16, 32 or 64. A key that is loaded counts as 64 pairs, and so does each of 64 rows once; every
    tile meets `extra` more keys. Larger tiles win ties.
    """

    def cost(choice: Sequence[tuple[int, int, int, int]]) -> int:
        held, _, tiles, met = (math.prod(numbers) for numbers in zip(*choice, strict=True))
        rows, keys = padded_rows(held), padded_rows(met) + extra
        blocks = ceil_div(rows, 64)
        return tiles * (keys * (rows + 64 * blocks) + 64 * 64 * blocks)

    best = min(itertools.product(*(relation(axis, keys_hold).options for axis in axes)), key=cost)
    return tuple(_cut(axis, keys_hold, *how[:2]) for axis, how in zip(axes, best, strict=True))
