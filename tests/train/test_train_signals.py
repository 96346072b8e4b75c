"""Signals that end a run, as schedulers, torchrun and terminals send them: to every process of it, loaders too."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from runs import SMALL, newest, slow

from visattn.train.engine import Engine
from visattn.train.loader import Loader
from visattn.train.signals import CODES, ignore


def until(ready, processes):
    while not ready() and processes.ranks[0].is_alive():
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "size", "engine"),
    [
        (signal.SIGTERM, 1, "ddp"),
        (signal.SIGINT, 1, "ddp"),
        (signal.SIGTERM, 2, "fsdp2"),
        slow(signal.SIGUSR1, 1, "ddp"),
        slow(signal.SIGINT, 2, "ddp"),
        slow(signal.SIGTERM, 2, "ddp"),
    ],
)
def test_a_signal_to_all_processes_leaves_a_checkpoint(folder_data, launch, tmp_path, number, size, engine):
    options = ("--data", folder_data, *SMALL, "--epochs", 500, "--workers", 2, "--engine", engine, "--name", "r")
    processes = launch(*options, size=size)
    folder = tmp_path / "out" / "r"
    until((folder / "log.csv").exists, processes)
    processes.signal(number)
    if number == signal.SIGTERM:  # schedulers repeat themselves
        processes.signal(number)
    assert processes.wait() == [CODES[number]] * size, processes.output()
    output = processes.output()
    assert output.count("error: ") == 1, output
    assert f"; --resume {folder} goes on from there" in output
    assert "Traceback" not in output
    assert f"after update {int(newest(folder).name)}; " in output


def hold_updates():
    """The second update takes for ever."""
    from visattn.train.engine import Engine

    take = Engine.update

    def update(self, *args):
        if self.state.update == 1:
            print("held", flush=True)
            time.sleep(600)
        return take(self, *args)

    Engine.update = update


def hold_start():
    """Listing the data takes for ever."""
    from visattn.train import run

    def open_data(config):
        print("held", flush=True)
        time.sleep(600)

    run.open_data = open_data


@pytest.mark.parametrize(
    ("change", "numbers", "code"),
    [
        (hold_updates, (signal.SIGINT, signal.SIGINT), 130),
        (hold_start, (signal.SIGINT,), 130),
        (hold_start, (signal.SIGTERM,), 143),
        (hold_start, (signal.SIGUSR1,), 143),
    ],
)
def test_what_ends_at_once(folder_data, launch, change, numbers, code):
    """A second SIGINT, and any signal before the training."""
    processes = launch("--data", folder_data, *SMALL, "--workers", 1, change=change)
    until(lambda: "held" in processes.output(), processes)
    for number in numbers:
        processes.signal(number)
        until(lambda: "interrupted" in processes.output(), processes)
    assert processes.wait(60) == [code], processes.output()
    assert "Traceback" not in processes.output()


@pytest.mark.parametrize("module", ["train", "visattn.train", "visattn.train.finetune", "visattn.train.validate"])
def test_a_signal_while_the_libraries_are_imported(module):
    process = subprocess.Popen([sys.executable, "-m", module, "--help"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not int(caught(process.pid), 16) >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "interrupted\n"
    assert process.returncode == 130


def caught(pid):
    """The mask of the signals that a process handles."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("SigCgt"))


def test_loader_processes_hear_no_signal_from_their_start():
    """One that comes before they can ignore it waits, and they end when they are told to."""
    started = []

    def init(worker):
        for number in CODES:
            os.kill(os.getpid(), number)
        ignore(worker)

    loader = Loader(list(range(8)), num_workers=2)
    loader.worker_init_fn = init
    batches = iter(loader)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) & CODES.keys() == set()
    started.extend(batches._workers)
    for process in started:
        for number in CODES:
            os.kill(process.pid, number)
    assert len(list(batches)) == 8
    assert all(process.is_alive() or process.exitcode == 0 for process in started)
    batches._shutdown_workers()
    assert [process.exitcode for process in started] == [0, 0]


def test_all_loaders_are_of_this_kind():
    """Nothing in the trainer starts processes but through Loader."""
    for path in (ROOT / "visattn" / "train").glob("*.py"):
        assert " DataLoader(" not in path.read_text(), path.name


@pytest.mark.slow
def test_an_error_that_nothing_catches_ends_the_loader_processes():
    """multiprocessing would send SIGTERM, which they ignore, and wait for ever."""
    code = "from visattn.train.loader import Loader; it = iter(Loader(range(99), num_workers=2)); next(it); 1 / 0"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("every", [0, 1])
def test_a_resume_is_suggested_where_there_is_a_checkpoint(folder_data, run, monkeypatch, capsys, every):
    take = Engine.update

    def update(self, *args):
        if self.state.update == 1:
            raise KeyboardInterrupt
        return take(self, *args)

    monkeypatch.setattr(Engine, "update", update)
    code, folder = run("r", "--data", folder_data, *SMALL, "--epochs", 1, "--checkpoint-every", every)
    assert code == 130
    hint = f"; --resume {folder} goes on from there\n" if every else " before the first checkpoint\n"
    assert capsys.readouterr().err == f"interrupted{hint}"
