"""Pooling of channels-last maps [B, H, W, C].

PyTorch's own pooling compares sizes: whether there is a last, smaller window, whether the windows fit. That ties a
graph with symbolic sizes to those of the same kind, so there these are custom ops.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.geometry import bin_edges, ceil_div, is_symbolic, sym_max, sym_min
from visattn.ops.padding import empty_map, spatial_sizes
from visattn.ops.registration import custom_op, traced_as_one


def _empty_pool2x2(x: Tensor, kind: str) -> Tensor:
    b, h, w, c = x.shape
    return x.new_empty((b, ceil_div(h, 2), ceil_div(w, 2), c))


@custom_op(fake=_empty_pool2x2)
def pool2x2(x: Tensor, kind: str) -> Tensor:
    """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C]; the last window of an odd axis holds one pixel, not a zero.

    Args:
        x: The map.
        kind: "avg" or "max".

    Raises:
        ValueError: Another kind.
    """
    if kind not in ("avg", "max"):
        raise ValueError(f"expected kind 'avg' or 'max', got {kind!r}")
    if is_symbolic(*x.shape[1:3]):
        for axis in (1, 2):  # a window of one pixel is one of the same pixel twice
            pairs = ceil_div(x.shape[axis], 2)
            pixel = torch.arange(2 * pairs, device=x.device).clamp(max=x.shape[axis] - 1)
            x = x.index_select(axis, pixel).unflatten(axis, (pairs, 2))  # [B, ..., pairs, 2, ...]
            x = x.amax(axis + 1) if kind == "max" else x.mean(axis + 1)
        return x  # [B, H', W', C]
    x = x.permute(0, 3, 1, 2)  # [B, C, H, W]
    x = F.max_pool2d(x, 2, ceil_mode=True) if kind == "max" else F.avg_pool2d(x, 2, ceil_mode=True)
    return x.permute(0, 2, 3, 1)  # [B, H', W', C]


def _average(x: Tensor, axis: int, number: int) -> Tensor:
    """Average over the bins of an axis. PyTorch's adaptive pooling has no deterministic backward pass on GPUs."""
    length = x.shape[axis]
    if not is_symbolic(length, number) and length % number == 0:
        return x.unflatten(axis, (number, length // number)).mean(axis + 1)  # [..., number, ...]
    start, stop = bin_edges(length, number, x.device)  # [number, 1]
    token = torch.arange(length, device=x.device)
    weight = ((start <= token) & (token < stop)).to(x.dtype) / (stop - start)  # [number, length]
    return (weight @ x.flatten(axis + 1)).unflatten(-1, x.shape[axis + 1 :])  # [..., number, ...]


@custom_op(fake=empty_map)
def adaptive_avg_pool(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, H, W, C] -> [B, *size, C], also where the map has fewer pixels than that.

    The bins cover the map: bin p of P holds pixels floor(p * H / P) to ceil((p + 1) * H / P), so they may overlap.

    Raises:
        ValueError: No map, or sizes below 1.
    """
    if x.ndim != 4 or len(size) != 2 or any(n < 1 for n in size):
        got = f"{tuple(x.shape)} and {list(size)}"
        raise ValueError(f"expected a map [B, H, W, C] and size of 2 ints >= 1, got {got}")
    return _average(_average(x, 1, size[0]), 2, size[1])


@traced_as_one
def avg_pool_grid(x: Tensor, ratio: Sequence[int], size: Sequence[int] = ()) -> Tensor:
    """[B, H, W, C] -> [B, max(1, H // ratio), max(1, W // ratio), C], or of `size`, but never more than the map.

    Bins as those of `adaptive_avg_pool`.

    Raises:
        ValueError: Other than two ratios, or other than two sizes or none.
    """
    if len(ratio) != 2 or len(size) not in (0, 2):
        got = f"{list(ratio)} and {list(size)}"
        raise ValueError(f"expected ratio of 2 ints and size of 2 or none, got {got}")
    sizes = spatial_sizes(x)
    if len(size):
        return adaptive_avg_pool(x, [sym_min(n, s) for n, s in zip(sizes, size, strict=True)])
    return adaptive_avg_pool(x, [sym_max(1, n // r) for n, r in zip(sizes, ratio, strict=True)])
