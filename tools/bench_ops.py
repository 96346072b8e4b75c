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
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import profile

from visattn.ops import neighborhood_attention
from visattn.ops.geometry import Axis, neighbors

TOLERANCE = 1e-5  # norm-wise, float32 against float64
MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One 2-D neighborhood attention problem."""

    name: str
    batch: int
    size: tuple[int, int]
    heads: int
    dim: int
    kernel_size: int
    dilation: int = 1
    bias: bool = False

    def axes(self) -> tuple[Axis, Axis]:
        return tuple(Axis(n, self.kernel_size, self.dilation) for n in self.size)

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, *self.size, self.heads, self.dim)
        tensors = {n: torch.randn(shape, generator=generator) for n in ("q", "k", "v")}
        if self.bias:
            width = 2 * self.kernel_size - 1
            tensors["bias"] = torch.randn(self.heads, width, width, generator=generator)
        return tensors


CASES = [
    Case("na2d_56", 2, (56, 56), 2, 32, 7),
    Case("na2d_56_bias", 2, (56, 56), 2, 32, 7, bias=True),
    Case("na2d_56_d8", 2, (56, 56), 2, 32, 7, dilation=8),
    Case("na2d_28_d4_bias", 2, (28, 28), 4, 32, 7, dilation=4, bias=True),
    Case("na2d_14_bias", 2, (14, 14), 8, 32, 7, bias=True),
]


def _flat_neighbors(case: Case) -> tuple[Tensor, Tensor]:
    """Key index [S, K * K] of every query, and the index of its entry in the flattened bias table."""
    rows, cols = (neighbors(axis) for axis in case.axes())
    width = 2 * case.kernel_size - 1
    index = rows.index[:, None, :, None] * case.size[1] + cols.index[None, :, None, :]
    entry = rows.displacement[:, None, :, None] * width + cols.displacement[None, :, None, :]
    return index.flatten(2).flatten(0, 1), entry.flatten(2).flatten(0, 1)


Attend = Callable[..., Tensor]


def gather(case: Case) -> Attend:
    """The definition: a copy of the K * K keys and values of every query."""
    index, entry = _flat_neighbors(case)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        query, keys, values = (x.flatten(1, 2) for x in (q, k, v))
        scores = torch.einsum("bsnd,bsmnd->bsnm", query * case.dim**-0.5, keys[:, index])
        if bias is not None:
            scores = scores + bias.flatten(1)[:, entry].transpose(0, 1)
        return torch.einsum("bsnm,bsmnd->bsnd", scores.softmax(-1), values[:, index]).reshape(q.shape)

    return attend


def unfold(case: Case) -> Attend:
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


def dense_sdpa(case: Case) -> Attend:
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


def natten(case: Case) -> Attend:
    """natten >= 0.20, whose CPU path is eager FlexAttention."""
    from natten import na2d

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return na2d(q, k, v, kernel_size=case.kernel_size, dilation=case.dilation)

    return attend


def visattn_eager(case: Case) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return neighborhood_attention(q, k, v, case.kernel_size, case.dilation, bias=bias, backend="eager")

    return attend


def _natten_refusal(case: Case, mode: str) -> str | None:
    try:
        import natten  # noqa: F401
    except ImportError:
        return "not installed"
    if case.bias:
        return "no relative position bias since 0.20"
    return "FlexAttention has no backward on CPU" if mode != "forward" else None


# name -> (builder, refusal(case, mode) or None when it runs everything)
PROVIDERS: dict[str, tuple[Callable[[Case], Attend], Callable[[Case, str], str | None] | None]] = {
    "gather": (gather, None),
    "unfold": (unfold, lambda case, mode: "no dilation" if case.dilation > 1 else None),
    "dense SDPA": (dense_sdpa, None),
    "natten": (natten, _natten_refusal),
    "visattn eager": (visattn_eager, None),
}


@dataclass
class Result:
    """One cell of the table; times in milliseconds, memory in MB, ratios against `gather`."""

    case: str
    mode: str
    provider: str
    error: float | None = None
    median_ms: float | None = None
    calls: int = 0
    times_faster: float | None = None
    peak_mb: float | None = None
    note: str = ""


def runner(attend: Attend, inputs: dict[str, Tensor], mode: str) -> Callable[[], list[Tensor]]:
    """A call that returns the output and, with the backward, the gradient of every input."""
    if mode == "forward":

        def run() -> list[Tensor]:
            with torch.no_grad():
                return [attend(**inputs)]

        return run
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    cotangent = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run_both() -> list[Tensor]:
        out = attend(**leaves)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), cotangent.to(out.dtype))]

    return run_both


def expected_results(case: Case, mode: str) -> list[Tensor]:
    def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return neighborhood_attention(q, k, v, case.kernel_size, case.dilation, bias=bias, backend="reference")

    return runner(reference, {n: t.double() for n, t in case.inputs().items()}, mode)()


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


def measure(case: Case, mode: str, names: list[str], seconds: float) -> list[Result]:
    """Gate every provider, then time those that passed, one call each in turn."""
    results, runs = {}, {}
    expected = expected_results(case, mode)
    for name in names:
        build, refusal = PROVIDERS[name]
        results[name] = Result(case.name, mode, name, note=(refusal(case, mode) or "") if refusal else "")
        if results[name].note:
            continue
        run = runner(build(case), case.inputs(), mode)
        results[name].error = gate(run(), expected)
        if not results[name].error <= TOLERANCE:  # NaN fails too
            results[name].note = "wrong result: not timed"
            continue
        results[name].peak_mb = peak_bytes(run) / 1e6
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
    base = results.get("gather", Result("", "", "")).median_ms
    for result in results.values():
        if base and result.median_ms:
            result.times_faster = base / result.median_ms
    return list(results.values())


COLUMNS = ("case", "mode", "provider", "median ms", "x gather", "peak MB", "error", "note")


def row(r: Result) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        r.case,
        r.mode,
        r.provider,
        number(r.median_ms, ".2f"),
        number(r.times_faster, ".2f"),
        number(r.peak_mb, ".1f"),
        number(r.error, ".0e"),
        r.note,
    ]


def markdown(results: list[Result], setting: dict[str, str], command: str) -> str:
    lines = [
        "# Ops on a CPU",
        "",
        f"`{command}` ({', '.join(f'{k} {v}' for k, v in setting.items())}).",
        "CPU time of one thread, medians of interleaved calls; `x gather` is how many times faster than the gather of",
        "the same run. Shapes are in `tools/bench_ops.py`. Not measured on a GPU.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(row(r)) + " |" for r in results),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], default=[c.name for c in CASES])
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seconds", type=float, default=3.0, help="wall time per provider, case and mode (>= 5 calls)")
    parser.add_argument("--out", type=Path, help="path without suffix for the .json and .md results")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    console = Console()
    table = Table(*COLUMNS, title="one thread, CPU time")
    results = []
    for case in (c for c in CASES if c.name in args.cases):
        for mode in args.modes:
            console.print(f"{case.name}, {mode} ...")
            measured = measure(case, mode, args.providers, args.seconds)
            results += measured
            for r in measured:
                table.add_row(*row(r))
            table.add_section()
    console.print(table)
    setting = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"setting": setting, "results": [asdict(r) for r in results]}
        args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        command = f"python tools/bench_ops.py {' '.join(sys.argv[1:] if argv is None else argv)}".strip()
        args.out.with_suffix(".md").write_text(markdown(results, setting, command))
    return int(any("wrong" in r.note for r in results))


if __name__ == "__main__":
    sys.exit(main())
