"""The progress of an epoch on a terminal, in two lines that fit 80 columns."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


@dataclass(frozen=True)
class Status:
    """How the training goes after an update."""

    loss: float
    lr: float
    grad_norm: float
    images_per_s: float
    data_wait: float  # share of the time, 0 to 1
    memory_gb: float | None

    def __str__(self) -> str:
        memory = "" if self.memory_gb is None else f"  {self.memory_gb:.1f} GB"
        return (
            f"loss {self.loss:.3f}  lr {self.lr:.2e}  grad norm {self.grad_norm:.2f}  {self.images_per_s:.0f} img/s  "
            f"data wait {self.data_wait:.0%}{memory}"
        )


class EpochBar:
    """A progress bar for one epoch; silent where the console is no terminal, so that logs hold whole lines only."""

    def __init__(
        self, console: Console, epoch: int, epochs: int, updates: int, done: int = 0, enabled: bool = True
    ) -> None:
        self.enabled = enabled and console.is_terminal
        self._progress = _TwoLines(
            TextColumn(f"epoch {epoch}/{epochs}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            expand=True,
            disable=not self.enabled,
        )
        self._bar = self._progress.add_task("", total=updates, completed=done, status="")

    def __enter__(self) -> "EpochBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the terminal may have gone
            self._progress.stop()

    def step(self, status: Status) -> None:
        """Move on by one update."""
        if self.enabled:
            self._progress.update(self._bar, advance=1, status=str(status))


class _TwoLines(Progress):
    """The bar, and below it the status."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["status"], no_wrap=True, overflow="ellipsis")
