"""Halo attention against timm's layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from op_problems import Attend, Peers, Problem
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
    x = torch.empty(case.batch, channels, *case.size)

    def attend(q: Tensor, kv: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        layer.q.result, layer.kv.result = q, kv
        layer.pos_embed.height_rel, layer.pos_embed.width_rel = rel_h, rel_w
        return layer(x)

    def channels_first(x: Tensor) -> Tensor:
        return x.flatten(3).permute(0, 3, 1, 2).contiguous()

    def into(q: Tensor, k: Tensor, v: Tensor, **tables: Tensor) -> dict[str, Tensor]:
        return {"q": channels_first(q), "kv": channels_first(torch.cat([k, v], dim=-1)), **tables}

    attend.into, attend.out = into, channels_first
    return attend


@dataclass(frozen=True)
class Halo(Problem):
    """Halo attention with relative embeddings and timm's border rule."""

    block: int
    halo: int

    peers: ClassVar[Peers] = {"timm HaloAttn": (timm_halo, None)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        table = (2 * (self.block + 2 * self.halo) - 1, self.dim)
        return {**super().shapes(), "rel_h": table, "rel_w": table}

    def visattn(self, backend: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
            return halo_attention(q, k, v, self.block, self.halo, 1, rel_h, rel_w, mask_border=False, backend=backend)

        return attend


PROBLEMS = [
    Halo("halo_64_8heads", 1, (64, 64), 8, 8, 8, 3),
    Halo("halo_64_8heads_b4", 4, (64, 64), 8, 8, 8, 3),
    Halo("halo_64_4heads", 1, (64, 64), 4, 16, 8, 3),
    Halo("halo_56_d32", 1, (56, 56), 4, 32, 8, 3),
]
