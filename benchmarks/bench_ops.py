"""Time attention ops against named providers, in one run: a correctness gate first, then interleaved medians.

    python benchmarks/bench_ops.py                                     # every case and provider that can run here
    python benchmarks/bench_ops.py --cases na2d_56_d8 --modes forward  # a part of it
    python benchmarks/bench_ops.py --out benchmarks/results/ops_cpu         # also write ops_cpu.json and ops_cpu.md
    python benchmarks/bench_ops.py --device cuda       # other cases, on the GPU: benchmarks/results/<gpu>/

A provider whose output or gradients differ from the float64 reference is not timed, and the exit status is 1. Times are
CPU seconds of this process on one thread, so that other load on the machine shows little; only the ratios of one run
are meant to be compared. Peak memory is what the allocator handed out above the inputs.

On a GPU the gate compares the first and the last image of the batch, times are those of the kernels with a cold cache
(bench_device.py), and the columns and goals are those of gpu_report.py. Without a GPU the exit status is 2.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_report
import torch
from bench_device import CPU, Cpu, open_device
from bench_device import peak_bytes as peak_bytes  # other benchmarks take it from here
from gpu_report import TRITON, GpuResult
from op_cases import CASES, CUDA_CASES, OPS, TINY, Attend, Case, op_of
from op_gate import TOLERANCES, Given, runner
from report import failure, number, publish, show
from torch import Tensor

from visattn.ops.dispatch import BackendError

TOLERANCE = TOLERANCES[torch.float32]
MODES = ("forward", "forward+backward")
SECONDS = {"cpu": 3.0, "cuda": 0.3}


@dataclass
class Result:
    """One cell of the table; times in milliseconds, memory in MB, ratios against the case's first provider."""

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


def saved_bytes(attend: Attend, inputs: dict[str, Tensor]) -> int:
    """What autograd keeps for the backward pass, inputs included, each storage once."""
    inputs = attend.into(**inputs) if hasattr(attend, "into") else inputs
    kept = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = attend(**{n: t.detach().requires_grad_() for n, t in inputs.items()})
    del out
    return sum(kept.values())


def backend(name: str) -> tuple[Callable, Callable | None]:
    return lambda case: case.visattn(name), None


def providers(case: Case, is_gpu: bool = False) -> dict[str, tuple[Callable, Callable | None]]:
    """The case's other providers, on a CPU the baseline first, and this package's backends."""
    ours = {"visattn eager": backend("eager")}
    if not is_gpu:
        return {**case.providers, **ours}
    compiled = (lambda case: torch.compile(case.visattn("eager"), dynamic=False), None)
    return {**case.cuda_providers, **ours, "visattn eager compiled": compiled, TRITON: backend("triton")}


def reason(error: Exception) -> str:
    """Why a provider has no number."""
    return str(error) if isinstance(error, BackendError) else failure(error)


def prepare(attend: Attend, mode: str, given: Given, device: Cpu, result: Result | GpuResult) -> Callable:
    """Gate a provider, and note in the result what was found; returns the call to time."""
    checked, dense = given.cotangents(attend)
    run = runner(attend, given.inputs, mode, checked)
    device.poison()
    start = time.perf_counter()
    got = run()
    device.synchronize()
    first_s = time.perf_counter() - start
    result.error, is_right = given.check(attend, got)
    del got
    if not is_right:
        result.note = "wrong result: not timed"
        return run
    if checked is not None:
        checked.copy_(dense)
    if isinstance(result, GpuResult):
        result.first_s = first_s
        run()  # what is kept after the first calls is no part of the peak
    elif mode != "forward":
        result.saved_mb = saved_bytes(attend, given.inputs) / 1e6
    result.peak_mb = device.peak_bytes(run) / 1e6
    return run


def measure(
    case: Case, mode: str, names: list[str] | None, seconds: float, device: Cpu = CPU, gate_only: bool = False
) -> list[Any]:
    """Gate every provider, then time those that passed, one call each in turn."""
    results: dict[str, Any] = {}
    runs: dict[str, Callable] = {}
    offered = providers(case, device.is_gpu)
    baseline = next(iter(offered))
    if names is not None:
        offered = {n: p for n, p in {**offered, TRITON: backend("triton")}.items() if n in names}
    given = Given(case, mode, device.torch_device)
    for name, (build, can_run) in offered.items():
        result = results[name] = (GpuResult if device.is_gpu else Result)(case.name, mode, name)
        result.note = (can_run(case, mode) or "") if can_run else ""
        if result.note:
            continue
        try:
            run = prepare(build(case), mode, given, device, result)
        except Exception as error:
            if not device.is_gpu and not isinstance(error, BackendError):
                raise
            result.note = reason(error)
            device.synchronize()  # raises, and ends the case, where the provider has broken the GPU
        if not result.note:
            runs[name] = run
    if gate_only:
        return list(results.values())

    times: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.monotonic() + seconds * len(runs)
    while runs and (time.monotonic() < deadline or min(map(len, times.values())) < 5):
        for name, run in runs.items():
            times[name].append(device.seconds(run))
    for name, samples in times.items():
        results[name].median_ms = statistics.median(samples) * 1e3
        results[name].calls = len(samples)
        if host_s := device.host_seconds(runs[name]):
            results[name].host_ms = host_s * 1e3
    base = results[baseline].median_ms if baseline in results else None
    for result in results.values():
        if base and result.median_ms and not device.is_gpu:
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
Cases and providers are in `benchmarks/op_cases/`. Not measured on a GPU.
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    every = list({case.name: case for case in (*CASES, *CUDA_CASES, *TINY)}.values())
    known = [case.name for case in every]
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--cases", nargs="+", choices=known, metavar="CASE", help="default: all")
    names = sorted({name for case in every for is_gpu in (False, True) for name in providers(case, is_gpu)})
    parser.add_argument("--providers", nargs="+", choices=names)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--seconds", type=float, help=f"wall time per provider, case and mode (>= 5 calls); default {SECONDS}"
    )
    parser.add_argument("--out", type=Path, help="path without suffix for the .json and .md results")
    gpu = parser.add_argument_group("only with --device cuda")
    gpu.add_argument("--update", action="store_true", help="keep the results in --out of what is not measured now")
    gpu.add_argument("--gate-only", action="store_true", help="time nothing; fills the caches of all compilers")
    args = parser.parse_args(argv)
    cases = [case for case in (CASES if args.device == "cpu" else CUDA_CASES) if op_of(case) in args.ops]
    if args.cases is not None:
        cases = [case for case in (*cases, *TINY) if case.name in args.cases]
        if missing := set(args.cases) - {case.name for case in cases}:
            parser.error(f"no cases of --device {args.device}: {', '.join(sorted(missing))}")
    args.cases = cases
    args.seconds = SECONDS[args.device] if args.seconds is None else args.seconds
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = open_device(args.device)
    if device.is_gpu:
        return on_gpu(args, device, argv)
    torch.set_num_threads(1)
    results = []
    for case in args.cases:
        for mode in args.modes:
            print(f"{case.name}, {mode} ...", flush=True)
            results += measure(case, mode, args.providers, args.seconds)
    publish(results, COLUMNS, row, TEXT, "bench_ops.py", argv, args.out)
    return int(any("wrong" in r.note for r in results))


def on_gpu(args: argparse.Namespace, device: Any, argv: list[str] | None) -> int:
    """The same, with results written after every case, and what fails noted instead of raised."""
    start = time.monotonic()
    run = gpu_report.Run(device, args.out, args.update, argv)
    order = [(case, mode) for case in args.cases for mode in args.modes]
    for case, mode in order:
        print(f"[{time.monotonic() - start:.0f} s] {case.name}, {mode} ...", flush=True)
        try:
            results = measure(case, mode, args.providers, args.seconds, device, args.gate_only)
            device.forget()
        except Exception as error:
            results = [GpuResult(case.name, mode, "all", note=reason(error))]
        run.add(case, mode, results, write=not args.gate_only)
    show(run.new, gpu_report.COLUMNS, gpu_report.row, f"{device.name}, GPU time")
    if not args.gate_only:
        print(run.goals())
    return int(any("wrong" in r.note or (r.provider == TRITON and "failed" in r.note) for r in run.new))


if __name__ == "__main__":
    sys.exit(main())
