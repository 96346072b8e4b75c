"""The benchmark of the host runs without a GPU."""

import os
import subprocess
import sys

from tests.stub_gpu import ROOT


def test_every_mode_has_a_time(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = ["benchmarks/bench_host.py", "--cases", "window_7", "--calls", "1", "--rounds", "1"]
    done = subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("window_7") == 2
