"""Bi-level routing attention against the official formulation, written from its description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from op_problems import Attend, Peers, Problem
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


@dataclass(frozen=True)
class Routed(Problem):
    """Routing of regions, and attention to the `topk` best."""

    topk: int
    n_win: int = 7

    peers: ClassVar[Peers] = {"official gather": (official_gather, None)}

    def visattn(self, backend: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return bilevel_routing_attention(q, k, v, self.n_win, self.topk, backend=backend)

        return attend


# The three stages of BiFormer-T and -S at 224 x 224.
PROBLEMS = [
    Routed("routed_56_topk1", 8, (56, 56), 2, 32, 1),
    Routed("routed_28_topk4", 8, (28, 28), 4, 32, 4),
    Routed("routed_14_topk16", 8, (14, 14), 8, 32, 16),
]
