"""What a call of the Triton backend takes on the host: microseconds of Python from the public function to the launch.

    python benchmarks/bench_host.py                                      # on any machine, nothing runs on a GPU
    python benchmarks/bench_host.py --cases na2d_14 --batch 2 --profile  # where the time goes

Under the stub driver of the tests: kernels are compiled, bound and handed to a driver that launches nothing, while the
few operations of PyTorch beside them run on the CPU and count. CPU seconds of this process, the smallest mean of
several rounds. Forward passes are without gradients.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from op_cases import CUDA_CASES
from report import show

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import stub_gpu

CASES = ("na2d_14", "na2d_14_bias", "window_7")
COLUMNS = ("case", "mode", "us", "launches")


@dataclass
class Result:
    case: str
    mode: str
    us: float
    launches: int


def best(run: Callable[[], object], calls: int, rounds: int) -> float:
    """Microseconds of a call, in the round that was disturbed least."""
    means = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            run()
        means.append((time.process_time() - start) / calls)
    return min(means) * 1e6


def runs(name: str, batch: int) -> dict[str, Callable[[], object]]:
    case = replace(next(c for c in CUDA_CASES if c.name == name), batch=batch)
    inputs = case.fuse(case.inputs())
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
    op, grad = case.visattn("triton"), torch.zeros_like(inputs["v"])

    @torch.no_grad()
    def forward() -> object:
        return op(**inputs)

    def forward_backward() -> object:
        return torch.autograd.grad(op(**leaves), list(leaves.values()), grad)

    return {"forward": forward, "forward + backward": forward_backward}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CUDA_CASES], default=CASES)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="also the functions that take longest")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    gpu = stub_gpu.install()
    results = []
    for name in args.cases:
        for mode, run in runs(name, args.batch).items():
            run()
            gpu.launched.clear()
            run()
            launches = len(gpu.launched)
            results.append(Result(name, mode, best(run, args.calls, args.rounds), launches))
            gpu.launched.clear()
            if args.profile:
                with cProfile.Profile() as profile:
                    best(run, args.calls, 1)
                pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    show(results, COLUMNS, lambda r: [r.case, r.mode, f"{r.us:.0f}", str(r.launches)], "host, one thread")
    return 0


if __name__ == "__main__":
    sys.exit(main())
