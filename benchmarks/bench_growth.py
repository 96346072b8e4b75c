"""Time and memory of the token mixers on growing maps: linear in the tokens, but for softmax.

    python benchmarks/bench_growth.py                              # all of them, 28 x 28 to 224 x 224
    python benchmarks/bench_growth.py --attention agent --sizes 28 56 --out benchmarks/results/bench_growth_cpu

One layer with its projections and one map, as wide as Swin-T's first stage. Times are CPU seconds of this process on
one thread, medians of interleaved calls. `x linear` divides the growth since the smallest map by the growth of the
tokens: 1 is linear.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_ops import MODES, peak_bytes
from report import publish
from torch import Tensor

from visattn.layers import TOKEN_MIXERS, create_token_mixer

DIM, HEADS = 96, 3


@dataclass
class Result:
    """One row of the table; `times_linear` and `bytes_times_linear` compare with the smallest map."""

    attention: str
    mode: str
    size: int
    tokens: int
    median_ms: float
    calls: int
    times_linear: float
    peak_bytes: int
    bytes_times_linear: float


def runner(attention: str, size: int, mode: str) -> Callable[[], Tensor | None]:
    """A call of the layer on a map of size x size."""
    layer = create_token_mixer(attention, DIM, HEADS, (size, size))
    x = torch.randn(1, size, size, DIM)

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(x)

    leaf = x.clone().requires_grad_()
    leaves = [leaf, *layer.parameters()]

    def forward_backward() -> list[Tensor]:
        return torch.autograd.grad(layer(leaf).sum(), leaves)

    return forward if mode == "forward" else forward_backward


def measure(attention: str, mode: str, sizes: list[int], seconds: float) -> list[Result]:
    """Every map in turn, so that other load on the machine meets them all."""
    runs = {size: runner(attention, size, mode) for size in sizes}
    peaks = {size: peak_bytes(run) for size, run in runs.items()}  # also the first, slower call
    times: dict[int, list[float]] = {size: [] for size in sizes}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or not times[sizes[0]]:
        for size, run in runs.items():
            start = time.process_time()
            run()
            times[size].append(time.process_time() - start)
    medians = {size: statistics.median(samples) for size, samples in times.items()}
    results = []
    for size in sizes:
        tokens = (size / sizes[0]) ** 2
        growth = medians[size] / medians[sizes[0]] / tokens, peaks[size] / peaks[sizes[0]] / tokens
        results.append(
            Result(
                attention, mode, size, size**2, medians[size] * 1e3, len(times[size]), growth[0], peaks[size], growth[1]
            )
        )
    return results


TEXT = """# Growth of the token mixers on a CPU

`{command}` ({setting}).
One layer with projections, 96 channels in 3 heads, one float32 map; CPU time of one thread, medians of interleaved
calls, peak memory above the input. `x linear` is the growth since the smallest map over the growth of the tokens.
"softmax" is PyTorch's `scaled_dot_product_attention`, whose memory is linear too. Not measured on a GPU.
"""
COLUMNS = (
    "attention",
    "mode",
    "map",
    "tokens",
    "ms",
    "us per token",
    "x linear",
    "peak MB",
    "bytes per token",
    "x linear",
)


def row(r: Result) -> list[str]:
    time_cells = [f"{r.median_ms:.2f}", f"{r.median_ms / r.tokens * 1e3:.2f}", f"{r.times_linear:.2f}"]
    memory = [f"{r.peak_bytes / 1e6:.1f}", f"{r.peak_bytes / r.tokens:.0f}", f"{r.bytes_times_linear:.2f}"]
    return [r.attention, r.mode, f"{r.size} x {r.size}", str(r.tokens), *time_cells, *memory]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", nargs="+", choices=list(TOKEN_MIXERS), default=list(TOKEN_MIXERS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[28, 56, 112, 224])
    parser.add_argument("--seconds", type=float, default=10.0, help="wall time per layer and mode (>= 1 call)")
    parser.add_argument("--out", type=Path, help="path without suffix for the .json and .md results")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    results = []
    for attention in args.attention:
        for mode in args.modes:
            print(f"{attention}, {mode} ...", flush=True)
            results += measure(attention, mode, args.sizes, args.seconds)
    publish(results, COLUMNS, row, TEXT, "bench_growth.py", argv, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
