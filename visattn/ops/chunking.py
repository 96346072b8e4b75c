"""How much the eager backends hold at a time: what was measured on CPUs, in one place for all ops."""

from typing import Any

import torch
from torch import Tensor

# Numbers of a chunk (logits, hidden units, copied keys and values): a CPU core's cache should hold them, an accelerator
# should have enough to do, and a traced graph, which holds every chunk, should stay small.
CHUNK, ACCELERATOR, TRACED, TRACED_COPIES = 1 << 18, 1 << 26, 1 << 22, 1 << 24
# The most chunks, where some of the work is done again for each.
MOST = 64
# Neighborhood attention: queries per tile and axis, about 64 in all. More would see more masked keys, fewer would
# starve the products.
TILE = {1: 64, 2: 8, 3: 4}
# Routed attention: maps of at most this many keys take a mask over the whole map instead of lists.
DENSE_KEYS = 256
# Agent attention: from this number of keys on, SDPA on a CPU keeps its vectors busy; fewer are taken by products.
FEW_KEYS = 16
# Linear attentions: numbers of a sample's values from which chunks pay for the calls that they cost.
STREAMED = 1 << 17
# Aggregated attention: hidden units of the position perceptron at once where the sizes of its grid are symbolic.
HIDDEN = 32


def chunk_size(device: torch.device) -> int:
    """How many logits or hidden units to make at once."""
    if device.type != "cpu":
        return ACCELERATOR
    return TRACED if torch.compiler.is_compiling() or torch.jit.is_tracing() else CHUNK


def slices(number: int, step: int) -> list[slice]:
    """Cut `number` things into runs of `step`, the last one shorter."""
    return [slice(i, min(i + step, number)) for i in range(0, number, step)]


class Recomputed(torch.autograd.Function):
    """A function that keeps nothing but its inputs for the backward pass: tensors or None, then what is neither."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors = [x for x in inputs if x is None or isinstance(x, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.how = inputs[len(tensors) :]
