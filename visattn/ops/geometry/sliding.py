"""Windows that slide with the query.

Words used below, per axis of length `L` with dilation `D`:
    group      the tokens `g, g + D, g + 2D, ...`; there are `D` groups, of `ceil((L - g) / D)` tokens each
    position   the rank `p` of a token inside its group: token `i` has group `i % D` and position `i // D`
    window     positions `[start, stop)` of the same group: what the query attends to

Sources: Neighborhood Attention (arXiv:2204.07143), Dilated NA (arXiv:2209.15001), Generalized NA (arXiv:2504.16922).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from visattn.ops.geometry.arithmetic import ceil_div, is_symbolic
from visattn.ops.geometry.spans import OUTSIDE, AnyAxis, Spans, ranks


@dataclass(frozen=True)
class Axis(AnyAxis):
    """One axis of a sliding-window attention problem: its length in tokens and how windows lie on it."""

    length: int
    kernel_size: int
    dilation: int = 1
    stride: int = 1
    is_causal: bool = False

    def spans(self) -> Spans:
        group, position = ranks(self.dilation).mT, ranks(ceil_div(self.length, self.dilation))
        token = position * self.dilation + group  # [G, P]
        token = token.masked_fill(token >= self.length, OUTSIDE)
        edges = window(position, (token >= 0).sum(1, keepdim=True), self)
        start, stop = (edge.expand_as(token) for edge in edges)
        return Spans(token, token, start, stop, self.kernel_size - 1, 2 * self.kernel_size - 1)


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
    return ceil_div(axis.length - group, axis.dilation)


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
    4 x 7, not 3 x 8 + 4), and one of at most two tiles becomes one (dense attention inside the group). An axis of
    symbolic length has tiles of one size.
    """
    if is_symbolic(axis.length):
        t = max(tile // axis.stride, 1) * axis.stride
        return t, axis.kernel_size + t - axis.stride
    longest = ceil_div(axis.length, axis.dilation)
    if longest <= max(2 * tile, axis.kernel_size) and axis.stride < axis.kernel_size:
        return longest, longest
    t = ceil_div(longest, ceil_div(longest, tile))
    t = max(t // axis.stride, 1) * axis.stride
    return t, min(axis.kernel_size + t - axis.stride, longest)


def sees_all(axis: Axis, tile: int) -> bool:
    """True when every query of a tile sees every key of it, so that no mask is needed."""
    known = not is_symbolic(axis.length)
    return known and tile_sizes(axis, tile)[1] == axis.kernel_size and not axis.is_causal


def tiles(axis: Axis, tile: int, device: torch.device | str | None = None) -> Tiles:
    """Cut `axis` into tiles of queries with their union of keys; see `tile_sizes`."""
    t, u = tile_sizes(axis, tile)
    d = axis.dilation
    per_group = ceil_div(ceil_div(axis.length, d), t)
    number = torch.arange(d * per_group, device=device)
    group = number // per_group  # [T]
    base = (number - group * per_group) * t  # [T]; exporters refuse a symbol's remainder
    length = _group_length(group, axis)

    token = torch.arange(axis.length, device=device)
    rank = token // d
    slot = (token % d * per_group + rank // t) * t + rank % t

    group, base, length = group[:, None], base[:, None], length[:, None]  # [T, 1]
    query = torch.minimum(base + torch.arange(t, device=device), length - 1)
    if (
        not is_symbolic(axis.length) and t == u and t * d == axis.length
    ):  # one tile holds a group, and no group is shorter than another
        return Tiles(axis, group, length, query, query, slot)
    first, _ = window(query[:, :1], length, axis)  # starts grow with the position
    key = torch.minimum(first, length - u).clamp(min=0) + torch.arange(u, device=device)
    return Tiles(axis, group, length, query, key, slot)
