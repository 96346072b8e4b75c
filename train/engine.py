"""One epoch of training and one pass of evaluation."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad

from train.config import Config
from train.errors import NonFiniteLossError
from train.metrics import EpochBar, Meter


@dataclass
class TrainState:
    """All that changes while training, and so all that a checkpoint must hold besides the random generators."""

    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    epoch: int = 0  # complete epochs
    updates: int = 0  # optimizer updates so far
    best_top1: float = -1.0
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # the rows of log.csv


def updates_per_epoch(batches: int, grad_accum: int) -> int:
    """Optimizer updates in one epoch; the last of them may join fewer batches."""
    return math.ceil(batches / grad_accum)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision as `--amp` asks for."""
    dtype = torch.float16 if amp == "float16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "none")


def train_one_epoch(state: TrainState, loader: Any, config: Config, meter: Meter, bar: EpochBar) -> float:
    """Train for one pass over `loader`, filling `meter`; returns the learning rate of the last update."""
    task, batches, lr = state.task, len(loader), 0.0
    task.train()
    state.optimizer.zero_grad()
    for step, (images, target) in enumerate(loader):
        first = step - step % config.grad_accum
        joined = min(config.grad_accum, batches - first)
        with autocast(task.device, config.amp):
            result = task(images, target)
        loss = result["loss"]
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"expected a finite loss, got {loss.item()} in epoch {state.epoch + 1}, step {step + 1} of {batches} "
                f"(the optimizer step was not taken); try a lower --lr, --grad-clip 1.0 or --amp none"
            )
        state.scaler.scale(loss / joined).backward()
        meter.update(loss.detach(), result["output"].detach(), target)

        if step + 1 == first + joined:
            if config.grad_clip is not None:
                state.scaler.unscale_(state.optimizer)
                dispatch_clip_grad(task.get_clip_parameters(), config.grad_clip)
            # Layer decay scales the groups down from the head's, which has the learning rate that was asked for.
            lr = max(group["lr"] for group in state.optimizer.param_groups)
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.optimizer.zero_grad()
            state.updates += 1
            state.scheduler.step_update(state.updates)
        bar.step(meter, lr)
    return lr


@torch.no_grad()
def evaluate(task: TrainingTask, loader: Any, config: Config, meter: Meter) -> None:
    """Fill `meter` with the plain cross-entropy and the accuracy on `loader`."""
    task.eval()
    model = task.get_eval_model()
    for images, target in loader:
        with autocast(task.device, config.amp):
            output = model(images)
        output = output.float()
        meter.update(F.cross_entropy(output, target), output, target)
