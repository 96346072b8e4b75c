"""Queries on an axis and keys averaged over bins of it.

The bins are those of adaptive pooling (`bins`). A key lies at the mean of its tokens, a multiple of 1/2, so that twice
the distance to a query is an integer.

Source: TransNeXt (arXiv:2311.17132), section 3.1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from visattn.ops.geometry.arithmetic import is_symbolic
from visattn.ops.geometry.blocks import bin_edges, bins


@dataclass(frozen=True)
class Pooled:
    """One axis of `length` queries and `pooled` keys, at most one per query."""

    length: int
    pooled: int

    @property
    def keys(self) -> list[int]:
        """Twice the coordinate of each key, increasing."""
        return [start + stop - 1 for start, stop in bins(self.length, self.pooled)]

    @property
    def bounds(self) -> tuple[int, int, int]:
        """Start, stop and step of `distances`; with symbolic sizes, those of any number of keys."""
        if is_symbolic(self.length, self.pooled):
            return 2 - 2 * self.length, 2 * self.length - 1, 1
        keys = self.keys
        # 2 if all keys are whole tokens, or all lie between two.
        step = 2 if all((key - keys[0]) % 2 == 0 for key in keys) else 1
        return -keys[-1], 2 * self.length - 1 - keys[0], step

    @property
    def distances(self) -> range:
        """Twice the distances (query - key), evenly from the smallest to the largest; about 2 or 4 per token."""
        return range(*self.bounds)

    def index(self, device: torch.device | str | None = None) -> Tensor:
        """[length, pooled] place of the distance of each query and key in `distances`."""
        start, stop = bin_edges(self.length, self.pooled, device)
        smallest, _, step = self.bounds
        twice = 2 * torch.arange(self.length, device=device)[:, None]  # [length, 1]
        return (twice - (start + stop - 1).mT - smallest) // step


def _stretch(size: int, new: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """[new, 2] places and their weights (float64) by which linear interpolation turns `size` values into `new`.

    The outer edges of the first and the last value stay in place (`align_corners=False`).
    """
    # In units of 1 / (2 new).
    place = ((2 * torch.arange(new, device=device) + 1) * size - new).clamp(min=0)  # [new]
    first = place // (2 * new)
    weight = (place - 2 * new * first).double() / (2 * new)
    places = torch.stack([first, (first + 1).clamp(max=size - 1)], -1)  # [new, 2]
    return places, torch.stack([1 - weight, weight], -1)


def interpolated(
    axis: Pooled, length: int, pooled: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor | None]:
    """What is known for the queries and keys of `axis`, interpolated linearly to `length` queries and `pooled` keys.

    Returns:
        index [length, pooled, m] into `axis.distances` and weights [length, pooled, m] (float64) of m = 4 entries; with
        the sizes of the axis itself, m = 1 and None.
    """
    index = axis.index(device)
    is_same = is_symbolic(axis.length, axis.pooled)  # only then are those of the map its own
    if not is_same and not is_symbolic(length, pooled):
        is_same = (length, pooled) == (axis.length, axis.pooled)
    if is_same:
        return index[..., None], None
    query, query_weight = _stretch(axis.length, length, device)  # [length, 2]
    key, key_weight = _stretch(axis.pooled, pooled, device)  # [pooled, 2]
    index = index[query[:, None, :, None], key[None, :, None, :]].flatten(2)  # [length, pooled, 4]
    return index, (query_weight[:, None, :, None] * key_weight[None, :, None, :]).flatten(2)
