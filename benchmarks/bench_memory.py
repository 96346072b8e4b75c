"""Peak memory of TransNeXt's first attention layer on growing images, beside the position bias of all pairs.

    python benchmarks/bench_memory.py                    # transnext_tiny at 224 to 800
    python benchmarks/bench_memory.py --images 400 1600 --out benchmarks/results/bench_memory_cpu

The peak is what the allocator handed out above the input of one image, forward and forward + backward.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import report
import timm
import torch
from bench_ops import peak_bytes
from torch import Tensor

import visattn  # noqa: F401


@dataclass
class Result:
    """One row of the table; bytes."""

    image: int
    tokens: int
    pooled: int
    forward: int
    forward_backward: int
    all_pairs: int


def measure(image: int) -> Result:
    """The first attention layer for one image of this size."""
    attention = timm.create_model("transnext_tiny").stages[0].blocks[0].attn
    size = -(-image // 4)
    x = torch.randn(1, size, size, attention.proj.in_features)
    leaf = x.clone().requires_grad_()

    def forward() -> Tensor:
        with torch.no_grad():
            return attention(x)

    pooled = (size // attention.sr_ratio[0]) ** 2
    peaks = peak_bytes(forward), peak_bytes(lambda: attention(leaf).sum().backward())
    return Result(image, size**2, pooled, *peaks, attention.num_heads * size**2 * pooled * 4)


TEXT = """# Memory of aggregated attention on a CPU

`{command}` ({setting}).
The first attention layer of `transnext_tiny` with its projections, one float32 image: peak above the input. The last
two columns are arithmetic: the position bias of all pairs of tokens and pooled keys, which is never made.
Not measured on a GPU.
"""
COLUMNS = ("image", "tokens", "pooled keys", "forward, MB", "bytes per token", "forward + backward, MB",
           "bytes per token", "bias of all pairs, MB", "bytes per token")  # fmt: skip


def row(r: Result) -> list[str]:
    found = [str(r.image), str(r.tokens), str(r.pooled)]
    for peak in (r.forward, r.forward_backward, r.all_pairs):
        found += [f"{peak / 1e6:.1f}", f"{peak / r.tokens:.0f}"]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", type=int, default=[224, 400, 800])
    parser.add_argument("--out", type=Path, help="path without suffix for the .json and .md results")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    results = [measure(image) for image in args.images]
    report.publish(results, COLUMNS, row, TEXT, "bench_memory.py", argv, args.out, "one image, one thread")
    return 0


if __name__ == "__main__":
    sys.exit(main())
