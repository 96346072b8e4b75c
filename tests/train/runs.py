"""What the tests of whole runs share: how to build one, and how to read what it left."""

import contextlib
import csv
import io
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from visattn.train import distributed, metrics
from visattn.train import run as trainer
from visattn.train.arguments import parse
from visattn.train.checks import CONTROL
from visattn.train.errors import TrainError

SMALL = ("--img-size", 32, "--batch-size", 8, "--warmup-epochs", 0)
# One update an epoch: log.csv holds the loss of each. Nothing is drawn but the order.
PLAIN = ("--img-size", 32, "--batch-size", 32, "--warmup-epochs", 0, "--scale", 1, 1, "--ratio", 1.2, 1.2)
PLAIN += ("--hflip", 0, "--lr", 1e-3)

# No number of an option; and what somebody may put on a command line.
NONSENSE = ("-1", "nan", "inf", "-inf", "1e-320", "1e30", "9223372036854775808", f"1{'0' * 400}")
WORDS = (*NONSENSE, "0", "2147483648", "word", "", "a\nb", "\x1b[31mred", "\u202egnp", "x" * 5000, f"x/{'y' * 300}")


def slow(*values):
    """A case that only the full test run takes."""
    return pytest.param(*values, marks=pytest.mark.slow)


def attempt(action, *args):
    """What `action` returns, or None for a refusal: one sentence, or tyro's usage."""
    said, stopped = io.StringIO(), None
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return action(*args)
    except (TrainError, SystemExit) as error:
        stopped = error
    text = str(stopped) if isinstance(stopped, TrainError) else said.getvalue()
    if isinstance(stopped, TrainError):
        assert "expected " in text
        assert "; try " in text
        assert len(text) < 400, text
    else:
        assert stopped.code == 2
        assert len(text) < 5000
        text = text.replace("\n", "")
    assert not CONTROL.search(text)
    return None


def build(*options):
    """A run that is ready to train."""
    config = parse([str(option) for option in options])
    return trainer.build(config, distributed.start(config), metrics.make_console(enabled=False))


def rows(folder: Path) -> list[dict[str, str]]:
    """log.csv"""
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


def column(folder: Path, key: str) -> list[float]:
    """One column of log.csv."""
    return [float(row[key]) for row in rows(folder)]


def newest(folder: Path) -> Path:
    """The last checkpoint."""
    return sorted((folder / "checkpoints").glob("[0-9]*"))[-1]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint, whatever the number of processes that wrote it; not sharded ones."""
    found = {}
    for path in sorted(newest(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def assert_same_tensors(one: Path, other: Path) -> None:
    """The last checkpoints of two runs are bitwise equal."""
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]), key


def stop_after_first_epoch(whole: Path, parts: Path) -> None:
    """A copy of a run as if it had been killed after its first kept checkpoint."""
    shutil.copytree(whole, parts)
    for path in sorted((parts / "checkpoints").glob("[0-9]*"))[1:]:
        shutil.rmtree(path)
