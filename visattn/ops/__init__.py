"""Functions: tensors in, tensors out. Layouts are channels-last and heads-last; see each function's docstring."""

from visattn.ops.aggregated import aggregated_attention, aggregated_weights
from visattn.ops.dispatch import BackendError, explain, use_backend
from visattn.ops.halo import halo_attention
from visattn.ops.neighborhood import neighborhood_attention
from visattn.ops.padding import fit, floor_to_multiple, pad_same, pad_to_at_least, pad_to_multiple
from visattn.ops.pooling import avg_pool_grid, pool2x2
from visattn.ops.rel_pos import resize_rel_pos
from visattn.ops.routed import bilevel_routing_attention, region_routing, routed_attention
from visattn.ops.window import window_attention

__all__ = [
    "BackendError",
    "aggregated_attention",
    "aggregated_weights",
    "avg_pool_grid",
    "bilevel_routing_attention",
    "explain",
    "fit",
    "floor_to_multiple",
    "halo_attention",
    "neighborhood_attention",
    "pad_same",
    "pad_to_at_least",
    "pad_to_multiple",
    "pool2x2",
    "region_routing",
    "resize_rel_pos",
    "routed_attention",
    "use_backend",
    "window_attention",
]
