"""A session of the GPU benchmarks: every step ends at its limit, and the next one runs in any case."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import bench_gpu
import pytest
from bench_gpu import BUDGET, Step


def python(code, *arguments):
    return [sys.executable, "-c", code, *arguments]


SLEEP = "import time; print('sleeping', flush=True); time.sleep(60)"


def test_a_session_goes_on_after_failures_and_limits(tmp_path):
    steps = [
        Step("fails", [python("raise SystemExit(3)"), python("print('second')")], 20),
        Step("hangs", [python(SLEEP), python("print('never starts')")], 3),
        Step("parallel", [python("import time; time.sleep(1); print('slept')")] * 4, 20, jobs=4),
        Step("budget", [python("import sys; print('budget', sys.argv[1])", BUDGET)], 20),
    ]
    start = time.monotonic()
    outcomes = bench_gpu.run_session(steps, tmp_path, 60, dict(os.environ))
    assert time.monotonic() - start < 30
    assert {o.name: o.statuses for o in outcomes} == {
        "fails": [3, 0],
        "hangs": [None, 0],
        "parallel": [0] * 4,
        "budget": [0],
    }
    assert [o.is_done for o in outcomes] == [False, False, True, True]
    assert outcomes[1].seconds < 5
    log = (tmp_path / "session.log").read_text()
    assert log.count("slept\n") == 4
    assert "sleeping" in log
    assert "budget 9\n" in log or "budget 10\n" in log
    assert [o["name"] for o in json.loads((tmp_path / "session.json").read_text())] == [step.name for step in steps]


def test_a_session_ends_in_time_with_all_it_started(tmp_path):
    """Also what a command has started itself."""
    beat = tmp_path / "beat"
    grandchild = f"import pathlib, time\nfor _ in range(2000): pathlib.Path({str(beat)!r}).touch(); time.sleep(0.01)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    steps = [Step("hangs", [python(child)], 100), Step("late", [python("print(1)")], 100)]
    outcomes = bench_gpu.run_session(steps, tmp_path, 3, dict(os.environ))
    assert [o.statuses for o in outcomes] == [[None], [None]]
    assert sum(o.seconds for o in outcomes) < 6
    last = beat.stat().st_mtime_ns
    time.sleep(0.5)
    assert beat.stat().st_mtime_ns == last


def test_commands_are_understood(tmp_path):
    """Every step's own programs take the arguments that they are given."""
    commands = [c for step in bench_gpu.all_steps(tmp_path, 2) for c in (step.commands[0], step.commands[-1])]
    tools = {c[1]: [word.replace(BUDGET, "9") for word in c] for c in commands if c[1].endswith(".py")}
    assert {Path(tool).name for tool in tools} == {"bench_ops.py", "bench_models.py", "tune_ops.py"}
    for command in tools.values():
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        assert done.returncode in (1, 2)
        assert "no CUDA device" in done.stderr, done.stderr


def test_earlier_results_are_kept(tmp_path):
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir()
    (results / "bench_ops.json").write_text("old")
    bench_gpu.keep_earlier(out, results)
    assert (out / "bench_ops.json").read_text() == "old"
    (out / "bench_ops.json").write_text("new")
    bench_gpu.keep_earlier(out, results)
    assert (out / "bench_ops.json").read_text() == "new"


def test_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_gpu.torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device: not measured" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        bench_gpu.main(["--out", str(tmp_path), "--limits", "nothing=3"])
