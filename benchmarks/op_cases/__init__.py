"""The attention cases that `bench_ops.py` times, and for each op the providers that it is timed against; a file per op.

A case knows its inputs, this package's op on them and its providers: other ways to compute the same thing, of which the
first is the baseline of the ratios on a CPU. A provider is `(builder, can_run)`: `builder(case)` prepares what does not
count and returns a function of the inputs; its attributes `into` and `out`, if any, change inputs and output to its own
layout, which does not count either, and `parameter_tolerance` is a wider one for its gradients of parameters.
`can_run(case, mode)` says why it cannot run, if it cannot.

`CASES` and `providers` are for a CPU, `CUDA_CASES` and `cuda_providers` for a GPU, most important first. `TINY` are
cases of the second kind, small enough for the Triton interpreter; they run only on request.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

# Files of this folder, each with its CASES, CUDA_CASES and TINY.
OPS = (
    "neighborhood",
    "window",
    "halo",
    "routed",
    "aggregated",
    "agent",
    "gated_positional",
    "linear",
    "mix",
)

Attend = Callable[..., Tensor]
Providers = dict[str, tuple[Callable[[Any], Attend], Callable[[Any, str], "str | None"] | None]]

# How the cases for a GPU are given: as in training in mixed precision, behind fused projections.
MIXED: dict[str, Any] = {"dtype": torch.bfloat16, "fused": True}


def round_up(n: int, multiple: int = 16) -> int:
    """16: the sides of the smallest matrices that the tensor cores multiply."""
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Case:
    """A map of queries, keys and values.

    Attributes:
        dtype: Of everything that has a batch axis. Parameters are float32, as in training in mixed precision.
        fused: Tensors of the same projection (`projections`) are views of one tensor, as the layers give them; the
            gradient of the output is dense and random. Otherwise all are contiguous, and it is 1 everywhere.
    """

    name: str
    batch: int
    size: tuple[int, int]
    heads: int
    dim: int
    dtype: torch.dtype = field(default=torch.float32, kw_only=True)
    fused: bool = field(default=False, kw_only=True)

    providers: ClassVar[Providers] = {}
    cuda_providers: ClassVar[Providers] = {}
    maps: ClassVar[tuple[str, ...]] = ("q", "k", "v")  # the inputs that have a batch axis
    projections: ClassVar[tuple[tuple[str, ...], ...]] = (("q", "k", "v"),)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shape = (self.batch, *self.size, self.heads, self.dim)
        return {"q": shape, "k": shape, "v": shape}

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        random = {n: torch.randn(s, generator=generator, device=device) for n, s in self.shapes().items()}
        return {n: t.to(self.dtype) if n in self.maps else t for n, t in random.items()}

    def fuse(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs, with those of a projection as views of one tensor [B, H, W, 2 or 3, N, D]."""
        fused = dict(inputs)
        for names in self.projections:
            fused.update(zip(names, torch.stack([inputs[n] for n in names], dim=3).unbind(3), strict=True))
        return fused

    def mixed_precision(self, device: torch.device) -> contextlib.AbstractContextManager:
        """What official modules run under when the maps are of a narrow dtype and their parameters are not."""
        if self.dtype in (torch.float16, torch.bfloat16):
            return torch.autocast(device.type, dtype=self.dtype)
        return contextlib.nullcontext()

    def visattn(self, backend: str) -> Attend:
        raise NotImplementedError

    def tokens(self) -> int:
        return math.prod(self.size)

    def pairs(self) -> int:
        """Products of a query and a key for one head of one image, as a kernel on tensor cores visits them.

        Queries in tiles of 8 x 8, windows or regions, against the keys that any of them sees; both rounded up to 16.
        """
        raise NotImplementedError

    def work(self) -> tuple[float, float]:
        """Floating-point operations of the products, and exponentials, of the forward pass."""
        pairs = self.batch * self.heads * self.pairs()
        return 4 * pairs * round_up(self.dim), pairs


_MODULES = {op: import_module(f"{__name__}.{op}") for op in OPS}
CASES: list[Case] = [case for op in OPS for case in _MODULES[op].CASES]
CUDA_CASES: list[Case] = [case for op in OPS for case in _MODULES[op].CUDA_CASES]
TINY: list[Case] = [case for op in OPS for case in _MODULES[op].TINY]


def op_of(case: Case) -> str:
    """The file that the case is in, which is the op's folder in `visattn/ops`."""
    return type(case).__module__.rpartition(".")[2]
