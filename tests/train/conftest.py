"""What the trainer's tests share: tiny data sets and ways to run."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """These models are too small for threads, which only wait for each other where the machine is busy."""


@pytest.fixture(autouse=True)
def own_signals():
    """Runs install signal handlers: put pytest's back."""
    from visattn.train.signals import CODES

    before = {name: signal.getsignal(name) for name in CODES}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.fixture
def folder_data(tmp_path):
    """An ImageFolder of two classes: 32 training and 12 test images, non-square, separable by their colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        for name, colour in (("red", (200, 60, 60)), ("blue", (60, 60, 200))):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(rng.normal(colour, 40, (40, 48, 3)), 0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "pictures"


@pytest.fixture
def run(tmp_path):
    """Call `python -m visattn.train` in this process with a small model; returns (exit code, run folder)."""
    from visattn.train.__main__ import main

    def call(name: str, *args: object, model: str = "test_vit"):
        options = () if "--resume" in args else ("--model", model, "--output", tmp_path / "out", "--name", name)
        return main([str(value) for value in (*options, *args)]), tmp_path / "out" / name

    return call


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A run of one epoch on digits."""
    from visattn.train.__main__ import main

    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("template")
    options = ("--model", "test_vit", "--batch-size", 1437, "--warmup-epochs", 0, "--epochs", 1)
    assert main([*map(str, options), "--output", str(output), "--name", "r"]) == 0
    return output / "r"


@pytest.fixture
def finished(template, tmp_path):
    """A copy of that run."""
    return shutil.copytree(template, tmp_path / "out" / "r")


@pytest.fixture
def refused(run, folder_data, capsys):
    """Run with options that cannot work; returns what is said."""
    from runs import SMALL

    def call(*options, model="test_vit"):
        code, _ = run("refused", "--data", folder_data, *SMALL, "--epochs", 1, *options, model=model)
        error = capsys.readouterr().err
        assert code == 2, error
        assert error.count("error: ") == 1, error
        assert "Traceback" not in error
        assert "expected " in error
        assert ", got" in error
        assert "; try " in error
        return error

    return call


class Processes:
    """The ranks of one run, as processes that can be killed."""

    def __init__(self, argv: list[str], log: Path, size: int, change: Callable[[], None] | None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        context = multiprocessing.get_context("forkserver")
        self.logs = [log.with_name(f"{log.name}.{rank}") for rank in range(size)]
        self.ranks = [
            context.Process(
                target=_child, args=(argv, {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, str(path), change)
            )
            for rank, path in enumerate(self.logs)
        ]
        for process in self.ranks:
            process.start()

    def kill(self, *ranks: int) -> None:
        """SIGKILL some ranks, or all."""
        for rank in ranks or range(len(self.ranks)):
            self.ranks[rank].kill()

    def signal(self, number: int) -> None:
        """Send a signal to all processes of all ranks, loaders too, as schedulers and torchrun do."""
        for process in self.ranks:
            with contextlib.suppress(ProcessLookupError):  # it may have ended, or not begun
                os.killpg(process.pid, number)

    def wait(self, seconds: float = 120) -> list[int | None]:
        """The exit codes of all ranks; None for one that is still running, which is then killed."""
        codes = []
        for process in self.ranks:
            process.join(seconds)
            codes.append(process.exitcode)
            process.kill()
            process.join()
        return codes

    def output(self) -> str:
        return "".join(path.read_text() for path in self.logs if path.exists())


def _child(argv: list[str], environment: dict[str, str], log: str, change: Callable[[], None] | None) -> None:
    os.setpgid(0, 0)
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # loader processes inherit what is imported and changed
    from visattn.train.__main__ import main

    if change:
        change()
    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@pytest.fixture
def launch(tmp_path):
    """Start the processes of `torchrun -m visattn.train` without its start-up time: forked after the imports.

    `change` runs first in each of them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["visattn.train.__main__", "sklearn.metrics"])
    started = []

    def call(*args: object, size: int = 1, model: str = "test_vit", change: Callable[[], None] | None = None):
        options = () if args[0] == "--resume" else ("--model", model, "--output", tmp_path / "out")
        argv = [str(value) for value in (*options, *args)]
        started.append(Processes(argv, tmp_path / f"log{len(started)}", size, change))
        return started[-1]

    yield call
    for processes in started:
        processes.wait(0)
