"""Functions: tensors in, tensors out. Layouts are channels-last and heads-last; see each function's docstring."""

from visattn.ops.dispatch import BackendError, explain, use_backend
from visattn.ops.halo import halo_attention
from visattn.ops.neighborhood import neighborhood_attention
from visattn.ops.padding import fit, pad_same, pad_to_at_least, pad_to_multiple
from visattn.ops.pooling import pool2x2
from visattn.ops.rel_pos import resize_rel_pos
from visattn.ops.window import window_attention

__all__ = [
    "BackendError",
    "explain",
    "fit",
    "halo_attention",
    "neighborhood_attention",
    "pad_same",
    "pad_to_at_least",
    "pad_to_multiple",
    "pool2x2",
    "resize_rel_pos",
    "use_backend",
    "window_attention",
]
