"""Neighborhood attention against gathers, unfolds, a masked SDPA and natten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from op_problems import Attend, Peers, Problem
from visattn.ops import neighborhood_attention
from visattn.ops.geometry import Axis, neighbors


def _flat_neighbors(case: Neighborhood) -> tuple[Tensor, Tensor]:
    """Key index [S, K * K] of every query, and the index of its entry in the flattened bias table."""
    rows, cols = (neighbors(axis) for axis in case.axes())
    width = 2 * case.kernel_size - 1
    index = rows.index[:, None, :, None] * case.size[1] + cols.index[None, :, None, :]
    entry = rows.displacement[:, None, :, None] * width + cols.displacement[None, :, None, :]
    return index.flatten(2).flatten(0, 1), entry.flatten(2).flatten(0, 1)


def gather(case: Neighborhood) -> Attend:
    """The definition: a copy of the K * K keys and values of every query."""
    index, entry = _flat_neighbors(case)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        query, keys, values = (x.flatten(1, 2) for x in (q, k, v))
        scores = torch.einsum("bsnd,bsmnd->bsnm", query * case.dim**-0.5, keys[:, index])
        if bias is not None:
            scores = scores + bias.flatten(1)[:, entry].transpose(0, 1)
        return torch.einsum("bsnm,bsmnd->bsnd", scores.softmax(-1), values[:, index]).reshape(q.shape)

    return attend


def unfold(case: Neighborhood) -> Attend:
    """Windows by `Tensor.unfold`, the border ones repeated."""
    h, w = case.size
    k_size = case.kernel_size
    starts = [neighbors(axis).index[:, 0] for axis in case.axes()]
    _, entry = _flat_neighbors(case)

    def windows(x: Tensor) -> Tensor:  # [B, H, W, N, D, K, K]
        return x.unfold(1, k_size, 1).unfold(2, k_size, 1).index_select(1, starts[0]).index_select(2, starts[1])

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        scores = torch.einsum("bhwnd,bhwndij->bhwnij", q * case.dim**-0.5, windows(k)).flatten(-2)
        if bias is not None:
            scores = scores + bias.flatten(1)[:, entry].transpose(0, 1).unflatten(0, (h, w))
        weights = scores.softmax(-1).unflatten(-1, (k_size, k_size))
        return torch.einsum("bhwnij,bhwndij->bhwnd", weights, windows(v))

    return attend


def dense_sdpa(case: Neighborhood) -> Attend:
    """`scaled_dot_product_attention` over the whole map with a mask that holds window and bias."""
    index, entry = _flat_neighbors(case)
    tokens = index.shape[0]
    mask = torch.full((1, 1, tokens, tokens), float("-inf")).scatter_(3, index[None, None], 0.0)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        added = mask
        if bias is not None:
            values = bias.flatten(1)[:, entry]
            added = mask.expand(1, len(bias), -1, -1).scatter(3, index.expand(1, len(bias), -1, -1), values[None])
        query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(query, key, value, added).transpose(1, 2).reshape(q.shape)

    return attend


def natten(case: Neighborhood) -> Attend:
    """natten >= 0.20, whose CPU path is eager FlexAttention."""
    from natten import na2d

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return na2d(q, k, v, kernel_size=case.kernel_size, dilation=case.dilation)

    return attend


def _natten_refusal(case: Neighborhood, mode: str) -> str | None:
    try:
        import natten  # noqa: F401
    except ImportError:
        return "not installed"
    if case.bias:
        return "no relative position bias since 0.20"
    return "FlexAttention has no backward on CPU" if mode != "forward" else None


@dataclass(frozen=True)
class Neighborhood(Problem):
    """Neighborhood attention, with a position table if `bias`."""

    kernel_size: int
    dilation: int = 1
    bias: bool = False

    peers: ClassVar[Peers] = {
        "gather": (gather, None),
        "unfold": (unfold, lambda case, mode: "no dilation" if case.dilation > 1 else None),
        "dense SDPA": (dense_sdpa, None),
        "natten": (natten, _natten_refusal),
    }

    def axes(self) -> tuple[Axis, Axis]:
        return tuple(Axis(n, self.kernel_size, self.dilation) for n in self.size)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        width = 2 * self.kernel_size - 1
        return {**super().shapes(), **({"bias": (self.heads, width, width)} if self.bias else {})}

    def visattn(self, backend: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            return neighborhood_attention(q, k, v, self.kernel_size, self.dilation, bias=bias, backend=backend)

        return attend


PROBLEMS = [
    Neighborhood("na2d_56", 2, (56, 56), 2, 32, 7),
    Neighborhood("na2d_56_bias", 2, (56, 56), 2, 32, 7, bias=True),
    Neighborhood("na2d_56_d8", 2, (56, 56), 2, 32, 7, dilation=8),
    Neighborhood("na2d_28_d4_bias", 2, (28, 28), 4, 32, 7, dilation=4, bias=True),
    Neighborhood("na2d_14_bias", 2, (14, 14), 8, 32, 7, bias=True),
]
