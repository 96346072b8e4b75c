"""What a run measures and says: loss, speed, one line an epoch, log.csv."""

import contextlib
import csv
import io
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console

from visattn.train.errors import printable
from visattn.train.files import write_atomic

COLUMNS = (
    "epoch",
    "update",
    "train_loss",  # as optimized: with smoothing, mixing and distillation
    "eval_loss",  # cross-entropy on the test images
    "top1",  # in %
    "top5",
    "ema_loss",  # the same of the averaged weights; empty without them
    "ema_top1",
    "ema_top5",
    "lr",
    "grad_norm",  # of the epoch's last update, before clipping
    "images_per_s",
    "data_wait",  # share of the training time, 0 to 1
    "memory_gb",  # most so far, of one process
    "gflops_per_s",  # of the model, over all processes
    "mfu",  # share of the devices' peak, 0 to 1
    "skipped",  # updates so far, for a loss or gradient that was not finite
    "bad_images",  # unreadable ones so far
    "seconds",  # with the evaluation
)


class Meter:
    """Mean training loss; its state is two numbers, which JSON keeps exactly."""

    def __init__(self) -> None:
        self._loss_sum, self._images = 0.0, 0

    def add(self, loss_sum: float, images: int) -> None:
        """Add the sum of the losses of some images."""
        self._loss_sum += loss_sum
        self._images += images

    @property
    def loss(self) -> float:
        """NaN before the first image."""
        return self._loss_sum / self._images if self._images else float("nan")

    def state_dict(self) -> dict[str, float]:
        return {"loss_sum": self._loss_sum, "images": self._images}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._loss_sum, self._images = state["loss_sum"], int(state["images"])


class Speed:
    """The clock of an epoch. Rates are those up to the last images counted, whatever follows them."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._images, self._waited = 0, 0.0

    def waited(self, seconds: float) -> None:
        """Add time spent waiting for data."""
        self._waited += seconds

    def images(self, count: int) -> None:
        """Count images that have been trained on."""
        self._images += count
        self._last = time.perf_counter()

    @property
    def images_per_s(self) -> float:
        return self._images / max(self._last - self._start, 1e-9)

    @property
    def data_wait(self) -> float:
        """Share of the time, 0 to 1."""
        return min(self._waited / max(self._last - self._start, 1e-9), 1.0)

    @property
    def seconds(self) -> float:
        """Until now."""
        return time.perf_counter() - self._start


def memory_gb(device: torch.device) -> float | None:
    """Most memory held so far: by tensors on a GPU, by the process on a CPU; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    if device.type != "cpu":
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class _Console(Console):
    """A console whose broken pipe is an error like others; rich would end the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def make_console(stream: TextIO | None = None, enabled: bool = True) -> Console:
    """A console that is a terminal only if its stream is one, whatever FORCE_COLOR says: logs stay plain text."""
    stream = stream or sys.stdout
    return _Console(file=stream, force_terminal=stream.isatty(), highlight=False, quiet=not enabled)


def say(console: Console, text: str) -> None:
    """Print one line as it is: no markup, no emoji, no wrapping. A run outlives whatever read its output.

    What the terminal would obey, or the stream's encoding lacks, is spelled out: names of files may hold anything.
    """
    text = printable(text).encode(console.encoding, "backslashreplace").decode(console.encoding)
    with contextlib.suppress(OSError):
        console.print(text, markup=False, emoji=False, soft_wrap=True)


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """The line a finished epoch leaves on the screen."""
    ema = "" if row["ema_top1"] is None else f" (EMA {row['ema_top1']:.2f} %)"
    mfu = "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}"
    lost = {"updates skipped": row["skipped"], "unreadable images": row["bad_images"]}
    lost = "".join(f"  {count} {what}" for what, count in lost.items() if count)
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  train loss {row['train_loss']:.3f}  "
        f"test loss {row['eval_loss']:.3f}  top-1 {row['top1']:.2f} %{ema}  top-5 {row['top5']:.2f} %  "
        f"lr {row['lr']:.2e}  {row['images_per_s']:.0f} img/s{mfu}  {row['seconds']:.1f} s{lost}"
    )


def epochs_since_best(history: list[dict[str, Any]]) -> int:
    """Epochs since the model, or its average, last had a better top-1 than ever before."""
    since = []
    for column in ("top1", "ema_top1"):
        tops = [row[column] for row in history if row[column] is not None]
        since += [len(tops) - 1 - tops.index(max(tops))] if tops else []
    return min(since, default=0)


def write_log(path: Path, history: list[dict[str, Any]]) -> None:
    """Write the whole log anew: after a kill and a resume no epoch is missing or doubled."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(history)
    write_atomic(path, text.getvalue().encode())
