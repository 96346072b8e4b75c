"""All that a GPU is needed for, in two calls of 9 minutes together.

    python benchmarks/bench_gpu.py --out $OUT --minutes 4.3 --steps gates compile triton
    python benchmarks/bench_gpu.py --out $OUT --minutes 4.7 --steps ablations ceilings peers host models

Between them copy what the first has written to benchmarks/results/<gpu>/, from where the second goes on, and keep the
machine: Triton's and Inductor's caches are on it. Without --steps all of them run, one after the other:

    gates      tests/ops/test_fused_cuda.py: results against float64, equal bits, graphs, streams, memory
    compile    all candidates of all kernels, and what is compiled of peers, on all cores; meanwhile the gates with
               ptxas -O0 and tiny maps under compute-sanitizer
    triton     every case of the Triton kernels: gate, times of every candidate of every kernel, then of whole passes
    ablations  passes without bias, with one key for all, without exponentials (gpu_limits.py)
    ceilings   bytes copied and read from L2, flops of products and exponentials per second
    peers      partition and SDPA by all its backends, FlexAttention, timm's HaloAttn, official formulations, natten
    host       the host's time for a call: eager, as a CUDA graph, under torch.compile(mode="reduce-overhead")
    models     timm's compiled models against ours, then all others

Ops run in this process. After every case all files are written: `session.json` and `.md` with a row per measurement,
`bench_ops` and `bench_models` likewise, `tuning/<gpu>.json`; `session.log` has the output of other processes. A step
begins nothing after its limit; what it has left is done at the end, as far as there is time. natten is a peer where it
can be imported; its CUDA wheel has 475 MB, more than some machines can be sent.

The exit status is 2 without a GPU, and 1 if a gate failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bench_models
import bench_ops
import gpu_report
import report
import torch
from bench_device import NO_CUDA, Cuda, captured, slug
from gpu_models import CUDA_MODELS, TIMM
from gpu_report import BOTH, FORWARD, TRITON
from gpu_session import Program, Row, Session, Task, cells, outcomes
from op_cases import CUDA_CASES, Case
from op_gate import runner

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "ops" / "test_fused_cuda.py"
# Seconds after which a step begins nothing new.
LIMITS = {
    "gates": 50,
    "compile": 90,
    "triton": 130,
    "ablations": 25,
    "ceilings": 10,
    "peers": 150,
    "host": 30,
    "models": 75,
}
# Minutes and steps of the calls that the docstring names.
CALLS = (
    (4.3, ("gates", "compile", "triton")),
    (4.7, ("ablations", "ceilings", "peers", "host", "models")),
)
FLEX = "FlexAttention compiled"
FLEX_CASES = ("na2d_56", "na2d_28", "na2d_14", "window_56", "halo_32")  # each takes half a minute to compile
SDPA_CASES = ("window_56", "grid_56", "na2d_56_d8_bias")  # by every backend, others by the usual one
PEER_CASES = (
    *("na2d_56", "na2d_28", "na2d_14", "na2d_56_d8_bias", "na2d_28_d4_bias", "na2d_14_d2_bias"),
    *(f"{kind}_{n}" for n in (56, 28, 14, 7) for kind in ("window", "grid")),
    *("halo_32", "halo_16", "routed_56_topk1", "routed_28_topk4", "routed_14_topk16"),
    *("aggregated_56", "aggregated_28", "aggregated_14", "agent_56_a9", "gated_positional_14"),
    *("efficient_56", "inline_56", "focused_56", "flow_56", "relu_56"),
)
TIMM_MODELS = ("maxvit_tiny_va", "halonet50ts_va")  # both compiled
HOST_CASES = ("na2d_14", "na2d_14_bias", "window_7")
ABLATED_CASES = ("na2d_56_bias", "window_56")
CASES = {case.name: case for case in CUDA_CASES}


def tests(*arguments: str, **environment: str) -> Program:
    """The gates, by pytest."""
    return Program(sys.executable, "-m", "pytest", "-v", "--tb=short", *arguments, str(TESTS), **environment)


def background() -> dict[str, Callable[[], Program]]:
    """What runs beside the compilers."""
    tool = partial(Program, sys.executable)
    found = {"ptxas -O0": partial(tests, "-n", "8", "-k", "real_sizes or tiny", PTXAS_OPTIONS="-O0")}
    if sanitizer := shutil.which("compute-sanitizer"):
        command = (sanitizer, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-v", "-n", "0", "-k", "tiny")
        found["compute-sanitizer"] = partial(Program, *command, str(TESTS))
    cuda = ("--device", "cuda", "--gate-only")
    for case in FLEX_CASES:
        ops = (str(ROOT / "benchmarks/bench_ops.py"), *cuda, "--cases", case, "--providers", FLEX)
        found[f"{FLEX}, {case}"] = partial(tool, *ops)
    for model in TIMM_MODELS:
        models = (str(ROOT / "benchmarks/bench_models.py"), *cuda, "--models", model, "--compiled", "yes")
        found[f"{model}, compiled"] = partial(tool, *models, "--providers", TRITON, TIMM)
    return found


def record_case(case: Case, device: Any) -> list[Any]:
    """The launches of a case's passes with every candidate of every kernel."""
    from visattn.ops.fused.launch import record
    from visattn.ops.fused.tuning import all_candidates

    inputs, attend = case.fuse(case.inputs(device)), case.visattn("triton")
    cotangent = torch.zeros((case.batch, *case.size, case.heads, case.dim), dtype=case.dtype, device=device)
    with record() as launches, all_candidates():
        runner(attend, inputs, FORWARD)()
        runner(attend, inputs, BOTH, cotangent)()
    return launches


class Plan:
    """The tasks of all steps on a GPU."""

    def __init__(self, session: Session, device: Any, argv: Sequence[str] | None) -> None:
        self.session, self.device, self.argv = session, device, argv
        self.programs: dict[str, Program] = {}
        self.compilers: Any = None
        self.compiled_by = 0.0
        self.ops: Any = None
        self.gated: dict[str, Row] = {}

    def tasks(self, steps: Iterable[str]) -> list[Task]:
        return [task for step in LIMITS if step in steps for task in getattr(self, step)()]

    def gates(self) -> list[Task]:
        def run() -> list[Row]:
            program = tests("-n", "8", "-k", "not compiled_model")  # which takes minutes
            return outcomes("gates", "ptxas default", *program.finish(self.session, LIMITS["gates"] + 20))

        return [Task("gates", "ptxas default", run)]

    def compile(self) -> list[Task]:
        def start() -> list[Row]:
            from compile_ahead import Compilers

            major, minor = torch.cuda.get_device_capability()
            self.compilers, self.compiled_by = Compilers(10 * major + minor), self.session.clock() + LIMITS["compile"]
            self.programs = {name: begin() for name, begin in background().items()}
            return []

        def record(case: Case) -> list[Row]:
            new = self.compilers.add(record_case(case, self.device.torch_device))
            return [Row("compile", case.name, "kernels that no case before has", figure=new)]

        def finish() -> list[Row]:
            failures = self.compilers.finish(max(0.0, self.compiled_by - self.session.clock()))
            rows = [Row("compile", "kernels", "distinct kernels", figure=len(self.compilers.futures))]
            rows += [Row("compile", "kernels", "failed", note=reason) for reason in failures]
            for name, program in self.programs.items():
                status, text = program.finish(self.session, self.compiled_by - self.session.clock())
                rows += outcomes("compile", name, status, text)
            return rows

        recorded = [Task("compile", case.name, partial(record, case)) for case in CUDA_CASES]
        return [Task("compile", "start", start), *recorded, Task("compile", "finish", finish, always=True)]

    def measure(
        self, case: Case, mode: str, providers: list[str], seconds: float, gate_only: bool = False
    ) -> list[Any]:
        """Gate and time providers; what is timed goes to bench_ops.json."""
        if self.ops is None:
            self.ops = gpu_report.Run(self.device, self.session.out / "bench_ops", True, self.argv)
            self.session.setting = self.ops.setting
        found = bench_ops.measure(case, mode, providers, seconds, self.device, gate_only)
        self.device.forget()
        if not gate_only:
            self.ops.add(case, mode, found)
        return found

    def gate(self, step: str, case: Case) -> Row:
        """Error of output and all gradients against float64; a case whose note says FAILED is not to be timed."""
        if case.name not in self.gated:
            (found,) = self.measure(case, BOTH, [TRITON], 0, gate_only=True)
            note = found.note and f"FAILED: {found.note}"
            self.gated[case.name] = Row(step, case.name, "gate", figure=found.error, note=note)
        return self.gated[case.name]

    def triton(self) -> list[Task]:
        from tune_ops import run_case, short

        from visattn.ops import tune

        def run(case: Case) -> list[Row]:
            rows = [self.gate("triton", case)]
            if rows[0].note:
                return rows
            with tune(again=True) as choices:
                run_case(case, self.device.torch_device)
            for choice in choices:
                for config, ms in choice.times_ms.items():
                    notes = {choice.default: "default", choice.config: "best"}
                    rows.append(Row("triton", case.name, f"{choice.kernel} {short(config)}", ms * 1e3))
                    rows[-1].note = " ".join(note for c, note in notes.items() if c == config)
                for config, reason in choice.dropped.items():
                    rows.append(Row("triton", case.name, f"{choice.kernel} {short(config)}", note=reason))
            for mode in (FORWARD, BOTH):
                (r,) = self.measure(case, mode, [TRITON], 0.15)
                us = r.median_ms and r.median_ms * 1e3
                rows.append(Row("triton", case.name, mode, us, r.error, r.note))
            return rows

        return [Task("triton", case.name, partial(run, case)) for case in CUDA_CASES]

    def ablations(self) -> list[Task]:
        def run(case: Case, part: str) -> list[Row]:
            from gpu_limits import ablation

            if (gate := self.gate("ablations", case)).note:
                return [gate]
            modes = (FORWARD, BOTH)
            return [
                Row("ablations", case.name, f"{mode}, {part}", ablation(case, mode, part, self.device) * 1e6)
                for mode in modes
            ]

        return [
            Task("ablations", f"{name}, {part}", partial(run, CASES[name], part))
            for name in ABLATED_CASES
            for part in ("whole", "no bias", "one key", "no exponentials")
        ]

    def ceilings(self) -> list[Task]:
        def run() -> list[Row]:
            from gpu_limits import ceilings

            rates = self.device.rates()
            found = {"copied bytes": rates.bytes_per_s, "flops of products": rates.flops_per_s}
            found |= ceilings(self.device)
            return [Row("ceilings", "", f"{what} per s", figure=rate) for what, rate in found.items()]

        return [Task("ceilings", "copy, product, L2, exponentials", run)]

    def peers(self) -> list[Task]:
        def run(case: Case, mode: str, names: list[str]) -> list[Row]:
            found = self.measure(case, mode, [*names, TRITON], 0.15)
            if not any(r.median_ms or r.note for r in found):
                return [Row("peers", case.name, mode, note="nothing was timed")]
            return [
                Row("peers", case.name, f"{mode}, {r.provider}", r.median_ms and r.median_ms * 1e3, r.error, r.note)
                for r in found
            ]

        return [
            Task("peers", f"{name}, {mode}", partial(run, CASES[name], mode, peers_of(CASES[name])))
            for name in PEER_CASES
            for mode in (FORWARD, BOTH)
        ]

    def host(self) -> list[Task]:
        def run(case: Case, mode: str, way: str) -> list[Row]:
            if (gate := self.gate("host", case)).note:
                return [gate]
            seconds = host_seconds(replace(case, batch=2), mode, way, self.device.torch_device)
            return [Row("host", case.name, f"{mode}, {way}", seconds * 1e6)]

        return [
            Task("host", f"{name}, {mode}, {way}", partial(run, CASES[name], mode, way))
            for way in ("eager", "CUDA graph", "reduce-overhead")
            for name in (HOST_CASES[:1] if way == "reduce-overhead" else HOST_CASES)
            for mode in (FORWARD, BOTH)
        ]

    def models(self) -> list[Task]:
        def run(model: str, mode: str, compiled: str, *more: str) -> list[Row]:
            arguments = ["--device", "cuda", "--models", model, "--modes", mode, "--compiled", compiled, *more]
            out = str(self.session.out / "bench_models")
            status = bench_models.main([*arguments, "--seconds", "0.5", "--update", "--out", out])
            return [Row("models", model, f"{mode}, compiled {compiled}", note=f"exit status {status}")]

        timm = [(m, mode, "yes", "--providers", TRITON, TIMM) for m in TIMM_MODELS for mode in bench_models.MODES]
        others = [(m, mode, "no") for m in CUDA_MODELS for mode in bench_models.MODES]
        return [Task("models", ", ".join(a[:3]), partial(run, *a)) for a in (*timm, *others)]


def peers_of(case: Case) -> list[str]:
    """The providers that a case is timed against; what compiles long or is one of many only for some cases."""
    found = list(case.cuda_providers)
    if case.name not in FLEX_CASES:
        found = [name for name in found if name != FLEX]
    if case.name not in SDPA_CASES:
        found = [name for name in found if not name.startswith("SDPA ") or name == "SDPA, x partitioned"]
    return found


def host_seconds(case: Case, mode: str, way: str, device: torch.device, calls: int = 100) -> float:
    """Wall time of a call of so many that follow one another on a small batch, which the host decides."""
    attend = case.visattn("triton")
    inputs = case.fuse(case.inputs(device))
    if way == "reduce-overhead":
        attend = torch.compile(attend, mode="reduce-overhead", dynamic=False)
    run = runner(attend, inputs, mode, torch.ones((case.batch, *case.size, case.heads, case.dim), device=device))
    if way == "CUDA graph":
        run = captured(run)[0].replay
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def keep_earlier(out: Path, results: Path) -> None:
    """Start from the results that the repository has, tuning included."""
    for file in results.rglob("*.json"):
        target = out / file.relative_to(results)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that the session writes")
    parser.add_argument("--steps", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--minutes", type=float, default=8.9, help="limit of the whole call")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(NO_CUDA, file=sys.stderr)
        return 2

    name = torch.cuda.get_device_name()
    session = Session(args.out.resolve(), args.minutes * 60, LIMITS)
    keep_earlier(session.out, ROOT / "benchmarks" / "results" / slug(name))
    session.keep({"GPU": name, "triton": report.version("triton")}, args.steps)
    os.environ["VISATTN_CACHE_DIR"] = str(session.out)
    path = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    plan = Plan(session, Cuda(), argv)
    try:
        session.go(plan.tasks(args.steps))
    finally:
        for program in plan.programs.values():
            program.stop()
    new = [r for r in session.rows if r.step in args.steps]
    failed = [r for r in new if any(word in r.note for word in ("FAILED", "ERROR", "wrong result"))]
    failed += [r for r in new if r.step == "triton" and r.note.startswith("failed:")]
    for r in failed:
        print(" ".join(cells(r)))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
