"""Training updates that all processes take or leave together, and evaluation."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationEvaluator, TrainingTask
from timm.utils import unwrap_model
from torch.distributed.fsdp import FSDPModule

from visattn.train.config import Config
from visattn.train.distributed import World, synchronize_gradients
from visattn.train.errors import DataError, Interrupted, NonFiniteLossError
from visattn.train.loader import Loaders, plain_errors
from visattn.train.metrics import Meter, Speed
from visattn.train.model import frozen_modules
from visattn.train.seeding import seed_everything

SMALLEST_SCALE = 2.0**-14  # float16 losses that overflow even so do not come back


@dataclass
class TrainState:
    """All that changes while training. Randomness is no part of it: it follows from `update` (train.seeding)."""

    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    meter: Meter  # training loss of the epoch so far
    images: list[int] = field(default_factory=list)  # how many to train and to test with; their order follows from it
    update: int = 0  # updates so far, dropped ones too
    shift: int = 0  # how many of them do not count for the place, after a change of the batch size
    skipped: int = 0  # updates dropped for a non-finite loss or gradient
    skipped_in_a_row: int = 0
    bad_train: list[int] = field(default_factory=list)  # unreadable images that have been named
    bad_eval: list[int] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)  # best top-1 of the model and of its average
    history: list[dict[str, Any]] = field(default_factory=list)  # the rows of log.csv
    row: dict[str, Any] | None = None  # of an epoch that has been trained and is to be evaluated

    PROGRESS = ("images", "update", "shift", "skipped", "skipped_in_a_row")
    PROGRESS += ("bad_train", "bad_eval", "best", "history", "row")

    @property
    def place(self) -> int:
        """Updates so far in the data and in the schedule."""
        return self.update - self.shift

    def progress(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {name: getattr(self, name) for name in self.PROGRESS} | {"meter": self.meter.state_dict()}

    def load_progress(self, values: dict[str, Any]) -> None:
        """Take the values of `progress()` back."""
        values = {"shift": 0, "row": None, "images": self.images, **values}  # which older checkpoints lack
        for name in self.PROGRESS:
            setattr(self, name, values[name])
        self.meter.load_state_dict(values["meter"])


@dataclass(frozen=True)
class Taken:
    """What an update came to."""

    loss: float
    grad_norm: float
    lr: float
    stop: bool  # a process was asked to stop


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision as `--amp` asks for."""
    dtype = torch.float16 if amp == "float16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "none")


class Engine:
    """Takes updates. `stop` may be set at any time, by a signal handler for example."""

    def __init__(self, state: TrainState, loaders: Loaders, config: Config, world: World):
        self.state, self.loaders, self.config, self.world = state, loaders, config, world
        self.model = unwrap_model(state.task.get_trainable_module())
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # Modules that are not trained at all do not change in training either: no statistics, no dropping.
        self.frozen = frozen_modules(self.model)
        self.buffers = list(self.model.buffers())
        self.backup = [buffer.clone() for buffer in self.buffers]
        self.stop = 0  # asked for, with this exit code

    def update(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], speed: Speed) -> Taken:
        """Take the next update, or drop it on all processes if a loss or a gradient of any of them is not finite.

        Raises:
            NonFiniteLossError: `--nonfinite halt`, or too many dropped in a row. No weight has changed.
            DataError: more unreadable images than `--max-bad` allows.
        """
        state, config, world = self.state, self.config, self.world
        if self.buffers:
            torch._foreach_copy_(self.backup, self.buffers)
        if not self.model.training:  # after an evaluation; a walk over all modules is 1 % of a small model's update
            state.task.train()
        for module in self.frozen:
            module.eval()
        loss = self._backward(batches, speed)
        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        whole_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm

        finite = torch.isfinite(loss) & torch.isfinite(whole_norm)
        # By numpy, which takes 0.05 ms for the marks of ImageNet; torch's sum takes 1.5 ms, in every update.
        bad = np.count_nonzero(self.loaders.train_images.bad.numpy()) - len(state.bad_train)
        loss, unusable, stop, bad, overflow = world.total(
            [loss / world.size, ~finite, self.stop, bad, torch.isfinite(loss) & ~finite]
        )
        lr = max(group["lr"] for group in state.optimizer.param_groups)  # layer decay scales the others down from it
        state.update += 1
        if unusable:
            self._drop(loss, overflow == world.size)
        else:
            if config.grad_clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self.trained, config.grad_clip, norm)
            state.scaler.step(state.optimizer)
            state.scaler.update()
            world.average_batch_norm(self.model)
            state.task.update_ema(step=state.update - state.skipped)
            state.skipped_in_a_row = 0
            state.meter.add(loss * config.batch_size, config.batch_size)
        state.optimizer.zero_grad()
        state.scheduler.step_update(state.place)
        speed.images(config.batch_size)
        self._check_bad(len(state.bad_train) + int(bad))
        return Taken(loss, whole_norm.item(), lr, stop > 0)

    def _backward(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], speed: Speed) -> torch.Tensor:
        """Add up the gradients of this process's part of an update; returns its mean loss."""
        state, config, parts = self.state, self.config, self.loaders.batches.parts
        total = torch.zeros((), device=self.world.device)
        for part in range(parts):
            start = time.perf_counter()
            images, target = next(batches)
            speed.waited(time.perf_counter() - start)
            if config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            seed_everything(config.seed, "step", state.update, part, self.world.rank)
            with synchronize_gradients(state.task, last=part + 1 == parts):
                with autocast(self.world.device, config.amp):
                    loss = state.task(images, target)["loss"] / parts
                state.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _drop(self, loss: float, overflow: bool) -> None:
        """Leave an update out: weights, averages and running statistics stay as they were."""
        state, config = self.state, self.config
        reports = self.world.gather(self._culprit())
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.backup)
        state.skipped += 1
        if state.scaler.is_enabled() and overflow:
            # A finite loss whose scaled gradients overflow is float16 as usual: a smaller scale, the same on all.
            scale = state.scaler.get_scale() * state.scaler.get_backoff_factor()
            state.scaler.update(scale)
            if scale >= SMALLEST_SCALE:
                return
        elif state.scaler.is_enabled():
            state.scaler.update(state.scaler.get_scale())
        state.skipped_in_a_row += 1
        if config.nonfinite == "halt" or state.skipped_in_a_row > config.max_skips:
            updates = self.loaders.batches.updates
            where = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(reports) if text)
            epoch, update = divmod(state.place - 1, updates)
            raise NonFiniteLossError(
                f"expected a finite loss and gradient, got loss {loss} in epoch {epoch + 1}, update {update + 1} of "
                f"{updates} ({where}); the optimizer step was not taken; try a lower --lr, --grad-clip 1.0, "
                "--amp none, or --nonfinite skip"
            )

    def _culprit(self) -> str:
        """Where this process first finds a value that is not finite."""
        named = list(self.model.named_parameters())
        for what, tensors in (
            ("weight", named),
            ("gradient of", [(name, p.grad) for name, p in named if p.grad is not None]),
        ):
            for name, tensor in tensors:
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                if not torch.isfinite(local).all():
                    return f"{what} {name}"
        return ""

    def _check_bad(self, bad: int) -> None:
        images = len(self.loaders.train_images)
        most = math.ceil(self.config.max_bad * images)
        if bad > most:  # an image that several processes met has been counted by each of them
            bad = int(self.world.merge(self.loaders.train_images.bad.clone()).count_nonzero())
        if bad > most:
            raise DataError(
                f"expected at most {self.config.max_bad:.1%} unreadable training images, got {bad} of {images}; "
                "try to repair the data, or a higher --max-bad"
            )

    @torch.no_grad()
    def evaluate(self, ema: bool = False) -> dict[str, float]:
        """Cross-entropy, top-1 and top-5 in % over the readable test images of all processes, each counted once.

        Raises:
            Interrupted: a process was asked to stop. The checkpoint is older than the evaluation.
            DataError: no test image can be read.
        """
        evaluator = ClassificationEvaluator(self.world.device)
        for output, target in self._outputs(ema):
            readable = target >= 0
            evaluator.update(output[readable], target[readable])
        if not self.world.total([evaluator.num_samples])[0]:
            source = self.loaders.eval_images.source
            raise DataError(f"expected readable test images, got none, as {source.describe(0)}; try to repair the data")
        return dict(evaluator.compute(distributed=self.world.size > 1))

    @torch.no_grad()
    def predictions(self) -> np.ndarray:
        """The predicted class, its probability, and the loss of each test image; -1 for unreadable ones.  # [3, images]

        Raises:
            Interrupted: a process was asked to stop.
        """
        found = torch.full((3, len(self.loaders.eval_images)), -1.0)
        place, step = self.world.rank, self.world.size  # the processes take turns
        for output, target in self._outputs(ema=False):
            log_probabilities = output.float().log_softmax(1)
            confidence, predicted = log_probabilities.exp().max(1)
            losses = -log_probabilities.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
            values = torch.stack([predicted, confidence, losses]).masked_fill(target < 0, -1)
            found[:, place : place + step * len(target) : step] = values.cpu()
            place += step * len(target)
        return self.world.merge(found).numpy()

    def _outputs(self, ema: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The logits of this process's test images in their order, with their classes; -1 for an unreadable image."""
        # Not get_eval_model: of what fsdp2 has sharded only the whole can be called.
        model = unwrap_model(self.state.task.get_trainable_module(ema=ema))
        model.eval()
        left = self.loaders.real_eval_images
        for images, target in plain_errors(self.loaders.eval):
            if self.world.total([self.stop])[0]:
                raise Interrupted(f"stopped in the evaluation after update {self.state.update}")
            if self.config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast(self.world.device, self.config.amp):
                output = model(images)
            if isinstance(output, tuple):  # feature distillation: logits and features
                output = output[0]
            output, target = output[: max(left, 0)], target[: max(left, 0)]  # the rest is padding
            left -= len(images)
            yield output, target
        if isinstance(model, FSDPModule):
            model.reshard()  # its own parameters stay gathered after a forward pass, for a backward pass
