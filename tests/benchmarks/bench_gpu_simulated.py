"""A session of bench_gpu.py under the stub driver and a clock of its own; prints what it reached. Seconds are assumed.

For a process of tests.stub_gpu.run.
"""

import json
from dataclasses import replace
from pathlib import Path

import bench_gpu
from bench_gpu import FLEX, LIMITS
from gpu_session import Row, Session

CORES = 16
COMPILED = 0.5  # CPU seconds for a kernel
CANDIDATE = 0.03  # to load, check and time one candidate of a kernel
BESIDE = {"ptxas -O0": 250, "compute-sanitizer": 40, FLEX: 50, "compiled": 180}  # CPU seconds of other programs
SECONDS = {"gates": 45, "ablations": 1.7, "ceilings": 3, "host": 0.8, "models": 5}  # a case
PEER = 0.45  # to gate and time a provider
FROM_CACHE = {FLEX: 4, "reduce-overhead": 7, ", yes": 24}  # to trace, and load what was compiled before


def can_run(case, name):
    """Of a machine without natten."""
    _, reason = case.cuda_providers[name]
    return "natten" not in name and not (reason and reason(case, "forward"))


class Simulated:
    """How long tasks take, on a clock that nothing else moves."""

    def __init__(self):
        self.now, self.kernels, self.of_case = 0.0, set(), {}

    def seconds(self, task):
        if task.step == "compile":
            return self.compile_seconds(task)
        if task.step == "triton":
            return 1.2 + CANDIDATE * self.of_case.get(task.name, 60)
        if task.step == "peers":
            case = bench_gpu.CASES[task.name.split(",")[0]]
            names = [name for name in bench_gpu.peers_of(case) if can_run(case, name)]
            return 0.5 + PEER * (len(names) + 1) + FROM_CACHE[FLEX] * (FLEX in names)
        for word, seconds in FROM_CACHE.items():
            if task.name.endswith(word):
                return seconds
        return SECONDS[task.step]

    def compile_seconds(self, task):
        if task.name == "start":
            self.began = self.now
            return 5
        if task.name == "finish":
            beside = sum(next(s for word, s in BESIDE.items() if word in name) for name in bench_gpu.background())
            cpu = COMPILED * len(self.kernels) + beside
            return max(0.0, self.began + 10 + cpu / CORES - self.now)
        case = bench_gpu.CASES[task.name]
        if "dense" not in case.name:  # whose maps are large for a CPU
            keys = {launch.key for launch in bench_gpu.record_case(replace(case, batch=1), "cpu")}
            self.kernels |= keys
            self.of_case[case.name] = len(keys)
        return 0.15

    def perform(self, task):
        self.now += self.seconds(task)
        return [Row(task.step, task.name, "simulated")]


def main(out, gpu):
    """The whole session into a folder."""
    out = Path(out)
    simulated = Simulated()
    reached = []
    for minutes, steps in bench_gpu.CALLS:
        session = Session(out, 60 * minutes, LIMITS, lambda: simulated.now)

        def perform(task, session=session):
            if session.rows:
                kept = json.loads((out / "session.json").read_text())["results"]
                assert len(kept) == len(session.rows), "results are on disk after every case"
            return simulated.perform(task)

        session.go(bench_gpu.Plan(session, None, None).tasks(steps), perform)
        reached += [(r.step, r.case) for r in session.rows if r.what == "simulated"]
    assert not gpu.launched, "launches are recorded"
    print(json.dumps({"reached": reached, "kernels": len(simulated.kernels), "seconds": simulated.now}))
