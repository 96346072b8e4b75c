"""Cut a map into blocks by index, in operations that do not depend on its size: for graphs with symbolic sizes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def contiguous_copy(x: Tensor) -> Tensor:
    """Copy x even if it is contiguous: `flatten` then does not ask symbolic sizes whether it has to."""
    return x.clone(memory_format=torch.contiguous_format)


def _take(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """Take [..., L, ...] at index [n, m] of an axis: [..., n, m, ...], zero where the index is outside [0, L)."""
    outside = (index < 0) | (index >= x.shape[axis])
    outside = outside.view(*index.shape, *[1] * (x.ndim - 1 - axis))  # [n, m, 1, ...]
    taken = x.index_select(axis, index.clamp(0, x.shape[axis] - 1).flatten())  # [..., n m, ...]
    return taken.unflatten(axis, index.shape).masked_fill(outside, 0)  # [..., n, m, ...]


def cut_blocks(x: Tensor, index: Sequence[Tensor]) -> Tensor:
    """Take [B, H, W, N, D] at indices [rows, n] and [columns, m]: [B, rows, columns, N, n * m, D]."""
    x = _take(_take(x, 2, index[1]), 1, index[0])  # [B, rows, n, columns, m, N, D]
    x = contiguous_copy(x.permute(0, 1, 3, 5, 2, 4, 6))  # [B, rows, columns, N, n, m, D]
    return x.flatten(4, 5)  # [B, rows, columns, N, n m, D]


def join_blocks(x: Tensor, block: Sequence[int], size: Sequence[int]) -> Tensor:
    """Join [B, rows, columns, N, n * m, D] of blocks (n, m) to a map [B, H, W, N, D] of `size`, cropped at its end."""
    x = x.unflatten(4, tuple(block)).permute(0, 1, 4, 2, 5, 3, 6)  # [B, rows, n, columns, m, N, D]
    x = contiguous_copy(x).flatten(3, 4).flatten(1, 2)  # [B, rows n, columns m, N, D]
    for axis, length in enumerate(size, start=1):
        x = x.index_select(axis, torch.arange(length, device=x.device))
    return x  # [B, H, W, N, D]
