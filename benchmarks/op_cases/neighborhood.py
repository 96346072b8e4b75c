"""Neighborhood attention against gathers, unfolds, a masked SDPA and natten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from op_cases import MIXED, Attend, Case, Providers, partitioned, round_up
from op_cases.flex import flex
from visattn.ops import neighborhood_attention
from visattn.ops.geometry import Axis, neighbors

NATTEN = ("cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna")


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


def _natten_can_run(case: Neighborhood, mode: str) -> str | None:
    try:
        import natten  # noqa: F401
    except ImportError:
        return "not installed"
    if case.bias:
        return "no relative position bias since 0.20"
    return "FlexAttention has no backward on CPU" if mode != "forward" else None


def _natten_backend(backend: str) -> tuple[Callable, Callable]:
    """natten's kernels by name; they copy views of a fused projection, as in natten's own modules."""

    def build(case: Neighborhood) -> Attend:
        from natten import na2d

        window = {"kernel_size": case.kernel_size, "dilation": case.dilation}
        return lambda q, k, v: na2d(q, k, v, **window, backend=backend)

    def can_run(case: Neighborhood, mode: str) -> str | None:
        return _natten_can_run(case, "forward")

    return build, can_run


def compiled_flex(case: Neighborhood) -> Attend:
    """The group of the query, and the window around its position, shifted inside at the border."""
    size, dilation, half = case.kernel_size, case.dilation, case.kernel_size // 2

    def sees(length: int) -> Callable[[Any, Any], Any]:
        def one_axis(q: Any, k: Any) -> Any:
            last = (length - 1 - q % dilation) // dilation  # position in the group
            centre = (q // dilation).clamp(min=half)
            centre = torch.minimum(centre, last - half)
            # Not by an absolute difference: CUDA 13's ptxas compiles those wrong for Hopper.
            near = (k // dilation >= centre - half) & (k // dilation <= centre + half)
            return (q % dilation == k % dilation) & near

        return one_axis

    def entry(q: Any, k: Any) -> Any:
        return (k // dilation - q // dilation + size - 1).clamp(0, 2 * size - 2)

    attend = flex(case, (sees(case.size[0]), sees(case.size[1])), (entry, entry), case.size)
    return lambda q, k, v, bias=None: attend(q, k, v, *([] if bias is None else [bias]))


def _partition(case: Neighborhood) -> tuple[int, bool] | str:
    if any(case.kernel_size * case.dilation != n for n in case.size):
        return "windows that overlap are no partition"
    return case.kernel_size, True


@dataclass(frozen=True)
class Neighborhood(Case):
    """Neighborhood attention, with a position table if `bias`."""

    kernel_size: int
    dilation: int = 1
    bias: bool = False

    providers: ClassVar[Providers] = {
        "gather": (gather, None),
        "unfold": (unfold, lambda case, mode: "no dilation" if case.dilation > 1 else None),
        "dense SDPA": (dense_sdpa, None),
        "natten": (natten, _natten_can_run),
    }
    cuda_providers: ClassVar[Providers] = {
        **{f"natten {name}": _natten_backend(name) for name in NATTEN},
        "FlexAttention compiled": (compiled_flex, None),
        **partitioned.providers(_partition),
    }

    def axes(self) -> tuple[Axis, Axis]:
        return tuple(Axis(n, self.kernel_size, self.dilation) for n in self.size)

    def pairs(self) -> int:
        """Every group of a dilated map is a map of its own."""
        rows, columns = (self._unions(n) for n in self.size)
        return 64 * sum(a * b * round_up(i * j) for i, a in rows.items() for j, b in columns.items())

    def _unions(self, length: int) -> Counter[int]:
        """How many tiles of 8 queries on an axis see how many keys."""
        unions: Counter[int] = Counter()
        for group in range(self.dilation):
            index = neighbors(Axis(-(-(length - group) // self.dilation), self.kernel_size)).index
            unions.update(int(tile.max() - tile.min()) + 1 for tile in index.split(8))
        return unions

    def shapes(self) -> dict[str, tuple[int, ...]]:
        width = 2 * self.kernel_size - 1
        return {**super().shapes(), **({"bias": (self.heads, width, width)} if self.bias else {})}

    def visattn(self, backend: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            return neighborhood_attention(q, k, v, self.kernel_size, self.dilation, bias=bias, backend=backend)

        return attend


CASES = [
    Neighborhood("na2d_56", 2, (56, 56), 2, 32, 7),
    Neighborhood("na2d_56_bias", 2, (56, 56), 2, 32, 7, bias=True),
    Neighborhood("na2d_56_d8", 2, (56, 56), 2, 32, 7, dilation=8),
    Neighborhood("na2d_28_d4_bias", 2, (28, 28), 4, 32, 7, dilation=4, bias=True),
    Neighborhood("na2d_14_bias", 2, (14, 14), 8, 32, 7, bias=True),
]

# DiNAT-T and -B at 224 x 224 (heads 2, 4, 8 and 4, 8), and a detector's map of 800 x 1216.
CUDA_CASES = [
    Neighborhood("na2d_56", 128, (56, 56), 2, 32, 7, **MIXED),
    Neighborhood("na2d_28", 128, (28, 28), 4, 32, 7, **MIXED),
    Neighborhood("na2d_14", 128, (14, 14), 8, 32, 7, **MIXED),
    Neighborhood("na2d_56_bias", 128, (56, 56), 2, 32, 7, bias=True, **MIXED),
    Neighborhood("na2d_28_bias", 128, (28, 28), 4, 32, 7, bias=True, **MIXED),
    Neighborhood("na2d_14_bias", 128, (14, 14), 8, 32, 7, bias=True, **MIXED),
    Neighborhood("na2d_56_d8", 128, (56, 56), 2, 32, 7, dilation=8, **MIXED),
    Neighborhood("na2d_56_d8_bias", 128, (56, 56), 2, 32, 7, dilation=8, bias=True, **MIXED),
    Neighborhood("na2d_28_d4_bias", 128, (28, 28), 4, 32, 7, dilation=4, bias=True, **MIXED),
    Neighborhood("na2d_14_d2_bias", 128, (14, 14), 8, 32, 7, dilation=2, bias=True, **MIXED),
    Neighborhood("na2d_56_base_bias", 128, (56, 56), 4, 32, 7, bias=True, **MIXED),
    Neighborhood("na2d_28_base_bias", 128, (28, 28), 8, 32, 7, bias=True, **MIXED),
    Neighborhood("na2d_dense_200x304_bias", 2, (200, 304), 2, 32, 7, bias=True, **MIXED),
    Neighborhood("na2d_dense_100x152", 8, (100, 152), 4, 32, 7, **MIXED),
]
TINY = [
    Neighborhood("tiny_na2d_bias", 3, (14, 13), 2, 16, 7, bias=True, fused=True),
    Neighborhood("tiny_na2d_d2", 3, (14, 14), 2, 16, 7, dilation=2, fused=True),
]
