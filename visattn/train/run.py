"""A run from its folder to its report: build, train, export."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from timm.models import resolve_model_input_args

from visattn.train import analysis, checkpoint, metrics, outputs, pictures, publish
from visattn.train.config import OVERRIDABLE, Config, Resolved, recipe
from visattn.train.data import open_data, resolve
from visattn.train.distributed import World, prepare
from visattn.train.engine import Engine, TrainState
from visattn.train.errors import CheckpointError, ConfigError, Interrupted
from visattn.train.flops import forward_flops, peak_flops, utilization
from visattn.train.loader import Images, Loaders, make_loaders
from visattn.train.lock import FolderLock
from visattn.train.loggers import Loggers, check_packages
from visattn.train.metrics import Meter, Speed, say
from visattn.train.model import (
    check_names,
    describe_model,
    make_model,
    make_optimizer,
    make_scheduler,
    make_task,
    try_training,
    warmup,
)
from visattn.train.outputs import open_folder
from visattn.train.progress import EpochBar, Status
from visattn.train.recipes import read_yaml
from visattn.train.seeding import seed_everything

LOG_EVERY = 10  # updates between two lines of the loggers


@dataclass
class Run:
    """A run that is ready to train."""

    config: Resolved
    folder: Path
    world: World
    state: TrainState
    engine: Engine
    console: Console
    class_names: list[str]
    flops: int | None  # of one image forward
    lock: FolderLock  # held by the main process
    model_config: bytes  # config.json
    owed: dict[str, Callable[[Path], Any]] = field(default_factory=dict)  # files that could not be written yet, by name
    said: dict[str, str] = field(default_factory=dict)  # why they could not, as the user has been told
    waiting: dict[str, float] = field(default_factory=dict)  # of these the weights, with their top-1

    @property
    def updates(self) -> int:
        """Updates in an epoch."""
        return self.engine.loaders.batches.updates

    @property
    def epochs(self) -> int:
        """Epochs with the cool-down."""
        return self.config.epochs + self.config.cooldown_epochs

    @property
    def trained(self) -> bool:
        """True after the last update, and once `--patience` is over."""
        return self.state.place >= self.epochs * self.updates or self.impatient

    @property
    def impatient(self) -> bool:
        """True where as many epochs as `--patience` says were no better than one before them."""
        patience = self.config.patience
        return patience is not None and metrics.epochs_since_best(self.state.history) >= patience


def build(config: Config, world: World, console: Console) -> Run:
    """Create everything a run needs; a resumed run gets its state back."""
    check_names(config)
    check_packages(config)
    if config.push_to_hub:
        world.on_main(lambda: publish.check_access(config.push_to_hub))
    config = resolve(config, resolve_model_input_args(config.model)["pretrained_cfg"])
    data = open_data(config)
    for source in (data.train, data.eval):
        if source.report:
            say(console, source.report)
    loaders = make_loaders(config, data, world)
    seed_everything(config.seed, "weights")
    model = make_model(config, data.num_classes, console).to(world.device)
    if config.channels_last and config.engine != "fsdp2":  # which takes contiguous weights only
        model = model.to(memory_format=torch.channels_last)
    flops = forward_flops(model, config.in_chans, config.img_size) if world.main else None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model_config = describe_model(model, config, data.class_names)
    task = make_task(config, model, world.device)
    try_training(model, config, loaders.batches, world)
    prepare(task, config, world)
    optimizer = make_optimizer(config, task)
    scheduler = make_scheduler(config, optimizer, loaders.batches.updates)
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "float16")
    state = TrainState(task, optimizer, scheduler, scaler, Meter(), [len(data.train), len(data.eval)])
    if warmup(config) != config.warmup_epochs:
        say(console, f"warm-up: {warmup(config):g} of {config.epochs} epochs, as {config.warmup_epochs:g} do not fit")
    lock = FolderLock()
    try:
        folder = world.on_main(lambda: open_folder(config, data.name, lock, console))
        if not all(world.gather(os.path.isfile(folder / "args.yaml"))):
            raise ConfigError(
                f"--output: expected a folder that all processes share, got {folder}, which some do not see; "
                "try one on a network file system"
            )
        if config.resume:
            resume(folder, config, state, loaders, world, console)
    except BaseException:
        lock.release()
        raise
    say(
        console,
        f"{config.model} ({parameters / 1e6:.2f} M parameters) on {data.name}: {len(data.train)} training and "
        f"{len(data.eval)} test images, {data.num_classes} classes, {config.img_size}x{config.img_size} px, "
        f"{world.device.type}{f' x {world.size} ({config.engine})' if world.size > 1 else ''}",
    )
    engine = Engine(state, loaders, config, world)
    return Run(config, folder, world, state, engine, console, data.class_names, flops, lock, model_config)


def resume(folder: Path, config: Config, state: TrainState, loaders: Loaders, world: World, console: Console) -> None:
    """Give a freshly built state what its run has come to, and keep the options where they have changed."""
    options = recipe(read_yaml(folder / "args.yaml"))
    checkpoint.check_recipe(config, options, OVERRIDABLE if config.override else ())
    then = options
    path = world.on_main(lambda: checkpoint.newest(folder, console))
    if path:
        then = checkpoint.restore(path, state, config, world, loaders.batches)
        loaders.train_images.bad[state.bad_train] = 1
        loaders.eval_images.bad[state.bad_eval] = 1
    updates, epochs = loaders.batches.updates, config.epochs + config.cooldown_epochs
    begun = math.ceil(state.place / updates)
    if begun > epochs:
        raise ConfigError(
            f"--epochs: expected at least the {begun - config.cooldown_epochs} that have begun, got {config.epochs}; "
            f"try --epochs {begun - config.cooldown_epochs}"
        )
    changed = checkpoint.changes(config, then)
    if state.place == epochs * updates and changed.keys() - {"epochs", "cooldown_epochs"}:
        raise ConfigError(
            f"--override: expected epochs that are left to train, got none and {', '.join(changed.values())}; "
            f"try --epochs {config.epochs + 1} too"
        )
    before = max(group["lr"] for group in state.optimizer.param_groups)
    state.scheduler.step_update(state.place)
    after = max(group["lr"] for group in state.optimizer.param_groups)
    over = state.place >= epochs * updates
    say(console, f"resumed after update {state.update}{f', the last: --epochs N with N above {epochs} goes on' * over}")
    if changed:
        say(console, f"from here on {', '.join(changed.values())}; the learning rate goes from {before:g} to {after:g}")
    now = options | {key: recipe(config)[key] for key in changed}
    if now != options:
        world.on_main(lambda: outputs.keep_options(folder, now))


def train(run: Run) -> None:
    """Train the epochs that are left. Files follow every epoch; the curves are drawn at the end, however it comes."""
    if run.state.history:  # an earlier session may have been killed between files that belong together
        _catch_up(run)
    loggers = Loggers(run.folder, run.config, run.console, run.state.update) if run.world.main else None
    try:
        while run.state.row or not run.trained:
            saved = run.state.row is not None or train_epoch(run, loggers)
            close_epoch(run, loggers, saved)
    finally:
        if run.world.main and run.state.history and run.lock.holds():
            outputs.keep_history(run)  # the last checkpoint may have failed before
            draw = partial(pictures.draw_curves, history=run.state.history, title=run.folder.name)
            outputs.keep(run, "curves.png", draw)
        if loggers:
            loggers.close()
    _catch_up(run)
    if run.impatient:
        patience = run.config.patience
        text = f"stopped early: {patience} epochs without a better top-1"
        say(run.console, f"{text}; --resume {run.folder} --override --patience N goes on, with N above {patience}")
    analysis.examine(run)
    outputs.settle(run)


def _catch_up(run: Run) -> None:
    exported = dict(run.state.best)
    outputs.catch_up(run)
    if run.state.best != exported:  # which the last checkpoint does not know
        save(run)


def train_epoch(run: Run, loggers: Loggers | None) -> bool:
    """Train to the end of the epoch; says whether a checkpoint of it was written."""
    state, config, world, engine = run.state, run.config, run.world, run.engine
    epoch, done = divmod(state.place, run.updates)
    batches = engine.loaders.begin(epoch, done)
    if state.update == 0:
        batches = analysis.show_first_batch(run, batches)
    speed = Speed()
    with EpochBar(run.console, epoch + 1, run.epochs, run.updates, done, enabled=world.main) as bar:
        while True:
            taken = engine.update(batches, speed)
            done += 1
            rates = {"images_per_s": speed.images_per_s, "data_wait": speed.data_wait}
            memory = metrics.memory_gb(world.device)
            bar.step(Status(state.meter.loss, taken.lr, taken.grad_norm, memory_gb=memory, **rates))
            if loggers and state.update % LOG_EVERY == 0:
                loggers.update(
                    state.update, {"train_loss": taken.loss, "lr": taken.lr, "grad_norm": taken.grad_norm, **rates}
                )
            if done == run.updates:  # the epoch saves
                break
            due = config.checkpoint_every and state.update % config.checkpoint_every == 0
            if taken.stop or due:
                _name_bad_images(run)
                save(run)
                if taken.stop:
                    raise Interrupted(f"stopped after update {state.update}")
    _name_bad_images(run)
    state.row = {
        "epoch": epoch + 1,
        "update": state.update,
        "train_loss": state.meter.loss,
        "lr": taken.lr,
        "grad_norm": taken.grad_norm,
        **_speeds(run, speed, memory),
        "skipped": state.skipped,
        "seconds": speed.seconds,
    }
    state.meter = Meter()
    saved = save(run)
    if taken.stop:
        raise Interrupted(f"stopped before the evaluation after update {state.update}")
    return saved


def close_epoch(run: Run, loggers: Loggers | None, saved: bool) -> None:
    """Evaluate, and leave the row and the best weights. If the epoch's checkpoint is `saved`, the row goes into it."""
    state, speed = run.state, Speed()
    row: dict[str, Any] = {**(state.row or {}), **_evaluate(run), "bad_images": _name_bad_images(run)}
    row["seconds"] = round(row["seconds"] + speed.seconds, 2)
    state.history.append(row)
    state.row = None
    outputs.export_best(run)
    if saved:
        saved = save(run, progress_only=True)
    if not saved and run.trained:  # the last one must be written
        checkpoint.save(run.folder, state, run.config, run.world)
    if loggers:
        outputs.keep_history(run)
        say(run.console, metrics.epoch_line(row, run.epochs))
        loggers.epoch(row, state.update)


def _evaluate(run: Run) -> dict[str, float | None]:
    """Evaluate the model and its average."""
    row = {}
    for prefix, ema in (("", False), ("ema_", True)):
        if ema and not run.state.task.has_ema():
            row |= {"ema_loss": None, "ema_top1": None, "ema_top5": None}
            continue
        test = run.engine.evaluate(ema)
        row |= {f"{prefix or 'eval_'}loss": test["loss"]}
        row |= {f"{prefix}{key}": round(test[key], 4) for key in ("top1", "top5")}
    return row


def _speeds(run: Run, speed: Speed, memory: float | None) -> dict[str, float | None]:
    """How fast the epoch was."""
    peak = peak_flops(run.world.device, run.config.amp, run.config.peak_tflops)
    mfu = used = None
    if run.flops:
        used = 3 * run.flops * speed.images_per_s / 1e9
        mfu = utilization(run.flops, speed.images_per_s, run.world.size, peak)
    return {
        "images_per_s": round(speed.images_per_s, 1),
        "data_wait": round(speed.data_wait, 4),
        "memory_gb": memory and round(memory, 3),
        "gflops_per_s": used and round(used, 1),
        "mfu": mfu and round(mfu, 4),
    }


def _name_bad_images(run: Run) -> int:
    """Agree on the unreadable images, name the new ones once, and count them all."""
    state, loaders = run.state, run.engine.loaders
    state.bad_train = _merge_bad(run, loaders.train_images, state.bad_train)
    state.bad_eval = _merge_bad(run, loaders.eval_images, state.bad_eval)
    return len(state.bad_train) + len(state.bad_eval)


def _merge_bad(run: Run, images: Images, known: list[int]) -> list[int]:
    bad = run.world.merge(images.bad).nonzero().flatten().tolist()
    for index in sorted(set(bad) - set(known)) if run.world.main else ():
        say(run.console, f"unreadable image: {images.source.describe(index)}")
    return bad


def save(run: Run, progress_only: bool = False) -> bool:
    """Write what is owed, then a checkpoint; a run that cannot goes on, says so, keeps the one before: False."""
    outputs.settle(run)
    write = checkpoint.save_progress if progress_only else checkpoint.save
    try:
        write(run.folder, run.state, run.config, run.world)
    except CheckpointError as error:
        say(run.console, f"warning: {error}; training goes on")
        return False
    return True


def report(run: Run, seconds: float) -> None:
    """Say how good the model is, how long it took, and where the files are.

    Raises:
        OutputError: on all processes, if one of the files is missing or older.
    """
    state = run.state
    best = max(state.history, key=lambda row: row["top1"])
    average = f", EMA {state.history[-1]['ema_top1']:.2f} %" if state.task.has_ema() else ""
    say(
        run.console,
        f"test accuracy {state.history[-1]['top1']:.2f} % (best {best['top1']:.2f} % at epoch {best['epoch']}{average})"
        f" in {seconds:.0f} s",
    )
    say(run.console, f"output: {run.folder}")
    run.world.on_main(lambda: outputs.check_complete(run))
    if run.config.push_to_hub:
        say(run.console, f"pushed: {run.world.on_main(lambda: publish.push(run.folder, run.config, best))}")
