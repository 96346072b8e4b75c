"""The attention problems that `bench_ops.py` times, and for each op the peers that it is timed against.

A problem knows its inputs, this package's op on them and its peers: other ways to compute the same thing, of which the
first is the baseline of the ratios. A peer is `(builder, refusal)`: `builder(problem)` prepares what does not count and
returns a function of the inputs; its attributes `into` and `out`, if any, change inputs and output to its own layout,
which does not count either. `refusal(problem, mode)` says why it cannot run, if it cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn
from timm.models.maxxvit import grid_partition, grid_reverse, window_partition, window_reverse
from torch import Tensor, nn

from visattn.ops import halo_attention, neighborhood_attention, window_attention
from visattn.ops.geometry import Axis, neighbors

Attend = Callable[..., Tensor]
Peers = dict[str, tuple[Callable[[Any], Attend], Callable[[Any, str], "str | None"] | None]]


@dataclass(frozen=True)
class Problem:
    """A map of queries, keys and values."""

    name: str
    batch: int
    size: tuple[int, int]
    heads: int
    dim: int

    peers: ClassVar[Peers] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shape = (self.batch, *self.size, self.heads, self.dim)
        return {"q": shape, "k": shape, "v": shape}

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {n: torch.randn(shape, generator=generator) for n, shape in self.shapes().items()}

    def visattn(self, backend: str) -> Attend:
        raise NotImplementedError


@dataclass(frozen=True)
class Neighborhood(Problem):
    """Neighborhood attention, with a position table if `bias`."""

    kernel_size: int
    dilation: int = 1
    bias: bool = False

    def axes(self) -> tuple[Axis, Axis]:
        return tuple(Axis(n, self.kernel_size, self.dilation) for n in self.size)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        width = 2 * self.kernel_size - 1
        return {**super().shapes(), **({"bias": (self.heads, width, width)} if self.bias else {})}

    def visattn(self, backend: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            return neighborhood_attention(q, k, v, self.kernel_size, self.dilation, bias=bias, backend=backend)

        return attend


@dataclass(frozen=True)
class Window(Problem):
    """Window or grid attention with a position table."""

    window: int
    grid: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        width = 2 * self.window - 1
        return {**super().shapes(), "bias": (self.heads, width, width)}

    def visattn(self, backend: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return window_attention(q, k, v, self.window, grid=self.grid, bias=bias, backend=backend)

        return attend


@dataclass(frozen=True)
class Halo(Problem):
    """Halo attention with relative embeddings and timm's border rule."""

    block: int
    halo: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        table = (2 * (self.block + 2 * self.halo) - 1, self.dim)
        return {**super().shapes(), "rel_h": table, "rel_w": table}

    def visattn(self, backend: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
            return halo_attention(q, k, v, self.block, self.halo, 1, rel_h, rel_w, mask_border=False, backend=backend)

        return attend


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


Neighborhood.peers = {
    "gather": (gather, None),
    "unfold": (unfold, lambda case, mode: "no dilation" if case.dilation > 1 else None),
    "dense SDPA": (dense_sdpa, None),
    "natten": (natten, _natten_refusal),
}
Window.peers = {"timm partition": (timm_partition, None)}
Halo.peers = {"timm HaloAttn": (timm_halo, None)}

PROBLEMS = [
    Neighborhood("na2d_56", 2, (56, 56), 2, 32, 7),
    Neighborhood("na2d_56_bias", 2, (56, 56), 2, 32, 7, bias=True),
    Neighborhood("na2d_56_d8", 2, (56, 56), 2, 32, 7, dilation=8),
    Neighborhood("na2d_28_d4_bias", 2, (28, 28), 4, 32, 7, dilation=4, bias=True),
    Neighborhood("na2d_14_bias", 2, (14, 14), 8, 32, 7, bias=True),
    Window("window_56", 2, (56, 56), 2, 32, 7),
    Window("grid_56", 2, (56, 56), 2, 32, 7, grid=True),
    Halo("halo_64_8heads", 1, (64, 64), 8, 8, 8, 3),
    Halo("halo_64_8heads_b4", 4, (64, 64), 8, 8, 8, 3),
    Halo("halo_64_4heads", 1, (64, 64), 4, 16, 8, 3),
    Halo("halo_56_d32", 1, (56, 56), 4, 32, 8, 3),
]
