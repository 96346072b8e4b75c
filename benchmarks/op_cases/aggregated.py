"""TransNeXt's aggregated attention against the official formulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from op_cases import MIXED, Attend, Case, Providers, round_up
from visattn.ops import aggregated_attention
from visattn.ops.aggregated.reference import log_coordinates
from visattn.ops.geometry import Pooled


def official_unfold(case: Aggregated) -> Attend:
    """The official PyTorch code's way: neighbours by `F.unfold`, the bias of all pairs gathered from a table.

    The table's coordinates, its index of all pairs and the border mask do not count, nor do head-first layouts.
    """
    axes = [Pooled(n, p) for n, p in zip(case.size, case.pool, strict=True)]
    coordinates = [log_coordinates(axis, axis.length, torch.float32, torch.device("cpu")) for axis in axes]
    pairs = torch.stack(torch.meshgrid(*coordinates, indexing="ij"), dim=-1).flatten(0, 1)
    rows, columns = (axis.index() for axis in axes)
    index = (rows[:, None, :, None] * len(coordinates[1]) + columns[None, :, None, :]).flatten()
    inside = F.unfold(torch.ones(1, 1, *case.size), case.kernel_size, padding=case.kernel_size // 2)[0].T > 0
    places, pooled, slots = len(inside), case.pool[0] * case.pool[1], case.kernel_size**2
    length = (inside.sum(-1, keepdim=True) + pooled).log()
    constants = {torch.device("cpu"): (pairs, index, inside, length)}

    def attend(q: Tensor, *tensors: Tensor, **named: Tensor) -> Tensor:
        if q.device not in constants:
            constants[q.device] = tuple(t.to(q.device) for t in (pairs, index, inside, length))
        with case.mixed_precision(q.device):
            return formula(*constants[q.device], q, *tensors, **named)

    def formula(
        pairs: Tensor,
        index: Tensor,
        inside: Tensor,
        length: Tensor,
        q: Tensor,
        pool_k: Tensor,
        pool_v: Tensor,
        temperature: Tensor,
        query_embedding: Tensor,
        cpb_weight1: Tensor,
        cpb_bias1: Tensor,
        cpb_weight2: Tensor,
        cpb_bias2: Tensor,
        kv: Tensor,
        local_bias: Tensor,
        tokens: Tensor,
        token_bias: Tensor,
    ) -> Tensor:
        batch, heads, _, dim = q.shape
        unit = F.normalize(q, dim=-1)
        query = (unit + query_embedding[:, None]) * F.softplus(temperature)[:, None, None] * length
        k, v = kv.unflatten(-1, (2, heads, dim)).unbind(2)
        kv = torch.cat([F.normalize(k, dim=-1).flatten(2), v.flatten(2)], dim=-1).mT.unflatten(-1, case.size)
        near = F.unfold(kv, case.kernel_size, padding=case.kernel_size // 2)
        near_k, near_v = near.view(batch, 2 * heads, dim, slots, places).permute(0, 1, 4, 2, 3).chunk(2, dim=1)
        local = (query.unsqueeze(-2) @ near_k).squeeze(-2) + local_bias[:, None]
        table = F.linear(F.linear(pairs, cpb_weight1, cpb_bias1).relu(), cpb_weight2, cpb_bias2)
        bias = table.T[:, index].view(heads, places, pooled)
        scores = query @ F.normalize(pool_k, dim=-1).mT + bias
        weights = torch.cat([local.masked_fill(~inside, float("-inf")), scores], dim=-1).softmax(-1)
        local, scores = weights.split([slots, pooled], dim=-1)
        local = unit @ tokens + token_bias[:, None] + local
        return (local.unsqueeze(-2) @ near_v.mT).squeeze(-2) + scores @ pool_v

    def heads_first(x: Tensor) -> Tensor:
        return x.flatten(1, 2).transpose(1, 2).contiguous()

    def into(q: Tensor, pool_k: Tensor, pool_v: Tensor, k: Tensor, v: Tensor, **rest: Tensor) -> dict[str, Tensor]:
        maps = {"q": heads_first(q), "pool_k": heads_first(pool_k), "pool_v": heads_first(pool_v)}
        return {**maps, "kv": torch.cat([k.flatten(3), v.flatten(3)], dim=-1).flatten(1, 2), **rest}

    attend.into, attend.out = into, heads_first
    if case.dtype != torch.float32:
        attend.parameter_tolerance = 0.1  # its perceptron is bfloat16 in mixed precision
    return attend


@dataclass(frozen=True)
class Aggregated(Case):
    """Aggregated attention with all its parts, the perceptron of the position bias included."""

    pool: tuple[int, int] = (7, 7)
    kernel_size: int = 3
    hidden: int = 512

    providers: ClassVar[Providers] = {"official unfold": (official_unfold, None)}
    cuda_providers: ClassVar[Providers] = {
        **providers,
        "FlexAttention compiled": (official_unfold, lambda case, mode: "head_dim 24, and weights beside the softmax"),
    }
    maps: ClassVar[tuple[str, ...]] = ("q", "k", "v", "pool_k", "pool_v")
    projections: ClassVar[tuple[tuple[str, ...], ...]] = (("k", "v"), ("pool_k", "pool_v"))

    def pairs(self) -> int:
        near = round_up((8 + self.kernel_size - 1) ** 2)
        return self.tokens() * (near + round_up(self.pool[0] * self.pool[1]))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        maps, pooled = super().shapes(), (self.batch, *self.pool, self.heads, self.dim)
        slots = self.kernel_size**2
        return {
            "q": maps["q"],
            "pool_k": pooled,
            "pool_v": pooled,
            "temperature": (self.heads,),
            "query_embedding": (self.heads, self.dim),
            "cpb_weight1": (self.hidden, 2),
            "cpb_bias1": (self.hidden,),
            "cpb_weight2": (self.heads, self.hidden),
            "cpb_bias2": (self.heads,),
            "k": maps["k"],
            "v": maps["v"],
            "local_bias": (self.heads, slots),
            "tokens": (self.heads, self.dim, slots),
            "token_bias": (self.heads, slots),
        }

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """As after initialisation, the perceptron's output is of order 1."""
        inputs = super().inputs(device)
        return {**inputs, "cpb_weight2": inputs["cpb_weight2"] * self.hidden**-0.5}

    def visattn(self, backend: str) -> Attend:
        def attend(**tensors: Tensor) -> Tensor:
            size = {"pretrain_size": self.size, "kernel_size": self.kernel_size}
            return aggregated_attention(**tensors, **size, backend=backend)

        return attend


CASES = [
    Aggregated("aggregated_56", 2, (56, 56), 3, 24),
    Aggregated("aggregated_28", 2, (28, 28), 6, 24),
]

# The stages of TransNeXt-T at 224 x 224, and a detector's map of 800 x 1216.
CUDA_CASES = [
    Aggregated("aggregated_56", 128, (56, 56), 3, 24, **MIXED),
    Aggregated("aggregated_28", 128, (28, 28), 6, 24, **MIXED),
    Aggregated("aggregated_14", 128, (14, 14), 12, 24, **MIXED),
    Aggregated("aggregated_dense_100x152", 2, (100, 152), 6, 24, (25, 38), **MIXED),
]
TINY = [Aggregated("tiny_aggregated", 3, (8, 8), 2, 24, (2, 2), hidden=16, fused=True)]
