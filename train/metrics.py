"""What a run shows and leaves behind: running averages, progress bar, log.csv, curves.png."""

import csv
import io
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from train.checkpoint import write_atomic

COLUMNS = ("epoch", "train_loss", "eval_loss", "top1", "top5", "lr", "images_per_s", "seconds")


class Meter:
    """Loss, top-1 and top-5 (in %) over the images seen, and how fast they came."""

    def __init__(self, num_classes: int, device: torch.device):
        options = {"num_classes": num_classes, "average": "micro", "validate_args": False}
        self._loss = MeanMetric().to(device)
        self._top1 = MulticlassAccuracy(top_k=1, **options).to(device)
        self._top5 = MulticlassAccuracy(top_k=min(5, num_classes), **options).to(device)
        self._images = 0
        self._start = time.perf_counter()

    def update(self, loss: torch.Tensor, output: torch.Tensor, target: torch.Tensor) -> None:
        """Add a batch; of a mixed (soft) target the larger share counts as the class."""
        if target.ndim == 2:
            target = target.argmax(1)
        self._images += len(target)
        self._loss.update(loss.float(), weight=len(target))
        self._top1.update(output, target)
        self._top5.update(output, target)

    @property
    def loss(self) -> float:
        return self._loss.compute().item()

    @property
    def top1(self) -> float:
        return 100 * self._top1.compute().item()

    @property
    def top5(self) -> float:
        return 100 * self._top5.compute().item()

    @property
    def images_per_s(self) -> float:
        return self._images / max(time.perf_counter() - self._start, 1e-9)


class EpochBar:
    """A progress bar for one epoch; silent where the console is no terminal, so that logs hold whole lines only."""

    def __init__(self, console: Console, epoch: int, epochs: int, batches: int):
        self._progress = Progress(
            TextColumn(f"epoch {epoch}/{epochs}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("", total=batches, status="")

    def __enter__(self) -> "EpochBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, meter: Meter, lr: float) -> None:
        """Move on by one batch."""
        if not self._progress.disable:
            status = f"loss {meter.loss:.3f}  acc {meter.top1:.1f} %  lr {lr:.1e}  {meter.images_per_s:.0f} img/s"
            self._progress.update(self._bar, advance=1, status=status)


def make_console(stream: TextIO | None = None) -> Console:
    """A console that is a terminal only if its stream is one, whatever FORCE_COLOR says: logs stay plain text."""
    stream = stream or sys.stdout
    return Console(file=stream, force_terminal=stream.isatty(), highlight=False)


def say(console: Console, text: str) -> None:
    """Print one line as it is: no markup, no wrapping."""
    console.print(text, markup=False, soft_wrap=True)


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """The line a finished epoch leaves on the screen."""
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  train loss {row['train_loss']:.3f}  "
        f"test loss {row['eval_loss']:.3f}  top-1 {row['top1']:.2f} %  top-5 {row['top5']:.2f} %  "
        f"lr {row['lr']:.2e}  {row['images_per_s']:.0f} img/s  {row['seconds']:.1f} s"
    )


def write_log(path: Path, history: list[dict[str, Any]]) -> None:
    """Write the whole log anew: after a kill and a resume no epoch is missing or doubled."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(history)
    write_atomic(path, text.getvalue().encode())


def draw_curves(path: Path, history: list[dict[str, Any]], title: str) -> None:
    """Draw loss and accuracy over the epochs as a PNG; needs no display."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    figure.suptitle(title)
    losses, accuracy = figure.subplots(1, 2)
    losses.plot(epochs, [row["train_loss"] for row in history], label="train (as optimized)", color="tab:gray")
    losses.plot(epochs, [row["eval_loss"] for row in history], label="test (cross-entropy)", color="tab:blue")
    losses.set_ylabel("loss")
    losses.set_ylim(bottom=0)
    best = max(history, key=lambda row: row["top1"])
    accuracy.plot(epochs, [row["top5"] for row in history], label="test top-5", color="tab:gray")
    accuracy.plot(epochs, [row["top1"] for row in history], label="test top-1", color="tab:blue")
    accuracy.plot(best["epoch"], best["top1"], "o", color="tab:orange", label=f"best top-1: {best['top1']:.2f} %")
    accuracy.set_ylabel("accuracy (%)")
    for axes in (losses, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    write_atomic(path, png.getvalue())
