"""Functions: tensors in, tensors out. Layouts are channels-last and heads-last; see each function's docstring."""

from visattn.ops.agent import agent_attention, agent_position_bias
from visattn.ops.aggregated import aggregated_attention, aggregated_weights
from visattn.ops.dispatch import BackendError, explain, use_backend
from visattn.ops.fused.tuning import tune
from visattn.ops.halo import halo_attention
from visattn.ops.linear import (
    dynamic_depthwise_conv,
    efficient_attention,
    focused_linear_attention,
    inline_attention,
)
from visattn.ops.mix import neighborhood_mix
from visattn.ops.neighborhood import neighborhood_attention
from visattn.ops.padding import (
    fit,
    fit_centered,
    floor_to_multiple,
    pad_centered_to_multiple,
    pad_same,
    pad_to_at_least,
    pad_to_multiple,
)
from visattn.ops.pooling import adaptive_avg_pool, avg_pool_grid, pool2x2
from visattn.ops.registration import decompose
from visattn.ops.rel_pos import resize_rel_pos
from visattn.ops.routed import bilevel_routing_attention, region_routing, routed_attention
from visattn.ops.window import window_attention
from visattn.ops.window_conv import window_conv

__all__ = [
    "BackendError",
    "adaptive_avg_pool",
    "agent_attention",
    "agent_position_bias",
    "aggregated_attention",
    "aggregated_weights",
    "avg_pool_grid",
    "bilevel_routing_attention",
    "decompose",
    "dynamic_depthwise_conv",
    "efficient_attention",
    "explain",
    "fit",
    "fit_centered",
    "floor_to_multiple",
    "focused_linear_attention",
    "halo_attention",
    "inline_attention",
    "neighborhood_attention",
    "neighborhood_mix",
    "pad_centered_to_multiple",
    "pad_same",
    "pad_to_at_least",
    "pad_to_multiple",
    "pool2x2",
    "region_routing",
    "resize_rel_pos",
    "routed_attention",
    "tune",
    "use_backend",
    "window_attention",
    "window_conv",
]
