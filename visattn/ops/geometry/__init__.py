"""Which keys a query sees: the one truth that references, masks, bias indices and kernels read.

Integer arithmetic only, one axis at a time; a window on a map is the product of its axes.
"""

from visattn.ops.geometry.arithmetic import (
    ceil_div,
    interleave,
    is_symbolic,
    outer_index,
    plain,
    read_table,
    sym_max,
    sym_min,
)
from visattn.ops.geometry.blocks import Halo, Partition, bin_edges, bins
from visattn.ops.geometry.pooled import Pooled, interpolated
from visattn.ops.geometry.sliding import (
    Axis,
    Neighbors,
    Tiles,
    neighbors,
    sees_all,
    tile_sizes,
    tiles,
    window,
)
from visattn.ops.geometry.spans import (
    CPU,
    NONE,
    OUTSIDE,
    TOGETHER,
    AnyAxis,
    Clipped,
    Cut,
    Spans,
    Whole,
    padded_rows,
    ranks,
    relation,
    tile_plan,
)
