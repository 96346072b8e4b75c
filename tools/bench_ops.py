"""Time attention ops against named peers, in one run: a correctness gate first, then interleaved medians.

    python tools/bench_ops.py                                     # every case and provider that can run here
    python tools/bench_ops.py --cases na2d_56_d8 --modes forward  # a part of it
    python tools/bench_ops.py --out tools/results/ops_cpu         # also write ops_cpu.json and ops_cpu.md

A provider whose output or gradients differ from the float64 reference is not timed, and the exit status is 1. Times are
CPU seconds of this process on one thread, so that other load on the machine shows little; only the ratios of one run
are meant to be compared. Peak memory is what the allocator handed out above the inputs.
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
from op_problems import PROBLEMS, Attend, Problem
from report import number, publish
from torch import Tensor
from torch.profiler import profile

TOLERANCE = 1e-5  # norm-wise, float32 against float64
MODES = ("forward", "forward+backward")


@dataclass
class Result:
    """One cell of the table; times in milliseconds, memory in MB, ratios against the case's first peer."""

    case: str
    mode: str
    provider: str
    error: float | None = None
    median_ms: float | None = None
    calls: int = 0
    times_faster: float | None = None
    peak_mb: float | None = None
    saved_mb: float | None = None
    note: str = ""


def runner(attend: Attend, inputs: dict[str, Tensor], mode: str) -> Callable[[], list[Tensor]]:
    """A call that returns the output and, with the backward, the gradient of every input."""
    inputs = attend.into(**inputs) if hasattr(attend, "into") else inputs
    if mode == "forward":

        def run() -> list[Tensor]:
            with torch.no_grad():
                return [attend(**inputs)]

        return run
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    shape = attend(**inputs).shape
    cotangent = torch.ones((), dtype=next(iter(inputs.values())).dtype).expand(shape)

    def run_both() -> list[Tensor]:
        out = attend(**leaves)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), cotangent)]

    return run_both


def expected_results(case: Problem, mode: str) -> dict[str, Tensor]:
    """The output ("out") and gradients (by input) of the reference in float64."""
    inputs = {n: t.double() for n, t in case.inputs().items()}
    out, *grads = runner(case.visattn("reference"), inputs, mode)()
    return {"out": out, **dict(zip(inputs, grads, strict=False))}


def in_layout(attend: Attend, expected: dict[str, Tensor]) -> list[Tensor]:
    """The expected results as `attend` lays them out: gradients lie as the inputs do."""
    out, grads = expected["out"], {n: t for n, t in expected.items() if n != "out"}
    out = attend.out(out) if hasattr(attend, "out") else out
    grads = attend.into(**grads) if grads and hasattr(attend, "into") else grads
    return [out, *grads.values()]


def gate(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest norm-wise relative error."""
    return max(((g.double() - e).norm() / e.norm()).item() for g, e in zip(got, expected, strict=True))


def peak_bytes(run: Callable[[], object]) -> int:
    """What the CPU allocator held at most during a call, above what it held before."""
    with profile(profile_memory=True) as profiler:
        kept = run()
    del kept
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def saved_bytes(attend: Attend, inputs: dict[str, Tensor]) -> int:
    """What autograd keeps for the backward pass, inputs included, each storage once."""
    inputs = attend.into(**inputs) if hasattr(attend, "into") else inputs
    kept = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = attend(**{n: t.detach().clone().requires_grad_() for n, t in inputs.items()})
    del out
    return sum(kept.values())


def providers(case: Problem) -> dict[str, tuple[Callable, Callable | None]]:
    """The case's peers, baseline first, and this package's portable backend."""
    return {**case.peers, "visattn eager": (lambda case: case.visattn("eager"), None)}


def measure(case: Problem, mode: str, names: list[str] | None, seconds: float) -> list[Result]:
    """Gate every provider, then time those that passed, one call each in turn."""
    results, runs = {}, {}
    offered = providers(case)
    baseline = next(iter(offered))
    expected = expected_results(case, mode)
    for name in (n for n in offered if names is None or n in names):
        build, refusal = offered[name]
        results[name] = Result(case.name, mode, name, note=(refusal(case, mode) or "") if refusal else "")
        if results[name].note:
            continue
        attend = build(case)
        run = runner(attend, case.inputs(), mode)
        results[name].error = gate(run(), in_layout(attend, expected))
        if not results[name].error <= TOLERANCE:  # NaN fails too
            results[name].note = "wrong result: not timed"
            continue
        results[name].peak_mb = peak_bytes(run) / 1e6
        if mode != "forward":
            results[name].saved_mb = saved_bytes(attend, case.inputs()) / 1e6
        runs[name] = run

    times: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.monotonic() + seconds * len(runs)
    while runs and (time.monotonic() < deadline or min(map(len, times.values())) < 5):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    for name, samples in times.items():
        results[name].median_ms = statistics.median(samples) * 1e3
        results[name].calls = len(samples)
    base = results.get(baseline, Result("", "", "")).median_ms
    for result in results.values():
        if base and result.median_ms:
            result.times_faster = base / result.median_ms
    return list(results.values())


COLUMNS = ("case", "mode", "provider", "median ms", "x baseline", "peak MB", "saved MB", "error", "note")


def row(r: Result) -> list[str]:
    figures = [number(r.median_ms), number(r.times_faster), number(r.peak_mb, ".1f"), number(r.saved_mb, ".1f")]
    return [r.case, r.mode, r.provider, *figures, number(r.error, ".0e"), r.note]


TEXT = """# Ops on a CPU

`{command}` ({setting}).
CPU time of one thread, medians of interleaved calls; `x baseline` is how many times faster than the first
provider of the case in the same run; `saved` is what autograd keeps for the backward pass, inputs included.
Problems and providers are in `tools/op_problems/`. Not measured on a GPU.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[p.name for p in PROBLEMS], default=[p.name for p in PROBLEMS])
    names = sorted({name for case in PROBLEMS for name in providers(case)})
    parser.add_argument("--providers", nargs="+", choices=names)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seconds", type=float, default=3.0, help="wall time per provider, case and mode (>= 5 calls)")
    parser.add_argument("--out", type=Path, help="path without suffix for the .json and .md results")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    results = []
    for case in (p for p in PROBLEMS if p.name in args.cases):
        for mode in args.modes:
            print(f"{case.name}, {mode} ...", flush=True)
            results += measure(case, mode, args.providers, args.seconds)
    publish(results, COLUMNS, row, TEXT, "bench_ops.py", argv, args.out)
    return int(any("wrong" in r.note for r in results))


if __name__ == "__main__":
    sys.exit(main())
