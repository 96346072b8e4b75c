"""Bi-level routing attention against the official formulation, written from its description."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from op_cases import MIXED, Attend, Case, Providers, round_up
from visattn.ops import bilevel_routing_attention


def official_gather(case: Routed) -> Attend:
    """Regions by reshaping, top-k, `gather` from keys and values expanded over the query regions, matmuls."""
    n, (h, w), channels = case.n_win, (length // case.n_win for length in case.size), case.heads * case.dim
    scale = channels**-0.5

    def cut(x: Tensor) -> Tensor:  # [B, regions, h, w, C]
        x = x.flatten(3).unflatten(2, (n, w)).unflatten(1, (n, h))
        return x.transpose(2, 3).reshape(len(x), n * n, h, w, channels)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, regions = len(q), n * n
        query, kv = cut(q), torch.cat([cut(k), cut(v)], dim=-1)
        means = query.mean((2, 3)).detach(), kv[..., :channels].mean((2, 3)).detach()
        logits, index = torch.topk((means[0] * scale) @ means[1].mT, case.topk, dim=-1)
        logits.softmax(dim=-1)
        expanded = kv.flatten(2, 3)[:, None].expand(-1, regions, -1, -1, -1)
        listed = torch.gather(expanded, 2, index[..., None, None].expand(-1, -1, -1, h * w, 2 * channels))
        heads = (case.heads, case.dim)
        keys, values = (x.reshape(batch * regions, -1, *heads) for x in listed.split(channels, dim=-1))
        query = query.reshape(batch * regions, -1, *heads).transpose(1, 2)
        weights = ((query * scale) @ keys.permute(0, 2, 3, 1)).softmax(dim=-1)
        out = (weights @ values.transpose(1, 2)).transpose(1, 2).reshape(batch, n, n, h, w, *heads)
        return out.transpose(2, 3).reshape(q.shape)

    return attend


def _official_can_run(case: Routed) -> str | None:
    return "regions do not divide the map" if any(n % case.n_win for n in case.size) else None


@dataclass(frozen=True)
class Routed(Case):
    """Routing of regions, and attention to the `topk` best."""

    topk: int
    n_win: int = 7

    providers: ClassVar[Providers] = {"official gather": (official_gather, None)}
    cuda_providers: ClassVar[Providers] = {
        "official gather": (official_gather, lambda case, mode: _official_can_run(case)),
        "FlexAttention compiled": (official_gather, lambda case, mode: "the mask depends on the content: no fixed one"),
    }

    def region(self) -> tuple[int, int]:
        h, w = (-(-n // self.n_win) for n in self.size)
        return h, w

    def pairs(self) -> int:
        regions = math.prod(-(-n // side) for n, side in zip(self.size, self.region(), strict=True))
        tokens = math.prod(self.region())
        return regions * round_up(tokens) * round_up(self.topk * tokens)

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """In a narrow dtype, with regions that differ clearly, so that rounding cannot change which are the best."""
        inputs = super().inputs(device)
        if self.dtype == torch.float32:
            return inputs
        (h, w), (height, width) = self.region(), self.size
        rows, columns = (torch.arange(n, device=device) // side for n, side in ((height, h), (width, w)))
        region = rows[:, None] * (-(-width // w)) + columns
        number = int(region.max()) + 1
        if number > self.heads * self.dim:
            raise ValueError(f"expected at most as many regions as channels, got {number} and {self.heads * self.dim}")
        # Query region p prefers the key regions in the order p, p + 1, ...: its mean is the rank, in a channel each.
        order = torch.arange(number, device=device)
        rank = (order - order[:, None]) % number / number
        means = {"q": 1 - rank, "k": 2 * torch.eye(number, device=device)}
        share = F.one_hot(region.flatten(), number).float()
        for name, mean in means.items():
            noise = inputs[name].float().flatten(3).flatten(1, 2)
            noise = noise - share @ (share.T @ noise / share.sum(0)[:, None])
            placed = noise + F.pad(mean, (0, noise.shape[-1] - number))[region.flatten()]
            inputs[name] = placed.reshape(inputs[name].shape).to(self.dtype)
        return inputs

    def visattn(self, backend: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return bilevel_routing_attention(q, k, v, self.n_win, self.topk, backend=backend)

        return attend


# The three stages of BiFormer-T and -S at 224 x 224.
CASES = [
    Routed("routed_56_topk1", 8, (56, 56), 2, 32, 1),
    Routed("routed_28_topk4", 8, (28, 28), 4, 32, 4),
    Routed("routed_14_topk16", 8, (14, 14), 8, 32, 16),
]

# The same at batch 128, and a detector's map of 800 x 1216.
CUDA_CASES = [
    Routed("routed_56_topk1", 128, (56, 56), 2, 32, 1, **MIXED),
    Routed("routed_28_topk4", 128, (28, 28), 4, 32, 4, **MIXED),
    Routed("routed_14_topk16", 128, (14, 14), 8, 32, 16, **MIXED),
    Routed("routed_dense_200x304", 2, (200, 304), 2, 32, 1, **MIXED),
]
TINY = [Routed("tiny_routed", 3, (8, 12), 2, 16, 2, 2, fused=True)]
