"""Pooling of channels-last maps, as ops that trace, script and export.

PyTorch's own pooling compares sizes: whether there is a last, smaller window, whether the windows fit. That ties a
graph with symbolic sizes to those of the same kind, so there these ops are opaque.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.geometry import bin_edges
from visattn.ops.registration import define_op


def _pool2x2(x: Tensor, kind: str) -> Tensor:
    if kind not in ("avg", "max"):
        raise ValueError(f"expected kind 'avg' or 'max', got {kind!r}")
    x = x.permute(0, 3, 1, 2)
    x = F.max_pool2d(x, 2, ceil_mode=True) if kind == "max" else F.avg_pool2d(x, 2, ceil_mode=True)
    return x.permute(0, 2, 3, 1)


def _fake_pool2x2(x: Tensor, kind: str) -> Tensor:
    b, h, w, c = x.shape
    return x.new_empty((b, (h - 1) // 2 + 1, (w - 1) // 2 + 1, c))


def _grid(x: Tensor, ratio: list[int], size: list[int]) -> list[int]:
    if len(ratio) != 2 or len(size) not in (0, 2):
        raise ValueError(f"expected ratio of 2 ints and size of 2 or none, got {list(ratio)} and {list(size)}")
    if size:
        return [torch.sym_min(n, s) for n, s in zip(x.shape[1:3], size, strict=True)]
    return [torch.sym_max(1, n // r) for n, r in zip(x.shape[1:3], ratio, strict=True)]


def _average(x: Tensor, axis: int, number: int) -> Tensor:
    """Means over the bins of an axis. PyTorch's adaptive pooling has no deterministic backward pass on GPUs."""
    length = x.shape[axis]
    if length % number == 0:
        return x.unflatten(axis, (number, length // number)).mean(axis + 1)
    start, stop = bin_edges(length, number, x.device)  # [number, 1]
    token = torch.arange(length, device=x.device)
    weight = ((start <= token) & (token < stop)).to(x.dtype) / (stop - start)  # [number, length]
    return (weight @ x.flatten(axis + 1)).unflatten(-1, x.shape[axis + 1 :])


def _avg_pool_grid(x: Tensor, ratio: list[int], size: list[int]) -> Tensor:
    rows, columns = _grid(x, ratio, size)
    return _average(_average(x, 1, rows), 2, columns)


def _fake_avg_pool_grid(x: Tensor, ratio: list[int], size: list[int]) -> Tensor:
    return x.new_empty((x.shape[0], *_grid(x, ratio, size), x.shape[-1]))


def _adaptive_avg_pool(x: Tensor, size: list[int]) -> Tensor:
    if x.ndim != 4 or len(size) != 2 or min(size) < 1:
        raise ValueError(f"expected a map [B, H, W, C] and size of 2 ints >= 1, got {tuple(x.shape)} and {list(size)}")
    return _average(_average(x, 1, size[0]), 2, size[1])


def _fake_adaptive_avg_pool(x: Tensor, size: list[int]) -> Tensor:
    return x.new_empty((x.shape[0], *size, x.shape[-1]))


# x: [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C]. The last window of an odd axis holds one pixel, not a zero.
pool2x2 = define_op("pool2x2(Tensor x, str kind) -> Tensor", _pool2x2, _fake_pool2x2)
# x: [B, H, W, C] -> [B, max(1, H // ratio), max(1, W // ratio), C], or of `size` but never more than the map. The bins
# cover the map: bin p of P holds pixels floor(p * H / P) to ceil((p + 1) * H / P), so they may overlap.
avg_pool_grid = define_op(
    "avg_pool_grid(Tensor x, SymInt[] ratio, SymInt[] size) -> Tensor", _avg_pool_grid, _fake_avg_pool_grid
)
# x: [B, H, W, C] -> [B, *size, C], also where the map has fewer pixels than that; bins as those of `avg_pool_grid`.
adaptive_avg_pool = define_op(
    "adaptive_avg_pool(Tensor x, SymInt[] size) -> Tensor", _adaptive_avg_pool, _fake_adaptive_avg_pool
)
