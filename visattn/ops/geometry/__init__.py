"""Which keys a query sees: the one truth that references, masks, bias indices and kernels read.

Integer arithmetic only, one axis at a time; a window on a map is the product of its axes.
"""

from visattn.ops.geometry.blocks import Halo, Partition, bins
from visattn.ops.geometry.pooled import Pooled, interpolated
from visattn.ops.geometry.sliding import Axis, Neighbors, Tiles, neighbors, sees_all, tile_sizes, tiles, window

__all__ = [
    "Axis",
    "Halo",
    "Neighbors",
    "Partition",
    "Pooled",
    "Tiles",
    "bins",
    "interpolated",
    "neighbors",
    "sees_all",
    "tile_sizes",
    "tiles",
    "window",
]
