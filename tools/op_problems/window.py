"""Window and grid attention against timm's partitions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.models.maxxvit import grid_partition, grid_reverse, window_partition, window_reverse
from torch import Tensor

from op_problems import Attend, Peers, Problem
from visattn.ops import window_attention


def timm_partition(case: Window) -> Attend:
    """timm's way: cut the maps into windows, SDPA with the gathered bias, put the windows back."""
    cut, join = (grid_partition, grid_reverse) if case.grid else (window_partition, window_reverse)
    size, tokens = (case.window, case.window), case.window**2
    rank = torch.arange(tokens)
    rows, columns = rank // case.window, rank % case.window
    entry = (rows - rows[:, None] + case.window - 1, columns - columns[:, None] + case.window - 1)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        qkv = cut(torch.stack([q, k, v], dim=3).flatten(3), size).reshape(-1, tokens, 3, case.heads, case.dim)
        out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), attn_mask=bias[:, entry[0], entry[1]])
        return join(out.transpose(1, 2).reshape(-1, *size, case.heads * case.dim), size, case.size).view(q.shape)

    return attend


@dataclass(frozen=True)
class Window(Problem):
    """Window or grid attention with a position table."""

    window: int
    grid: bool = False

    peers: ClassVar[Peers] = {"timm partition": (timm_partition, None)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        width = 2 * self.window - 1
        return {**super().shapes(), "bias": (self.heads, width, width)}

    def visattn(self, backend: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return window_attention(q, k, v, self.window, grid=self.grid, bias=bias, backend=backend)

        return attend


PROBLEMS = [
    Window("window_56", 2, (56, 56), 2, 32, 7),
    Window("grid_56", 2, (56, 56), 2, 32, 7, grid=True),
]
