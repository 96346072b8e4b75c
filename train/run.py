"""A run from its folder to its report: build, train, export."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
import yaml
from rich.console import Console
from timm.models import resolve_model_input_args

from train import checkpoint, metrics
from train.config import Config, read_yaml, recipe, run_folder
from train.data import open_data, resolve
from train.distributed import World, prepare
from train.engine import Engine, Taken, TrainState
from train.errors import CheckpointError, ConfigError, Interrupted, printable
from train.files import write_atomic
from train.flops import forward_flops, peak_flops, utilization
from train.loader import Images, make_loaders
from train.loggers import Loggers, check_packages
from train.metrics import Meter, Speed, say
from train.model import check_names, export_state, make_model, make_optimizer, make_scheduler, make_task
from train.progress import EpochBar, Status
from train.seeding import seed_everything
from train.weights import export

LOG_EVERY = 10  # updates between two lines of the loggers


@dataclass
class Run:
    """A run that is ready to train."""

    config: Config  # resolved
    folder: Path
    world: World
    state: TrainState
    engine: Engine
    console: Console
    flops: int | None  # of one image forward

    @property
    def updates(self) -> int:
        """Updates in an epoch."""
        return self.engine.loaders.batches.updates

    @property
    def epochs(self) -> int:
        """Epochs with the cool-down."""
        return self.config.epochs + self.config.cooldown_epochs


def build(config: Config, world: World, console: Console) -> Run:
    """Create everything a run needs; a resumed run gets its state back."""
    check_names(config)
    check_packages(config)
    config = resolve(config, resolve_model_input_args(config.model)["pretrained_cfg"])
    data = open_data(config)
    loaders = make_loaders(config, data, world)
    seed_everything(config.seed, "weights")
    model = make_model(config, data.num_classes, console).to(world.device)
    if config.channels_last and config.engine != "fsdp2":  # which takes contiguous weights only
        model = model.to(memory_format=torch.channels_last)
    flops = forward_flops(model, config.in_chans, config.img_size) if world.main else None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    task = make_task(config, model, world.device)
    prepare(task, config, world)
    optimizer = make_optimizer(config, task)
    scheduler = make_scheduler(config, optimizer, loaders.batches.updates)
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "float16")
    state = TrainState(task, optimizer, scheduler, scaler, Meter())

    if config.resume:
        folder = run_folder(config.resume)
        path = _on_main(world, lambda: checkpoint.newest(folder, console))
        if path:
            checkpoint.restore(path, state, config, world)
            for images, bad in ((loaders.train.dataset, state.bad_train), (loaders.eval.dataset, state.bad_eval)):
                images.bad[bad] = 1
        else:
            checkpoint.check_recipe(config, recipe(read_yaml(folder / "args.yaml")))
        say(console, f"resumed after update {state.update}")
    else:
        folder = _on_main(world, lambda: new_folder(config, data.name))
    if not all(world.gather((folder / "args.yaml").is_file())):
        raise ConfigError(
            f"--output: expected a folder that all processes share, got {folder}, which some do not see; "
            "try one on a network file system"
        )
    say(
        console,
        f"{config.model} ({parameters / 1e6:.2f} M parameters) on {data.name}: {len(data.train)} training and "
        f"{len(data.eval)} test images, {data.num_classes} classes, {config.img_size}x{config.img_size} px, "
        f"{world.device.type}{f' x {world.size} ({config.engine})' if world.size > 1 else ''}",
    )
    return Run(config, folder, world, state, Engine(state, loaders, config, world), console, flops)


def _on_main(world: World, action: Callable[[], Path | None]) -> Path | None:
    """Let one process act, and all share what came of it: a path, or the error."""
    outcome = None
    if world.main:
        try:
            outcome = action()
        except (ConfigError, CheckpointError) as error:
            outcome = error
    outcome = world.gather(outcome)[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def new_folder(config: Config, data_name: str) -> Path:
    """Create the folder of a new run with its args.yaml; never reuse one that has begun."""
    name = config.name or printable(f"{config.model}-{data_name}-{datetime.now():%Y%m%d-%H%M%S}")
    folder = config.output / name
    try:
        if (folder / "args.yaml").exists():
            raise ConfigError(
                f"expected a new run folder, got {folder}, which exists; try --resume {folder} or another --name"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "args.yaml", yaml.safe_dump(recipe(config), sort_keys=False).encode())
    except OSError as error:
        raise ConfigError(f"--output: expected a folder to write to, got: {error}; try another --output") from error
    return folder


def train(run: Run) -> None:
    """Train the epochs that are left. Files follow every epoch; the curves are drawn at the end, however it comes."""
    loggers = Loggers(run.folder, run.config, run.console, run.state.update) if run.world.main else None
    if run.world.main and run.state.history:  # an earlier session may have been killed between a checkpoint and its row
        _keep_going(run, lambda: metrics.write_log(run.folder / "log.csv", run.state.history))
    try:
        while run.state.update < run.epochs * run.updates:
            train_epoch(run, loggers)
    finally:
        if run.world.main and run.state.history:
            _keep_going(run, lambda: metrics.draw_curves(run.folder / "curves.png", run.state.history, run.folder.name))
        if loggers:
            loggers.close()


def train_epoch(run: Run, loggers: Loggers | None) -> None:
    """Train to the end of the epoch, evaluate, and leave a row, a checkpoint and the best weights."""
    state, config, world, engine = run.state, run.config, run.world, run.engine
    epoch, done = divmod(state.update, run.updates)
    speed = Speed()
    batches = engine.loaders.begin(epoch, done)
    with EpochBar(run.console, epoch + 1, run.epochs, run.updates, done, enabled=world.main) as bar:
        for update in range(done + 1, run.updates + 1):
            taken = engine.update(batches, speed)
            rates = {"images_per_s": speed.images_per_s, "data_wait": speed.data_wait}
            memory = metrics.memory_gb(world.device)
            bar.step(Status(state.meter.loss, taken.lr, taken.grad_norm, *rates.values(), memory))
            if loggers and state.update % LOG_EVERY == 0:
                loggers.update(
                    state.update, {"train_loss": taken.loss, "lr": taken.lr, "grad_norm": taken.grad_norm, **rates}
                )
            due = config.checkpoint_every and state.update % config.checkpoint_every == 0
            if update < run.updates and (taken.stop or due):  # after the last update the epoch saves
                _name_bad_images(run)
                save(run)
                _stop_if_asked(run, taken)
    row = {
        "epoch": epoch + 1,
        "update": state.update,
        "train_loss": state.meter.loss,
        **_evaluate(run),
        "lr": taken.lr,
        "grad_norm": taken.grad_norm,
        **_speeds(run, speed, memory),
        "skipped": state.skipped,
        "bad_images": _name_bad_images(run),
    }
    row["seconds"] = round(speed.seconds, 2)
    state.history.append(row)
    state.meter = Meter()
    save(run)
    if world.main:
        _keep_going(run, lambda: metrics.write_log(run.folder / "log.csv", state.history))
        say(run.console, metrics.epoch_line(row, run.epochs))
        loggers.epoch(row, state.update)
    _stop_if_asked(run, taken)


def _stop_if_asked(run: Run, taken: Taken) -> None:
    if taken.stop and run.state.update < run.epochs * run.updates:
        raise Interrupted(f"stopped after update {run.state.update}; --resume {run.folder} goes on from there")


def _evaluate(run: Run) -> dict[str, float | None]:
    """Evaluate the model and its average, and export whichever is better than before."""
    row = {}
    for prefix, name in (("", "model"), ("ema_", "model_ema")):
        ema = name == "model_ema"
        if ema and not run.state.task.has_ema():
            row |= {"ema_loss": None, "ema_top1": None, "ema_top5": None}
            continue
        test = run.engine.evaluate(ema)
        row |= {f"{prefix or 'eval_'}loss": test["loss"]}
        row |= {f"{prefix}{key}": round(test[key], 4) for key in ("top1", "top5")}
        if test["top1"] > run.state.best.get(name, -1.0):
            run.state.best[name] = test["top1"]
            weights = export_state(run.state.task, run.world, ema)
            if run.world.main:
                _keep_going(run, lambda: export(run.folder / f"{name}.safetensors", weights))  # noqa: B023
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
    state.bad_train = _merge_bad(run, loaders.train.dataset, state.bad_train)
    state.bad_eval = _merge_bad(run, loaders.eval.dataset, state.bad_eval)
    return len(state.bad_train) + len(state.bad_eval)


def _merge_bad(run: Run, images: Images, known: list[int]) -> list[int]:
    bad = run.world.merge(images.bad).nonzero().flatten().tolist()
    for index in sorted(set(bad) - set(known)) if run.world.main else ():
        say(run.console, f"unreadable image: {images.source.describe(index)}")
    return bad


def save(run: Run) -> None:
    """Write a checkpoint; a run that cannot goes on, says so, and keeps the one before."""
    try:
        checkpoint.save(run.folder, run.state, run.config, run.world)
    except CheckpointError as error:
        say(run.console, f"warning: {error}; training goes on")
        if run.state.update == run.epochs * run.updates:
            raise


def _keep_going(run: Run, write: Callable[[], None]) -> None:
    """Write something that a run can do without; a full disk must not end it."""
    try:
        write()
    except OSError as error:
        say(run.console, f"warning: not written: {error}; training goes on")


def report(run: Run, seconds: float) -> None:
    """Say how good the model is, how long it took, and where the files are."""
    state = run.state
    best = max(state.history, key=lambda row: row["top1"])
    average = f", EMA {state.history[-1]['ema_top1']:.2f} %" if state.task.has_ema() else ""
    say(
        run.console,
        f"test accuracy {state.history[-1]['top1']:.2f} % (best {best['top1']:.2f} % at epoch {best['epoch']}{average})"
        f" in {seconds:.0f} s",
    )
    say(run.console, f"output: {run.folder}")
