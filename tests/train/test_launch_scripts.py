"""The scripts of train/ that people copy: they begin, continue, requeue and fine-tune runs of two processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from runs import rows

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "train").glob("*.sh"))
TINY = ("--device", "cpu", "--model", "test_dinat", "--img-size", 32, "--warmup-epochs", 0, "--lr", 1e-3)
# Stand-ins for Slurm's commands: two tasks that hear the step's signals, hosts, and a note of what is requeued.
SRUN = """#!/usr/bin/env bash
shift
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" & tasks+=" $!"
done
trap 'kill -USR1 $tasks' USR1
code=0
for task in $tasks; do
    until wait "$task" || code=$?; ! kill -0 "$task" 2>/dev/null; do :; done
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >>requeued; fi
"""


def launch(script, *words, **environment):
    """Start a script in this folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PROCESSES": "2"} | environment
    environment["PATH"] = f"{Path.cwd()}:{Path(sys.executable).parent}:{environment['PATH']}"
    command = [ROOT / "train" / script, *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_parse_can_be_started_and_ask_for_what_is_missing(path):
    subprocess.run(["bash", "-n", path], check=True)
    process = launch(path.name)
    assert "expected" in process.communicate()[0]
    assert process.returncode in (1, 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", ["torchrun_single_node.sh", "torchrun_multi_node.sh"])
def test_the_same_command_begins_and_continues_a_run(script):
    nodes = 2 if "multi" in script else 1
    port = str(29000 + os.getpid() % 1000)
    for epochs in (1, 2):
        where = {"NODES": str(nodes), "HEAD": "localhost", "PORT": port, "PROCESSES": str(2 // nodes)}
        processes = [launch(script, "r", *TINY, "--epochs", epochs, **where) for _ in range(nodes)]
        outputs = [process.communicate(timeout=250)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * nodes, outputs
        assert any("cpu x 2 (ddp)" in output for output in outputs)
        assert len(rows(Path("output/r"))) == epochs


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_finetune_trains_with_the_preset():
    words = ("linear_probe", "test_dinat", "digits", "--no-pretrained", "--amp", "none", "--device", "cpu")
    process = launch("finetune.sh", *words, "--img-size", 32, "--workers", 0, "--epochs", 2, "--name", "r")
    output = process.communicate(timeout=250)[0]
    assert process.returncode == 0, output
    assert yaml.safe_load(Path("output/r/args.yaml").read_text())["train_only"][0] == "head.*"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_slurm_sends_a_run_back_to_the_queue_at_its_time_limit_and_continues_it():
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        Path(name).write_text(text)
        Path(name).chmod(0o755)
    where = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost"}
    process = launch("slurm_requeue.sh", "r", *TINY, "--epochs", 3, **where)
    while not Path("output/r/log.csv").is_file() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)  # to the script alone, as B: says
    output = process.communicate(timeout=250)[0]
    assert process.returncode == 143, output
    assert Path("requeued").read_text() == "requeue 7\n"
    process = launch("slurm_requeue.sh", "r", *TINY, "--epochs", 3, **where)
    output = process.communicate(timeout=250)[0]
    assert process.returncode == 0, output
    assert len(rows(Path("output/r"))) == 3
    assert Path("requeued").read_text() == "requeue 7\n"
