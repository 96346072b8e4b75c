"""A whole session on a lent GPU in one call: tests, tuning, benchmarks of ops and models.

    python benchmarks/bench_gpu.py --out $OUT                                 # everything, in less than 9 minutes
    python benchmarks/bench_gpu.py --out $OUT --steps compile_ops ops         # some of it
    python benchmarks/bench_gpu.py --out $OUT --limits ops=300 --minutes 9.5  # with other time limits

Every step has a time limit, at which it is killed; the next one runs in any case. Writes to --out: `session.log` with
all output, `session.json` with what became of each step, `tuning/<gpu>.json`, and `bench_ops` and `bench_models` as
.json and .md. The benchmarks keep what is in benchmarks/results/<gpu>/ of cases that they do not get to, so that
sessions can follow one another. In the compile steps compilers fill their caches in parallel; without them the
benchmarks compile one thing at a time.

The exit status is 0 if every step's is, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from bench_device import NO_CUDA, slug
from gpu_models import CUDA_MODELS
from op_cases import OPS

ROOT = Path(__file__).parents[1]
TESTS = "fused or triton or cuda"
BUDGET = "{budget}"  # in a command: seconds after which it should begin nothing new


@dataclass
class Step:
    """Commands that belong together, one after the other or `jobs` at a time, with `limit` seconds for all."""

    name: str
    commands: list[list[str]]
    limit: float
    jobs: int = 1


@dataclass
class Outcome:
    """What became of a step: the exit status of each command, None for those that were killed or never started."""

    name: str
    limit: float
    seconds: float = 0.0
    statuses: list[int | None] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return all(status == 0 for status in self.statuses)


def tool(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "benchmarks" / name), "--device", "cuda", *arguments]


def all_steps(out: Path, workers: int) -> list[Step]:
    # Without the slow ones: a random search compiles a kernel for nearly every example.
    tests = [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "-k", TESTS]
    ops = [tool("bench_ops.py", "--ops", op) for op in OPS]
    models = [tool("bench_models.py", "--models", model) for model in CUDA_MODELS]
    measured = ["--update", "--budget", BUDGET, "--out"]
    return [
        Step("tests", [[*tests, str(ROOT / "tests" / "ops")]], 130),
        Step("tune", [tool("tune_ops.py", "--dtypes", "bfloat16")], 80),
        Step("compile_ops", [[*command, "--gate-only"] for command in ops], 100, jobs=7),
        # A process per op: one that breaks the GPU for its process leaves the others alone.
        Step("ops", [[*command, *measured, str(out / "bench_ops")] for command in ops], 120),
        Step("compile_models", [[*command, "--gate-only", "--compiled", "yes"] for command in models], 50, jobs=3),
        Step("models", [tool("bench_models.py", *measured, str(out / "bench_models"))], 50),
    ]


def stop(process: subprocess.Popen) -> None:
    """End a process of ours with all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_step(step: Step, limit: float, log: Path, environment: dict[str, str]) -> Outcome:
    """Run the commands until they are done or `limit` seconds are over; their output goes to the end of `log`.

    Of the time that is left when one of several starts, it gets its share.
    """
    start = time.monotonic()
    outcome = Outcome(step.name, limit, statuses=[None] * len(step.commands))
    waiting = list(enumerate(step.commands))
    running: dict[int, tuple[subprocess.Popen, float]] = {}
    with log.open("ab") as output:
        while waiting or running:
            left = start + limit - time.monotonic()
            if left <= 0:
                break
            if waiting and len(running) < step.jobs:
                rounds = -(-len(waiting) // step.jobs)
                share = left / rounds
                index, command = waiting.pop(0)
                command = [str(max(1, int(share - 10))) if word == BUDGET else word for word in command]
                output.write(f"\n=== {step.name}: {' '.join(command)}\n".encode())
                output.flush()
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
                )
                running[index] = (process, time.monotonic() + share)
                continue
            for index, (process, deadline) in list(running.items()):
                if process.poll() is not None:
                    outcome.statuses[index] = process.returncode
                elif time.monotonic() < deadline:
                    continue
                stop(process)
                del running[index]
            time.sleep(0.1)
        for process, _ in running.values():
            stop(process)
    outcome.seconds = time.monotonic() - start
    return outcome


def run_session(steps: Sequence[Step], out: Path, seconds: float, environment: dict[str, str]) -> list[Outcome]:
    """All steps, each within its limit and what is left of `seconds`."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "session.log"
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for step in steps:
        print(f"{step.name} ...", flush=True)
        outcome = run_step(step, min(step.limit, end - time.monotonic()), log, environment)
        outcomes.append(outcome)
        print(f"{outcome.name}: {outcome.seconds:.0f} s of {outcome.limit:.0f}, exit {outcome.statuses}", flush=True)
        (out / "session.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    return outcomes


def keep_earlier(out: Path, results: Path) -> None:
    """Start from the results that the repository has."""
    for name in ("bench_ops.json", "bench_models.json"):
        if (results / name).exists() and not (out / name).exists():
            out.mkdir(parents=True, exist_ok=True)
            shutil.copy(results / name, out / name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in all_steps(Path(), 0)]
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that the session writes")
    parser.add_argument("--steps", nargs="+", choices=names, default=names)
    parser.add_argument("--limits", nargs="+", default=[], metavar="STEP=SECONDS", help="other limits than the usual")
    parser.add_argument("--minutes", type=float, default=8.8, help="limit of the whole session")
    parser.add_argument("--test-workers", type=int, default=8, help="processes for the tests, 0: one after the other")
    args = parser.parse_args(argv)
    limits = dict(limit.split("=", 1) for limit in args.limits)
    if unknown := set(limits) - set(names):
        parser.error(f"expected limits of {', '.join(names)}; got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        print(NO_CUDA, file=sys.stderr)
        return 2

    out = args.out.resolve()
    steps = [step for step in all_steps(out, args.test_workers) if step.name in args.steps]
    for step in steps:
        step.limit = float(limits.get(step.name, step.limit))
    keep_earlier(out, ROOT / "benchmarks" / "results" / slug(torch.cuda.get_device_name()))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
        "VISATTN_CACHE_DIR": str(out),
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
        "COLUMNS": "200",
    }
    outcomes = run_session(steps, out, args.minutes * 60, environment)
    report = out / "bench_ops.md"
    if "ops" in args.steps and report.exists():
        print(report.read_text().partition("## Goals")[2])
    for outcome in outcomes:
        print(f"{outcome.name}: {outcome.seconds:.0f} s of {outcome.limit:.0f}, exit {outcome.statuses}")
    return 0 if all(outcome.is_done for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
