"""Window and grid attention against timm's partitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models.maxxvit import grid_partition, grid_reverse, window_partition, window_reverse
from torch import Tensor

from op_cases import MIXED, Attend, Case, Providers, partitioned, round_up
from op_cases.flex import flex
from visattn.ops import window_attention


def timm_partition(case: Window) -> Attend:
    """timm's way: cut the maps into windows, SDPA with the gathered bias, put the windows back."""
    cut, join = (grid_partition, grid_reverse) if case.grid else (window_partition, window_reverse)
    size, tokens = (case.window, case.window), case.window**2
    entry = partitioned.bias_entries(case.window)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        qkv = cut(torch.stack([q, k, v], dim=3).flatten(3), size).reshape(-1, tokens, 3, case.heads, case.dim)
        out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), attn_mask=bias[:, entry[0], entry[1]])
        return join(out.transpose(1, 2).reshape(-1, *size, case.heads * case.dim), size, case.size).view(q.shape)

    return attend


def compiled_flex(case: Window) -> Attend:
    """Tokens of the same window."""
    w = case.window

    def axis(length: int) -> tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]:
        windows = -(-length // w)

        def sees(q: Any, k: Any) -> Any:
            return q % windows == k % windows if case.grid else q // w == k // w

        def entry(q: Any, k: Any) -> Any:
            ranks = (k // windows, q // windows) if case.grid else (k % w, q % w)
            return (ranks[0] - ranks[1] + w - 1).clamp(0, 2 * w - 2)

        return sees, entry

    sees, entries = zip(*(axis(n) for n in case.size), strict=True)
    attend = flex(case, sees, entries, case.size)
    return lambda q, k, v, bias: attend(q, k, v, bias)


def _partition(case: Window) -> tuple[int, bool] | str:
    if any(n % case.window for n in case.size):
        return "windows do not divide the map"
    return case.window, case.grid


@dataclass(frozen=True)
class Window(Case):
    """Window or grid attention with a position table."""

    window: int
    grid: bool = False

    providers: ClassVar[Providers] = {"timm partition": (timm_partition, None)}
    cuda_providers: ClassVar[Providers] = {
        **partitioned.providers(_partition),
        "FlexAttention compiled": (compiled_flex, None),
    }

    def pairs(self) -> int:
        windows = math.prod(-(-n // self.window) for n in self.size)
        return windows * round_up(self.window**2) ** 2

    def shapes(self) -> dict[str, tuple[int, ...]]:
        width = 2 * self.window - 1
        return {**super().shapes(), "bias": (self.heads, width, width)}

    def visattn(self, backend: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            return window_attention(q, k, v, self.window, grid=self.grid, bias=bias, backend=backend)

        return attend


CASES = [
    Window("window_56", 2, (56, 56), 2, 32, 7),
    Window("grid_56", 2, (56, 56), 2, 32, 7, grid=True),
]

_STAGES = [((56, 56), 2), ((28, 28), 4), ((14, 14), 8), ((7, 7), 16)]

# The stages of MaxViT-T at 224 x 224, and a detector's map of 800 x 1216.
CUDA_CASES = [
    *(
        Window(f"{'grid' if grid else 'window'}_{size[0]}", 128, size, heads, 32, 7, grid, **MIXED)
        for size, heads in _STAGES
        for grid in (False, True)
    ),
    Window("window_dense_200x304", 2, (200, 304), 2, 32, 7, **MIXED),
    Window("grid_dense_200x304", 2, (200, 304), 2, 32, 7, True, **MIXED),
]
TINY = [
    Window("tiny_window", 3, (14, 21), 2, 16, 7, fused=True),
    Window("tiny_grid", 3, (14, 21), 2, 16, 7, True, fused=True),
]
