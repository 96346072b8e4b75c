"""Windows that do not slide.

Partitions cut an axis into windows that do not overlap: a token sees the tokens of its own window. Halos let the
queries of a block see its surroundings too.

Sources: Swin (arXiv:2103.14030), MaxViT (arXiv:2204.01697), HaloNet (arXiv:2103.12731).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from visattn.ops.geometry.arithmetic import ceil_div, is_symbolic
from visattn.ops.geometry.spans import CPU, OUTSIDE, AnyAxis, Spans, ranks


@dataclass(frozen=True)
class Partition(AnyAxis):
    """One axis cut into windows of at most `window` tokens.

    Attributes:
        length: Tokens on the axis.
        window: Tokens of a full window. Windows are consecutive runs of tokens; the last one may be shorter.
        shift: If not 0, the first window has only this many tokens (Swin's shifted windows).
        is_grid: Instead, a window takes tokens at equal distances over the whole axis (MaxViT's grid); there are
            `ceil(length / window)` of them.
    """

    length: int
    window: int
    shift: int = 0
    is_grid: bool = False

    def layout(self) -> tuple[int, int, int]:
        """(windows, slots of each, empty slots before the first token).

        With these empty slots and more at the end, the axis has windows x slots places: window-major for runs,
        slot-major for a grid. `slots` is below `window` when no window is full, unless the length is symbolic.
        """
        if is_symbolic(self.length):
            empty = 0 if self.is_grid else (self.window - self.shift) % self.window
            return ceil_div(self.length + empty, self.window), self.window, empty
        if self.is_grid:
            windows = ceil_div(self.length, self.window)
            return windows, ceil_div(self.length, windows), 0
        first = self.shift or self.window
        if self.length <= first:
            return 1, self.length, 0
        empty = self.window - first
        return ceil_div(self.length + empty, self.window), self.window, empty

    def place(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """The window [length] of each token and its rank [length] inside it."""
        windows, slots, empty = self.layout()
        token = torch.arange(self.length, device=device) + empty
        if self.is_grid:
            return token % windows, token // windows
        return token // slots, token % slots

    def occupied(self, device: torch.device | str | None = None) -> Tensor:
        """[windows, slots] whether a slot holds a token."""
        windows, slots, empty = self.layout()
        slot, window = (
            torch.arange(slots, device=device),
            torch.arange(windows, device=device)[:, None],
        )
        token = slot * windows + window if self.is_grid else window * slots + slot - empty
        return torch.logical_and(token >= 0, token < self.length)  # [windows, slots]

    def pairs(self) -> int:
        """How many (query, key) pairs see each other."""
        windows, slots, empty = self.layout()
        if self.is_grid:
            sizes = [len(range(i, self.length, windows)) for i in range(windows)]
        else:
            edges = [max(i * slots - empty, 0) for i in range(windows)] + [self.length]
            sizes = [b - a for a, b in itertools.pairwise(edges)]
        return sum(n * n for n in sizes)

    def spans(self) -> Spans:
        windows, slots, _ = self.layout()
        token = torch.full((windows, slots), OUTSIDE, device=CPU)
        token[self.place(CPU)] = torch.arange(self.length, device=CPU)
        start, stop = torch.zeros_like(token), torch.full_like(token, slots)
        return Spans(token, token, start, stop, self.window - 1, 2 * self.window - 1)


@dataclass(frozen=True)
class Halo(AnyAxis):
    """One axis cut into blocks of keys; the queries of a block see the window of the block and a halo on both sides.

    Attributes:
        length: Keys on the axis.
        block: Keys of a block; the last block may be shorter.
        halo: Keys that a window holds on each side of the block.
        stride: Keys per query; divides `block`.
    """

    length: int
    block: int
    halo: int
    stride: int = 1

    @property
    def window(self) -> int:
        """Slots of a window."""
        return self.block + 2 * self.halo

    @property
    def blocks(self) -> int:
        return ceil_div(self.length, self.block)

    @property
    def queries(self) -> int:
        """Queries on the axis."""
        return ceil_div(self.length, self.stride)

    @property
    def queries_per_block(self) -> int:
        return self.block // self.stride

    def clipped(self, spare: int = 0) -> Halo:
        """The same blocks with no more slots than keys lie in, but for `spare` of them after the last key."""
        block = min(self.block, ceil_div(self.length + spare, self.stride) * self.stride)
        halo = min(self.halo, (self.blocks - 1) * self.block + spare)
        return Halo(self.length, block, halo, self.stride)

    def key_index(self, device: torch.device | str | None = None) -> Tensor:
        """[blocks, window] key in each slot; outside [0, length) there is none."""
        first = torch.arange(self.blocks, device=device) * self.block - self.halo
        return first[:, None] + torch.arange(self.window, device=device)

    def displacement(self, device: torch.device | str | None = None) -> Tensor:
        """[queries_per_block, window] slot - query rank in the block + window - 1, in [0, 2 * window - 2]."""
        rank = torch.arange(self.queries_per_block, device=device)
        return torch.arange(self.window, device=device) - rank[:, None] + self.window - 1

    def pairs(self, mask_border: bool) -> int:
        """How many (query, slot) pairs take part."""
        if not mask_border:
            return self.queries * self.window
        starts = [i * self.block - self.halo for i in range(self.blocks)]
        keys = [min(start + self.window, self.length) - max(start, 0) for start in starts]
        return sum(keys[i // self.queries_per_block] for i in range(self.queries))

    def spans(self) -> Spans:
        """Key positions begin `halo` places before the map."""
        key = ranks(self.blocks * self.block + 2 * self.halo) - self.halo
        key = key.masked_fill((key < 0) | (key >= self.length), OUTSIDE)
        query, window = ranks(self.queries), self.window
        start = query // self.queries_per_block * self.block
        first = window - 1 - query % self.queries_per_block  # `displacement` of slot 0
        terms = (torch.arange(window, device=CPU)[:, None] - start) % window + first
        return Spans(query, key, start, start + window, window=window, terms=terms)


def bins(length: int, number: int) -> list[tuple[int, int]]:
    """The [start, stop) of adaptive pooling's `number` bins: they cover the axis and overlap where they do not fit."""
    return [(i * length // number, ceil_div((i + 1) * length, number)) for i in range(number)]


def bin_edges(length: int, number: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """`bins` as tensors [number, 1], which are arithmetic in an exported program where a list would be a constant."""
    i = torch.arange(number, device=device)[:, None]
    return i * length // number, ceil_div((i + 1) * length, number)
