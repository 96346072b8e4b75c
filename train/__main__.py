"""`python -m train`: parse, build, train, report."""

import difflib
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from rich.console import Console
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import random_seed

import visattn  # noqa: F401  registers its models with timm
from train import checkpoint, metrics
from train.config import Config, parse, recipe, run_folder
from train.data import make_loaders, open_data, resolve
from train.engine import TrainState, evaluate, train_one_epoch, updates_per_epoch
from train.errors import ConfigError, TrainError


@dataclass
class Run:
    """A run that is ready to train."""

    config: Config
    folder: Path
    state: TrainState
    loaders: tuple[Any, Any]  # training, test
    num_classes: int
    epochs: int  # with the cool-down


def main(argv: list[str] | None = None) -> int:
    """Run the trainer; returns the exit code."""
    start = time.perf_counter()
    console = metrics.make_console()
    try:
        run = build(parse(argv), console)
        train(run, console)
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; --resume continues after the last complete epoch", file=sys.stderr)
        return 130
    report(run, console, time.perf_counter() - start)
    return 0


def build(config: Config, console: Console) -> Run:
    """Create everything a run needs; a resumed run gets its state back."""
    device = pick_device(config.device)
    if not timm.is_model(config.model):
        near = difflib.get_close_matches(config.model, timm.list_models(), n=3, cutoff=0.3)
        raise ConfigError(f"--model: expected a registered model, got {config.model!r}; try {', '.join(near)}")
    if config.opt not in list_optimizers():
        near = difflib.get_close_matches(config.opt, list_optimizers(), n=3, cutoff=0.0)
        raise ConfigError(f"--opt: expected a timm optimizer, got {config.opt!r}; try {', '.join(near)}")
    random_seed(config.seed)

    config = resolve(config, resolve_model_input_args(config.model)["pretrained_cfg"])
    data = open_data(config)
    loaders = make_loaders(config, data, device)
    model = make_model(config, data.num_classes).to(device)
    task = ClassificationTask(
        model,
        criterion_kwargs={"smoothing": config.smoothing, "soft_targets": bool(config.mixup or config.cutmix)},
        device=device,
    )
    optimizer = create_optimizer_v2(
        model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, layer_decay=config.layer_decay
    )
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=config.epochs,
        cooldown_epochs=config.cooldown_epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch(len(loaders[0]), config.grad_accum),
    )
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
    state = TrainState(task, optimizer, scheduler, scaler)

    if config.resume:
        folder = run_folder(config.resume)
        checkpoint.restore(checkpoint.load(folder / "last.pt"), state, config)
    else:
        folder = new_folder(config, data.name)
        checkpoint.write_atomic(folder / "args.yaml", yaml.safe_dump(recipe(config), sort_keys=False).encode())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    metrics.say(
        console,
        f"{config.model} ({parameters / 1e6:.2f} M parameters) on {data.name}: {len(data.train)} training and "
        f"{len(data.eval)} test images, {data.num_classes} classes, {config.img_size}x{config.img_size} px, {device}",
    )
    return Run(config, folder, state, loaders, data.num_classes, epochs)


def pick_device(name: str) -> torch.device:
    """`auto` or a torch device name, checked by placing a tensor there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device: expected a usable device, got {name!r} ({reason}); try --device cpu") from error


def make_model(config: Config, num_classes: int) -> torch.nn.Module:
    """Create the model for the resolved input; models of a fixed size are built for that size."""
    input_args = {"in_chans": config.in_chans, "img_size": config.img_size}
    arguments = resolve_model_input_args(config.model, input_args, num_classes=num_classes)
    if config.drop_path:  # only if asked for: not every timm model takes it
        arguments["drop_path_rate"] = config.drop_path
    try:
        return timm.create_model(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"expected options that {config.model} takes, got: {error}; try without --drop-path"
        ) from error


def new_folder(config: Config, data_name: str) -> Path:
    """Create the folder of a new run; never reuse one."""
    name = config.run or f"{config.model}-{data_name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = config.output / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise ConfigError(
            f"expected a new run folder, got {folder}, which exists; try --resume {folder} or another --run NAME"
        ) from error
    return folder


def train(run: Run, console: Console) -> None:
    """Train the epochs that are left. Files follow every epoch; the curves are drawn at the end, however it comes."""
    state, config, folder = run.state, run.config, run.folder
    device = state.task.device
    train_loader, eval_loader = run.loaders
    try:
        while state.epoch < run.epochs:
            start = time.perf_counter()
            meter, test = metrics.Meter(run.num_classes, device), metrics.Meter(run.num_classes, device)
            with metrics.EpochBar(console, state.epoch + 1, run.epochs, len(train_loader)) as bar:
                lr = train_one_epoch(state, train_loader, config, meter, bar)
            images_per_s = meter.images_per_s
            evaluate(state.task, eval_loader, config, test)
            state.epoch += 1
            row = {
                "epoch": state.epoch,
                "train_loss": meter.loss,
                "eval_loss": test.loss,
                "top1": round(test.top1, 4),
                "top5": round(test.top5, 4),
                "lr": lr,
                "images_per_s": round(images_per_s, 1),
                "seconds": round(time.perf_counter() - start, 2),
            }
            state.history.append(row)
            if row["top1"] > state.best_top1:
                state.best_top1, state.best_epoch = row["top1"], state.epoch
                checkpoint.save_weights(folder / "model.safetensors", state)
            checkpoint.save(folder / "last.pt", state, config)
            metrics.write_log(folder / "log.csv", state.history)
            metrics.say(console, metrics.epoch_line(row, run.epochs))
    finally:
        if state.history:
            metrics.draw_curves(folder / "curves.png", state.history, folder.name)


def report(run: Run, console: Console, seconds: float) -> None:
    """Say how good the model is, how long it took, and where the files are."""
    state = run.state
    metrics.say(
        console,
        f"test accuracy {state.history[-1]['top1']:.2f} % (best {state.best_top1:.2f} % at epoch {state.best_epoch}) "
        f"in {seconds:.0f} s",
    )
    metrics.say(console, f"output: {run.folder}")


if __name__ == "__main__":
    sys.exit(main())
