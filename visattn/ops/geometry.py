"""Which keys a query sees: the one truth that references, masks, bias indices and kernels read.

Integer arithmetic only, one axis at a time; a window on a map is the product of its axes.

Words used below, per axis of length `L` with dilation `D`:
    group      the tokens `g, g + D, g + 2D, ...`; there are `D` groups, of `ceil((L - g) / D)` tokens each
    position   the rank `p` of a token inside its group: token `i` has group `i % D` and position `i // D`
    window     positions `[start, stop)` of the same group: what the query attends to

Partitions (`Partition`) cut an axis into windows that do not overlap: a token sees the tokens of its own window. Halos
(`Halo`) let the queries of a block see its surroundings too.

Sources: Neighborhood Attention (arXiv:2204.07143), Dilated NA (arXiv:2209.15001), Generalized NA (arXiv:2504.16922),
Swin (arXiv:2103.14030), MaxViT (arXiv:2204.01697), HaloNet (arXiv:2103.12731).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One axis of a sliding-window attention problem: its length in tokens and how windows lie on it."""

    length: int
    kernel_size: int
    dilation: int = 1
    stride: int = 1
    is_causal: bool = False


@dataclass(frozen=True)
class Neighbors:
    """For each of the `L` queries of an axis, its at most `K` keys."""

    index: Tensor  # [L, K] token index of each key; an invisible key repeats the query's own index
    visible: Tensor  # [L, K] bool; False only on causal axes
    displacement: Tensor  # [L, K] key position - query position + K - 1, in [0, 2K - 2] wherever a bias is defined


@dataclass(frozen=True)
class Tiles:
    """An axis cut into `T` tiles of `t` queries, each with the `U` keys that hold every window of the tile.

    Queries past the end of their group repeat its last one; keys past the end are never visible.
    """

    axis: Axis
    group: Tensor  # [T, 1]
    group_length: Tensor  # [T, 1]
    query: Tensor  # [T, t] positions
    key: Tensor  # [T, U] positions
    slot: Tensor  # [L] where token i lies in the flattened [T * t] queries

    def query_index(self) -> Tensor:
        """[T, t] token index of each query."""
        return self.query * self.axis.dilation + self.group

    def key_index(self) -> Tensor:
        """[T, U] token index of each key; keys past the end repeat the last one."""
        return torch.minimum(self.key, self.group_length - 1) * self.axis.dilation + self.group

    def visible(self) -> Tensor:
        """[T, t, U] whether a query sees a key."""
        start, stop = window(self.query, self.group_length, self.axis)
        key = self.key[:, None, :]
        return (key >= start[:, :, None]) & (key < stop[:, :, None])

    def displacement(self) -> Tensor:
        """[T, t, U] key position - query position + K - 1, clamped to [0, 2K - 2]."""
        reach = self.axis.kernel_size - 1
        return (self.key[:, None, :] - self.query[:, :, None] + reach).clamp(0, 2 * reach)


def window(position: Tensor, group_length: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Positions `[start, stop)` that the query at `position` sees.

    The `stride` queries of one block share the window of the block's leader. A window is shifted at the border, never
    cut, so a query always has exactly `kernel_size` keys; on a causal axis it ends at the query and may hold fewer.
    """
    k, s = axis.kernel_size, axis.stride
    offset = s - 1 if axis.is_causal else s // 2
    leader = torch.minimum(position // s * s + offset, group_length - 1)
    if axis.is_causal:
        return (leader - (k - 1)).clamp(min=0), position + 1
    start = torch.minimum((leader - k // 2).clamp(min=0), group_length - k)
    return start, start + k


def _group_length(group: Tensor, axis: Axis) -> Tensor:
    return (axis.length - group + axis.dilation - 1) // axis.dilation


def neighbors(axis: Axis, device: torch.device | str | None = None) -> Neighbors:
    """The keys of every query of `axis`, in order of position."""
    token = torch.arange(axis.length, device=device)
    group, position = token % axis.dilation, token // axis.dilation
    start, stop = window(position, _group_length(group, axis), axis)
    key = start[:, None] + torch.arange(axis.kernel_size, device=device)
    visible = key < stop[:, None]
    index = torch.where(visible, key * axis.dilation + group[:, None], token[:, None])
    return Neighbors(index, visible, key - position[:, None] + axis.kernel_size - 1)


def tile_sizes(axis: Axis, tile: int) -> tuple[int, int]:
    """How many queries `t` and keys `U` a tile of `axis` holds, for a wish of about `tile` queries.

    `t` is a multiple of the stride, so that tiles do not split blocks that share a window. A group is cut evenly (28 as
    4 x 7, not 3 x 8 + 4), and one of at most two tiles becomes one (dense attention inside the group).
    """
    longest = -(-axis.length // axis.dilation)
    if longest <= max(2 * tile, axis.kernel_size) and axis.stride < axis.kernel_size:
        return longest, longest
    t = -(-longest // -(-longest // tile))
    t = max(t // axis.stride, 1) * axis.stride
    return t, min(axis.kernel_size + t - axis.stride, longest)


def sees_all(axis: Axis, tile: int) -> bool:
    """True when every query of a tile sees every key of it, so that no mask is needed."""
    return tile_sizes(axis, tile)[1] == axis.kernel_size and not axis.is_causal


def tiles(axis: Axis, tile: int, device: torch.device | str | None = None) -> Tiles:
    """Cut `axis` into tiles of queries with their union of keys; see `tile_sizes`."""
    t, u = tile_sizes(axis, tile)
    d = axis.dilation
    per_group = ((axis.length + d - 1) // d + t - 1) // t
    number = torch.arange(d * per_group, device=device)
    group, base = number // per_group, number % per_group * t  # [T]
    length = _group_length(group, axis)

    token = torch.arange(axis.length, device=device)
    rank = token // d
    slot = (token % d * per_group + rank // t) * t + rank % t

    group, base, length = group[:, None], base[:, None], length[:, None]  # [T, 1]
    query = torch.minimum(base + torch.arange(t, device=device), length - 1)
    if t == u and t * d == axis.length:  # one tile holds a group, and no group is shorter than another
        return Tiles(axis, group, length, query, query, slot)
    first, _ = window(query[:, :1], length, axis)  # starts grow with the position
    key = torch.minimum(first, length - u).clamp(min=0) + torch.arange(u, device=device)
    return Tiles(axis, group, length, query, key, slot)


@dataclass(frozen=True)
class Partition:
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
        slot-major for a grid. `slots` is below `window` when no window is full.
        """
        if self.is_grid:
            windows = -(-self.length // self.window)
            return windows, -(-self.length // windows), 0
        first = self.shift or self.window
        if self.length <= first:
            return 1, self.length, 0
        empty = self.window - first
        return -(-(self.length + empty) // self.window), self.window, empty

    def place(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """The window [length] of each token and its rank [length] inside it."""
        windows, slots, empty = self.layout()
        token = torch.arange(self.length, device=device) + empty
        return (token % windows, token // windows) if self.is_grid else (token // slots, token % slots)

    def occupied(self, device: torch.device | str | None = None) -> Tensor:
        """[windows, slots] whether a slot holds a token."""
        windows, slots, _ = self.layout()
        filled = torch.zeros(windows, slots, dtype=torch.bool, device=device)
        filled[self.place(device)] = True
        return filled

    def pairs(self) -> int:
        """How many (query, key) pairs see each other."""
        windows, slots, empty = self.layout()
        if self.is_grid:
            sizes = [len(range(i, self.length, windows)) for i in range(windows)]
        else:
            edges = [max(i * slots - empty, 0) for i in range(windows)] + [self.length]
            sizes = [b - a for a, b in itertools.pairwise(edges)]
        return sum(n * n for n in sizes)


@dataclass(frozen=True)
class Halo:
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
        return -(-self.length // self.block)

    @property
    def queries(self) -> int:
        """Queries on the axis."""
        return -(-self.length // self.stride)

    @property
    def queries_per_block(self) -> int:
        return self.block // self.stride

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
        ends = [((i + 1) * self.block + self.halo, i * self.block - self.halo) for i in range(self.blocks)]
        keys = [min(stop, self.length) - max(start, 0) for stop, start in ends]
        return sum(keys[i // self.queries_per_block] for i in range(self.queries))
