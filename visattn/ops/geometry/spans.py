"""Every relation between queries and keys as intervals: per group of an axis, a query sees a run of key positions.

Both ends of the run grow with the query's position, so the queries that see a key are a run too: the relation can be
turned round. Kernels read nothing else: neither of the two directions needs to know which attention it is.
"""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from visattn.ops.geometry.arithmetic import ceil_div

OUTSIDE, NONE = -1, -2  # a place outside the map; no place at all
CPU = torch.device("cpu")  # said in every call: a context would cost more than the calls
_keep = functools.lru_cache(maxsize=4096)  # layers and sizes of maps have axes in common


class AnyAxis:
    """Which keys a query sees on one axis; subclasses are frozen dataclasses of ints.

    To define one is enough: the kernels take it, and it passes through custom ops as its `code` and its fields.
    """

    kinds: ClassVar[dict[int, Callable[..., AnyAxis]]] = {}
    code: ClassVar[int]

    def __init_subclass__(cls) -> None:
        name = f"{cls.__module__}.{cls.__qualname__}"
        cls.code = zlib.crc32(name.encode())  # the same in every process
        AnyAxis.kinds[cls.code] = cls

    def spans(self) -> Spans:
        """The relation on the CPU, whatever the caller's default device is."""
        raise NotImplementedError


@dataclass(frozen=True)
class Whole(AnyAxis):
    """One axis on which every query sees every key."""

    queries: int
    keys: int

    def spans(self) -> Spans:
        query = ranks(self.queries)
        return Spans(
            query, ranks(self.keys), torch.zeros_like(query), torch.full_like(query, self.keys)
        )


@dataclass(frozen=True)
class Clipped(AnyAxis):
    """One axis on which a query sees the at most `kernel_size` (odd) keys around it that exist."""

    length: int
    kernel_size: int

    def spans(self) -> Spans:
        token, reach = ranks(self.length), self.kernel_size // 2
        start, stop = (token - reach).clamp(min=0), (token + reach + 1).clamp(max=self.length)
        return Spans(token, token, start, stop, reach, self.kernel_size)


def ranks(length: int) -> Tensor:
    """[1, length] tokens or positions in their order."""
    return torch.arange(length, device=CPU)[None]


class Cut(NamedTuple):
    """An axis cut into `T` tiles of `t` queries, each with the `U` keys that hold the runs of all of them."""

    query: Tensor  # [T, t] tokens, OUTSIDE where there is none
    key: Tensor  # [T, U] tokens, OUTSIDE or NONE where there is none
    query_position: Tensor  # [T, t]
    key_position: Tensor  # [T, U]
    pattern: Tensor  # [C, t, U] the C different tiles: entries of a position table, -1 for pairs that are not visible
    kind: Tensor  # [T] which of them a tile is
    masked: bool  # whether a query and a key of the same tile do not see each other


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
        window: With decomposed relative positions, how many lanes there are, else 0; a key position's is the remainder.
        terms: [window, queries] which of a query's 2 * window - 1 relative terms each lane is.
    """

    query: Tensor
    key: Tensor
    start: Tensor
    stop: Tensor
    offset: int = 0
    entries: int = 1
    sign: int = 1
    window: int = 0
    terms: Tensor | None = None

    def reversed(self) -> Spans:
        """The same relation with keys in the role of queries."""
        position = ranks(self.key.shape[1]).expand_as(self.key).contiguous()
        edges = self.stop.contiguous(), self.start.contiguous()
        start, stop = (torch.searchsorted(edge, position, right=True) for edge in edges)
        return replace(
            self, query=self.key, key=self.query, start=start, stop=stop, sign=-self.sign
        )

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
        found = [(n, held.start) for n in sizes] + [
            (n, held.start // n * n) for n in sizes if held.start % n
        ]
        begins = [torch.arange(begin, held.stop, n, device=CPU) for n, begin in found]
        ends = [begin + n for begin, (n, _) in zip(begins, found, strict=True)]
        begin, end = torch.maximum(torch.cat(begins), first), torch.minimum(torch.cat(ends), last)
        there = begin < end  # [G, tiles of all]
        begin, end = begin.clamp(max=held.stop - 1), (end - 1).clamp(min=0)
        union = (self.stop.gather(1, end) - self.start.gather(1, begin)) * there
        tiles, keys = iter(there.sum(0).tolist()), iter(union.amax(0).tolist())
        counts = [
            (sum(itertools.islice(tiles, len(x))), max(1, *itertools.islice(keys, len(x))))
            for x in begins
        ]
        return sorted(((*how, *n) for how, n in zip(found, counts, strict=True)), reverse=True)

    @_keep
    def cut(self, size: int, begin: int = 0) -> Cut:
        """Cut the queries of every group into tiles of `size` from a position on; tiles without any are left out."""
        first, last, held = self.held
        number = ceil_div(held.stop - begin, size)
        position = begin + ranks(number * size).view(number, size)  # [n, t]
        there = (position >= first[..., None]) & (position < last[..., None])  # [G, n, t]
        group, tile = there.any(2).nonzero(as_tuple=True)  # [T]
        there, position, group = there[group, tile], position[tile], group[:, None]
        known = position.clamp(max=self.query.shape[1] - 1)  # [T, t]
        query, start, stop = (x[group, known] for x in (self.query, self.start, self.stop))
        query, keys = query.masked_fill(~there, OUTSIDE), self.key.shape[1]
        low = start.masked_fill(~there, keys).amin(1)
        union = max(1, int((stop.masked_fill(~there, 0).amax(1) - low).amax()))
        place = low.clamp(max=max(keys - union, 0))[:, None] + ranks(union)  # [T, U]
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


def padded_rows(number: int) -> int:
    """Rows of a tile in blocks of 64, or one block of 16 or 32."""
    return 16 if number <= 16 else 32 if number <= 32 else ceil_div(number, 64) * 64


@_keep
def relation(axis: AnyAxis, keys_hold: bool = False) -> Spans:
    """The spans of an axis, with `keys_hold` reversed."""
    return axis.spans().reversed() if keys_hold else axis.spans()


TOGETHER = 4  # tiles of 16 rows that a program holds


def tile_plan(
    axes: Sequence[AnyAxis], keys_hold: bool = False, extra: int = 0, few: bool = False
) -> tuple[Cut, ...]:
    """Cut all axes into the tiles that cost least; larger tiles win ties.

    In lane instructions of the compiled kernels, over 5: of a tile, of each of its keys, and of each pair. Keys come in
    steps of 16, 32 or 64; every tile meets `extra` more. With `few`, tiles of at most 16 rows are held together, each
    with its own keys.
    """

    def cost(choice: Sequence[tuple[int, int, int, int]]) -> int:
        held, _, tiles, met = (math.prod(numbers) for numbers in zip(*choice, strict=True))
        rows, keys = padded_rows(held), padded_rows(met) + extra
        if few and rows == 16:
            return tiles * (keys * 45 + 3300)
        blocks = ceil_div(rows, 64)
        return tiles * (keys * (rows + 64 * blocks) + 200 * 64 * blocks)

    best = min(itertools.product(*(relation(axis, keys_hold).options for axis in axes)), key=cost)
    how = zip(axes, best, strict=True)
    return tuple(relation(axis, keys_hold).cut(size, begin) for axis, (size, begin, _, _) in how)
