"""A session of the GPU benchmarks: within its time it reaches what it is for, and nothing that it found is lost."""

import json
import sys
import time

import bench_gpu
import pytest
from bench_gpu import CALLS, LIMITS, Plan
from gpu_report import BOTH, TRITON, GpuResult
from gpu_session import Program, Row, Session, Task, outcomes
from op_cases import CUDA_CASES

from tests import stub_gpu


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_nine_minutes_reach_all_cases_gates_and_peers(tmp_path):
    """Under a stub driver, with assumed seconds: no time was measured on a GPU."""
    code = "from tests.benchmarks.bench_gpu_simulated import main; main(sys.argv[1], gpu)"
    found = json.loads(stub_gpu.run(code, tmp_path / "cache", str(tmp_path)).splitlines()[-1])
    assert sum(minutes for minutes, _ in CALLS) == 9
    assert found["seconds"] <= 9 * 60
    assert found["kernels"] > 500
    plan = Plan(None, None, None)
    wanted = [(t.step, t.name) for step in LIMITS if step != "models" for t in getattr(plan, step)()]
    wanted += [(t.step, t.name) for t in plan.models() if t.name.endswith("yes")]
    assert sum(step == "triton" for step, _ in wanted) == len(CUDA_CASES) == 49
    assert {tuple(x) for x in found["reached"]} >= set(wanted)


def test_what_fails_or_comes_too_late_costs_only_itself(tmp_path):
    clock = Clock()

    def takes(seconds):
        def run():
            clock.now += seconds
            return [Row("triton", "case", "us", 1.0)]

        return run

    def fails():
        raise RuntimeError("broken\nmore")

    limit = LIMITS["triton"]
    tasks = [Task("triton", "long", takes(limit + 1)), Task("triton", "late", takes(1))]
    tasks += [Task("peers", "fails", fails), Task("host", "never ends", takes(1000)), Task("host", "after", takes(1))]
    session = Session(tmp_path, limit + 60, LIMITS, clock)
    session.go(tasks)
    rows = [(r["case"], r["what"], r["note"]) for r in json.loads((tmp_path / "session.json").read_text())["results"]]
    assert [case for case, what, _ in rows if what == "seconds it took"] == [
        "long",
        "fails",
        "never ends",
        "late",
        "after",
    ]
    assert ("fails", "all", "failed: RuntimeError: broken") in rows
    assert ("late", "all", "not measured: no time left") in rows


def test_cases_whose_gate_fails_are_not_timed(monkeypatch):
    plan = Plan(None, None, None)
    wrong = GpuResult("any", BOTH, TRITON, error=1.0, note="wrong result: not timed")
    monkeypatch.setattr(plan, "measure", lambda *args, gate_only: [wrong])  # times nothing
    for step in ("triton", "ablations", "host"):
        for task in getattr(plan, step)():
            (row,) = task.run()
            assert (row.what, row.us, row.note) == ("gate", None, "FAILED: wrong result: not timed")


def test_programs_end_with_all_they_started(tmp_path):
    session = Session(tmp_path, 60, LIMITS)
    loop = "import time\nfor _ in range(2000): print('alive', flush=True); time.sleep(0.01)"
    program = Program(sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {loop!r}])")
    status, text = program.finish(session, 2)
    assert status is None
    time.sleep(0.3)
    program.output.seek(0)
    assert program.output.read() == text, "what it had started goes on"
    assert Program(sys.executable, "-c", "raise SystemExit(3)").finish(session, 30) == (3, "")
    assert "=== " in (tmp_path / "session.log").read_text()


def test_outcomes_of_tests():
    text = "[gw0] [ 50%] PASSED tests/a.py::test_x[halo 32] \n[gw1] [100%] FAILED tests/a.py::test_y \n"
    failed, passed = outcomes("gates", "default", 1, text)
    assert (failed.what, failed.note) == ("test_y", "FAILED")
    assert (passed.figure, passed.note) == (1, "FAILED: exit status 1")
    (passed,) = outcomes("gates", "tiny", 0, "a.py::test_x[halo 32] PASSED [ 50%]\na.py::test_z PASSED\n")
    assert (passed.figure, passed.note) == (2, "")


def test_earlier_results_are_kept(tmp_path):
    results, out = tmp_path / "results", tmp_path / "out"
    (results / "tuning").mkdir(parents=True)
    (results / "bench_ops.json").write_text("old")
    (results / "tuning" / "gpu.json").write_text("old")
    bench_gpu.keep_earlier(out, results)
    assert (out / "bench_ops.json").read_text() == "old"
    (out / "tuning" / "gpu.json").write_text("new")
    bench_gpu.keep_earlier(out, results)
    assert (out / "tuning" / "gpu.json").read_text() == "new"


def test_a_second_call_goes_on_from_the_first(tmp_path):
    setting = {"GPU": "NVIDIA Pretend 1", "triton": "3.6.0"}
    first = Session(tmp_path, 60, LIMITS)
    first.keep(setting, ["triton", "peers"])
    first.go([Task(step, "case", list) for step in ("triton", "peers")])
    second = Session(tmp_path, 60, LIMITS)
    second.keep(setting, ["peers"])
    assert [row.step for row in second.rows] == ["triton"]
    second.keep({**setting, "GPU": "another"}, ["peers"])
    assert second.rows == []


def test_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_gpu.torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device: not measured" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        bench_gpu.main(["--out", str(tmp_path), "--steps", "nothing"])


LIMITED = """
import gpu_limits
from dataclasses import replace
from op_cases import TINY
from visattn.ops.fused.launch import record
class Device:
    torch_device, processors = "cpu", 2
    def seconds(self, run):
        run()
        return 1.0
case = replace(next(c for c in TINY if c.name == "tiny_na2d_bias"), dtype=torch.bfloat16)
print(gpu_limits.ceilings(Device()))
for part in gpu_limits.ABLATIONS:
    gpu.launched.clear()
    gpu_limits.ablation(case, "forward", part, Device())
    print(part, gpu.launched[-1].kernel, gpu.launched[-1].arguments[4].columns.max().item())
"""


def test_ceilings_and_ablations_compile(tmp_path):
    first, *parts = stub_gpu.run(LIMITED, tmp_path).splitlines()
    assert "bytes from L2" in first
    assert [part.rpartition(" ")[0] for part in parts] == [
        f"{part} forward_kernel" for part in ("whole", "no bias", "one key", "no exponentials")
    ]
    assert [int(part.rpartition(" ")[2]) > 0 for part in parts] == [True, True, False, True]
    ptx = [file.read_text() for file in tmp_path.glob("*/forward_kernel.ptx")]
    assert sorted("ex2.approx" in text for text in ptx) == [False, True, True]
