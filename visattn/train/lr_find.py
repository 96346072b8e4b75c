"""`--lr-find`: how the loss goes while the learning rate rises from update to update; a curve and a suggestion.

The range test of Smith (arXiv:1506.01186). The suggestion is that of Howard and Gugger (Deep Learning for Coders,
chapter 5; fastai's `minimum`): a tenth of the learning rate at which the smoothed loss was lowest.
"""

import itertools
import math
from typing import TYPE_CHECKING

import torch
from timm.scheduler.scheduler import Scheduler

from visattn.train import pictures
from visattn.train.errors import Interrupted, NonFiniteLossError, OutputError
from visattn.train.files import write_table
from visattn.train.metrics import Speed, say

if TYPE_CHECKING:
    from visattn.train.run import Run

LOWEST, HIGHEST, UPDATES = 1e-7, 10.0, 100
SMOOTHING = 0.9  # of the loss, an exponential average
DIVERGED = 4.0  # times the lowest smoothed loss, from where on nothing more is to be seen


class Sweep(Scheduler):
    """From `LOWEST` to `HIGHEST` by equal factors; layer decay scales it as it does any schedule."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.step_update(0)

    def _get_lr(self, t: int) -> list[float]:
        return [LOWEST * (HIGHEST / LOWEST) ** (t / (UPDATES - 1))] * len(self.base_values)


def find_lr(run: "Run") -> float | None:
    """Train with rising learning rates, draw the losses, and say what to try; all processes together.

    Returns the suggestion, None if the loss did not fall.
    """
    say(run.console, f"learning rates from {LOWEST:g} to {HIGHEST:g} in {UPDATES} updates")
    rates, losses, smoothed = _sweep(run)
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__, default=0)
    suggestion = rates[lowest] / 10 if smoothed and smoothed[lowest] < 0.99 * smoothed[0] else None

    def write() -> None:
        try:
            rows = zip(rates, losses, smoothed, strict=True)
            write_table(run.folder / "lr_find.csv", ("lr", "train_loss", "smoothed"), rows)
            pictures.draw_lr_find(run.folder / "lr_find.png", rates, losses, smoothed, suggestion, run.folder.name)
        except OSError as error:
            raise OutputError(f"expected to write lr_find.png, got: {error}; try another --output") from error

    run.world.on_main(write)
    if suggestion is None:
        say(
            run.console,
            "no suggestion, as the loss fell at no learning rate; try whether the labels are right",
        )
    else:
        say(run.console, f"try --lr {suggestion:.1e}: a tenth of the rate at which the smoothed loss was lowest")
    say(run.console, f"curve: {run.folder / 'lr_find.png'}")
    return suggestion


def _sweep(run: "Run") -> tuple[list[float], list[float], list[float]]:
    """The learning rates so far as the loss stays finite and low, the losses, and their average."""
    run.state.scheduler = Sweep(run.state.optimizer)
    epochs = (run.engine.loaders.begin(epoch, 0) for epoch in itertools.count())
    batches, speed = itertools.chain.from_iterable(epochs), Speed()
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    while len(rates) < UPDATES:
        try:
            taken = run.engine.update(batches, speed)
        except NonFiniteLossError:
            break
        if taken.stop:
            raise Interrupted("stopped in the search for a learning rate")
        average = SMOOTHING * average + (1 - SMOOTHING) * taken.loss
        now = average / (1 - SMOOTHING ** (len(rates) + 1))  # without the weight of the 0 that it began with
        if not math.isfinite(now) or now > DIVERGED * min(smoothed, default=now):
            break
        rates.append(taken.lr)
        losses.append(taken.loss)
        smoothed.append(now)
    return rates, losses, smoothed
