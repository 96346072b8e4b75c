"""OverLoCK's weighted sums over clamped windows against the official formulation, written from its description."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from op_cases import Attend, Case, Providers
from visattn.ops import neighborhood_mix
from visattn.ops.geometry import Axis, neighbors, outer_index


def official_unfold(case: Mix) -> Attend:
    """Without natten: a copy of the windows inside the map, of which those at the border repeat the nearest.

    Neither the index into the position table nor head-first layouts count.
    """
    kernel = case.kernel_size
    found = [neighbors(Axis(n, kernel)).displacement for n in case.size]
    index = outer_index(found, [2 * kernel - 1] * 2)  # [S, M]
    border = [kernel // 2, kernel - 1 - kernel // 2] * 2

    def attend(logits: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        batch, channels = v.shape[:2]
        rows, columns = (n - kernel + 1 for n in case.size)
        weights = (logits + bias.flatten(1)[:, index].unflatten(1, case.size)).softmax(-1)
        windows = F.unfold(v, kernel).view(batch, channels * kernel**2, rows, columns)
        windows = F.pad(windows, border, mode="replicate")
        windows = windows.view(batch, case.heads, case.dim, kernel**2, *case.size)
        return torch.einsum("bnhwj,bncjhw->bnchw", weights, windows)

    def into(logits: Tensor, v: Tensor, bias: Tensor) -> dict[str, Tensor]:
        maps = v.flatten(3).permute(0, 3, 1, 2).contiguous()  # [B, N C, H, W]
        return {"logits": logits.permute(0, 3, 1, 2, 4).contiguous(), "v": maps, "bias": bias}

    attend.into = into
    attend.out = lambda out: out.permute(0, 3, 4, 1, 2)
    return attend


def compiled_unfold(case: Mix) -> Attend:
    official = official_unfold(case)
    attend = torch.compile(official, dynamic=False)
    attend.into, attend.out = official.into, official.out
    return attend


@dataclass(frozen=True)
class Mix(Case):
    """Given logits and a position table; `dim` channels of values per head."""

    kernel_size: int

    providers: ClassVar[Providers] = {
        "official unfold": (official_unfold, None),
        "official unfold compiled": (
            compiled_unfold,
            lambda case, mode: None if shutil.which("c++") else "no C++ compiler",
        ),
    }
    maps: ClassVar[tuple[str, ...]] = ("logits", "v")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        lead, width = (self.batch, *self.size, self.heads), 2 * self.kernel_size - 1
        return {
            "logits": (*lead, self.kernel_size**2),
            "v": (*lead, self.dim),
            "bias": (self.heads, width, width),
        }

    def visattn(self, backend: str) -> Attend:
        return lambda **inputs: neighborhood_mix(**inputs, kernel_size=self.kernel_size, backend=backend)


# The third stage of OverLoCK-T at 224 x 224, and a map of twice its side with the second stage's kernel.
CASES = [
    Mix("mix_14_k13", 2, (14, 14), 8, 16, 13),
    Mix("mix_28_k15", 2, (28, 28), 8, 16, 15),
]
CUDA_CASES: list[Case] = []
TINY: list[Case] = []
