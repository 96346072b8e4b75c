"""Gated positional attention against the official formulation, which makes the weights of all pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from op_cases import MIXED, Attend, Case, Providers
from visattn.ops import gated_positional_attention


def official_matmuls(case: GatedPositional) -> Attend:
    """Displacements of all pairs projected for every image, two softmaxes, mixed and divided by their sum; a product.

    The displacements are made before what is timed, as the official layer keeps them.
    """
    made: dict[torch.device, Tensor] = {}

    def steps(device: torch.device) -> Tensor:
        """(dx, dy, distance^2) of all pairs: [1, S, S, 3]."""
        if device not in made:
            y, x = (
                t.flatten() for t in torch.meshgrid(*(torch.arange(n, device=device) for n in case.size), indexing="ij")
            )
            dy, dx = y - y[:, None], x - x[:, None]
            made[device] = torch.stack([dx, dy, dx**2 + dy**2], -1)[None].float()
        return made[device]

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, pos_weight: Tensor) -> Tensor:
        with case.mixed_precision(q.device):
            query, key, value = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
            content = (query @ key.transpose(-2, -1) * case.dim**-0.5).softmax(dim=-1)
            logits = torch.nn.functional.linear(steps(q.device).expand(case.batch, -1, -1, -1), pos_weight)
            positional = logits.permute(0, 3, 1, 2).softmax(dim=-1)
            mix = gate.sigmoid().view(1, -1, 1, 1)
            weights = (1 - mix) * content + mix * positional
            weights = weights / weights.sum(dim=-1, keepdim=True)
            return (weights.to(value.dtype) @ value).transpose(1, 2).reshape(q.shape)

    attend.parameter_tolerance = 1e-4  # its gradients of positions are sums over all pairs
    return attend


@dataclass(frozen=True)
class GatedPositional(Case):
    """Attention to all tokens of a map, by content and by position."""

    providers: ClassVar[Providers] = {"official matmuls": (official_matmuls, None)}
    cuda_providers: ClassVar[Providers] = providers

    def pairs(self) -> int:
        return self.tokens() ** 2 // self.batch

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(), "gate": (self.heads,), "pos_weight": (self.heads, 3)}

    def visattn(self, backend: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, pos_weight: Tensor) -> Tensor:
            return gated_positional_attention(q, k, v, gate, pos_weight, backend=backend)

        return attend


# ConViT-Ti and -B; ConViT-Ti on an image of 512 x 512.
CASES = [
    GatedPositional("gated_positional_14", 8, (14, 14), 4, 48),
    GatedPositional("gated_positional_14_n16", 8, (14, 14), 16, 48),
    GatedPositional("gated_positional_32", 1, (32, 32), 4, 48),
]

CUDA_CASES = [
    GatedPositional("gated_positional_14", 128, (14, 14), 4, 48, **MIXED),
    GatedPositional("gated_positional_32", 32, (32, 32), 4, 48, **MIXED),
]
TINY = [GatedPositional("tiny_gated_positional", 3, (8, 6), 2, 16, fused=True)]
