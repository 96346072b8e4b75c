"""Halo attention against timm's layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from op_cases import MIXED, Attend, Case, Providers, round_up
from op_cases.flex import flex
from visattn.ops import halo_attention


class _Given(nn.Module):
    """Stands for a projection whose result is given."""

    def forward(self, x: Tensor) -> Tensor:
        return self.result


def timm_halo(case: Halo) -> Attend:
    """timm's HaloAttn after its projections, whose results it gets in its own layout."""
    channels = case.heads * case.dim
    layer = HaloAttn(channels, num_heads=case.heads, block_size=case.block, halo_size=case.halo)
    del layer.q, layer.kv, layer.pos_embed.height_rel, layer.pos_embed.width_rel
    layer.q, layer.kv = _Given(), _Given()

    def attend(q: Tensor, kv: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        layer.q.result, layer.kv.result = q, kv
        layer.pos_embed.height_rel, layer.pos_embed.width_rel = rel_h, rel_w
        with case.mixed_precision(q.device):
            return layer(q)  # which is not read

    def channels_first(x: Tensor) -> Tensor:
        return x.flatten(3).permute(0, 3, 1, 2).contiguous()

    def into(q: Tensor, k: Tensor, v: Tensor, **tables: Tensor) -> dict[str, Tensor]:
        return {"q": channels_first(q), "kv": channels_first(torch.cat([k, v], dim=-1)), **tables}

    attend.into, attend.out = into, channels_first
    return attend


def compiled_flex(case: Halo) -> Attend:
    """Keys and values on the padded map; the relative terms of every query from two products."""
    block, halo = case.block, case.halo
    window = block + 2 * halo

    def sees(q: Any, k: Any) -> Any:
        slot = k - q // block * block
        return (slot >= 0) & (slot < window)

    def entry(q: Any, k: Any) -> Any:
        return (k - q // block * block - q % block + window - 1).clamp(0, 2 * window - 2)

    rows, columns = (-(-n // block) * block - n + halo for n in case.size)
    padded = tuple(-(-n // block) * block + 2 * halo for n in case.size)
    attend_padded = flex(case, (sees, sees), (entry, entry), padded)

    def attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        k, v = (F.pad(t, (0, 0, 0, 0, halo, columns, halo, rows)) for t in (k, v))
        terms = ((q @ rel.to(q.dtype).mT).flatten(1, 2).transpose(1, 2) for rel in (rel_h, rel_w))
        return attend_padded(q, k, v, *terms)

    return attend


def _timm_can_run(case: Halo) -> str | None:
    return "blocks do not divide the map" if any(n % case.block for n in case.size) else None


@dataclass(frozen=True)
class Halo(Case):
    """Halo attention with relative embeddings and timm's border rule."""

    block: int
    halo: int

    providers: ClassVar[Providers] = {"timm HaloAttn": (timm_halo, None)}
    cuda_providers: ClassVar[Providers] = {
        "timm HaloAttn": (timm_halo, lambda case, mode: _timm_can_run(case)),
        "FlexAttention compiled": (compiled_flex, None),
    }
    projections: ClassVar[tuple[tuple[str, ...], ...]] = (("k", "v"),)

    def pairs(self) -> int:
        blocks = math.prod(-(-n // self.block) for n in self.size)
        return blocks * round_up(self.block**2) * round_up((self.block + 2 * self.halo) ** 2)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        table = (2 * (self.block + 2 * self.halo) - 1, self.dim)
        return {**super().shapes(), "rel_h": table, "rel_w": table}

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """In a narrow dtype tables are as after initialisation: with large ones, rounding decides the softmax."""
        scale = 1.0 if self.dtype == torch.float32 else self.dim**-0.5
        return {n: t if n in self.maps else t * scale for n, t in super().inputs(device).items()}

    def visattn(self, backend: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
            return halo_attention(q, k, v, self.block, self.halo, 1, rel_h, rel_w, mask_border=False, backend=backend)

        return attend


CASES = [
    Halo("halo_64_8heads", 1, (64, 64), 8, 8, 8, 3),
    Halo("halo_64_8heads_b4", 4, (64, 64), 8, 8, 8, 3),
    Halo("halo_64_4heads", 1, (64, 64), 4, 16, 8, 3),
    Halo("halo_56_d32", 1, (56, 56), 4, 32, 8, 3),
]

# Attention layers of halonet50ts and of HaloNet-H1 at 256 x 256, and a detector's map of 800 x 1216.
CUDA_CASES = [
    Halo("halo_32", 128, (32, 32), 4, 32, 8, 3, **MIXED),
    Halo("halo_16", 128, (16, 16), 8, 32, 8, 3, **MIXED),
    Halo("halo_8", 128, (8, 8), 8, 64, 8, 3, **MIXED),
    Halo("halo_64_h1", 128, (64, 64), 4, 16, 8, 3, **MIXED),
    Halo("halo_32_h1", 128, (32, 32), 8, 16, 8, 3, **MIXED),
    Halo("halo_dense_100x152", 2, (100, 152), 4, 32, 8, 3, **MIXED),
]
TINY = [Halo("tiny_halo", 3, (16, 8), 2, 16, 4, 1, fused=True)]
