"""The attention problems that `bench_ops.py` times, and for each op the peers that it is timed against; a file per op.

A problem knows its inputs, this package's op on them and its peers: other ways to compute the same thing, of which the
first is the baseline of the ratios. A peer is `(builder, refusal)`: `builder(problem)` prepares what does not count and
returns a function of the inputs; its attributes `into` and `out`, if any, change inputs and output to its own layout,
which does not count either. `refusal(problem, mode)` says why it cannot run, if it cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

# Files of this folder, each with its PROBLEMS.
OPS = ("neighborhood", "window", "halo", "routed", "aggregated", "agent", "linear")

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


PROBLEMS = [problem for op in OPS for problem in import_module(f"{__name__}.{op}").PROBLEMS]
