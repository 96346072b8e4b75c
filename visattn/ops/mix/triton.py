"""Neighborhood mix with its weighted sum in Triton; bias and softmax are PyTorch. See `visattn.ops.fused.depthwise`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visattn.ops.geometry import Axis

if TYPE_CHECKING:
    from visattn.ops.mix import MixProblem


def _read(table: Tensor, dim: int, axis: Axis) -> Tensor:
    """Read a table [..., 2 K - 1, ...] at the displacements of an axis' windows: [..., L, ..., K].

    Views and copies, whose gradients are sums in one order: those of `index_select` are not, on a GPU.
    """
    k = axis.kernel_size
    # [..., K, ..., K]: of a token at the start of the axis, of those inside, of one at its end.
    windows = table.unfold(dim, k, 1).flip(dim)
    before, inside, after = windows.split([k // 2, 1, k - 1 - k // 2], dim)
    inside = inside.expand(*(-1 if d != dim else axis.length - k + 1 for d in range(inside.ndim)))
    return torch.cat([before, inside, after], dim)


def attend(problem: MixProblem) -> Tensor:
    """See `visattn.ops.neighborhood_mix`."""
    from visattn.ops.fused.depthwise import mix_windows

    v, kernel_size, (rows, columns) = problem.v, problem.kernel_size, problem.axes
    logits = problem.logits.to(problem.dtype)
    if problem.bias is not None:
        table = _read(_read(problem.bias.to(logits.dtype), 1, rows), 2, columns)
        table = table.permute(1, 2, 0, 3, 4).flatten(3)  # [H, W, N, K_h K_w]
        logits = logits + table
    return mix_windows(v, logits.softmax(-1).to(v.dtype), kernel_size)
