"""The files of a run beside its checkpoints: who may write them, what is owed after a failure, what is missing."""

import contextlib
import itertools
import os
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from visattn.train import checkpoint, metrics
from visattn.train.arguments import run_folder
from visattn.train.config import Config, recipe
from visattn.train.errors import CheckpointError, ConfigError, OutputError, printable
from visattn.train.files import write_atomic
from visattn.train.lock import FolderLock
from visattn.train.metrics import say
from visattn.train.model import export_state
from visattn.train.weights import check_hash, export, snapshot

if TYPE_CHECKING:
    from visattn.train.run import Run

PROMISED = (
    *("args.yaml", "config.json", "log.csv", "curves.png"),
    *("confusion.csv", "confusion.png", "classes.csv", "worst.png"),
)
BEST = {"model": "top1", "model_ema": "ema_top1"}  # exported weights: the best by this column of log.csv


def open_folder(config: Config, data_name: str, lock: FolderLock, console: Console) -> Path:
    """Lock the folder of the run to resume, or of a new run, which gets its args.yaml; remove what a kill has left.

    Raises:
        ConfigError: it cannot be written to, or a new run would reuse one that has begun.
        OutputError: another process writes to it.
    """
    resumed = run_folder(config.resume) if config.resume else None
    try:
        folder = resumed or name_folder(config, data_name)
        if not lock.take(folder):
            say(console, f"warning: {folder} is on a file system without locks: no other host may write there")
        begun = os.path.lexists(folder / "args.yaml")
        if not begun:
            _write_args(folder / "args.yaml", recipe(config))
    except (OSError, ValueError) as error:  # the latter for names that no file can have
        flag, hint = ("--resume", "a copy of the run elsewhere") if resumed else ("--output", "another --output")
        raise ConfigError(f"{flag}: expected a folder to write to, got: {error}; try {hint}") from error
    if begun and not resumed:
        raise ConfigError(
            f"expected a new run folder, got {folder}, which exists; try --resume {folder} or another --name"
        )
    checkpoint.sweep(folder)
    return folder


def name_folder(config: Config, data_name: str) -> Path:
    """The folder of a new run. Without a name of its own it is made here, and no other process gets the same."""
    if config.name:
        return config.output / config.name
    name = printable(f"{config.model}-{data_name}-{datetime.now():%Y%m%d-%H%M%S}")
    folder, numbers = config.output / name, itertools.count(2)
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            folder = folder.with_name(f"{name}-{next(numbers)}")


def _write_args(path: Path, options: dict[str, Any]) -> None:
    write_atomic(path, yaml.safe_dump(options, sort_keys=False).encode())


def keep_options(folder: Path, options: dict[str, Any]) -> None:
    """Let later resumes go on with other options.

    Raises:
        ConfigError: args.yaml cannot be written.
    """
    try:
        _write_args(folder / "args.yaml", options)
    except OSError as error:
        raise ConfigError(f"--override: expected to write args.yaml, got: {error}; try to make room") from error


def keep(run: "Run", name: str, write: Callable[[Path], Any]) -> None:
    """Write a file of the folder, in the main process. A failure ends nothing, is said once, leaves the file owed."""
    try:
        write(run.folder / name)
        run.owed.pop(name, None)
        run.said.pop(name, None)
    except OSError as error:
        run.owed[name] = write
        if run.said.get(name) != str(error):
            say(run.console, f"warning: not written: {error}; training goes on, and it is tried again")
        run.said[name] = str(error)


def keep_history(run: "Run") -> None:
    """Write log.csv, in the main process."""
    keep(run, "log.csv", partial(metrics.write_log, history=run.state.history))


def settle(run: "Run") -> None:
    """Write what is owed, and what has been deleted as far as it is known; all processes together.

    From then on `state.best` says in all processes what is in the files.

    Raises:
        OutputError: the folder has been deleted, and another process has taken its place.
    """
    owed, run.state.best = run.world.on_main(lambda: _settle(run))
    for name in [name for name in run.waiting if f"{name}.safetensors" not in owed]:
        run.state.best[name] = run.waiting.pop(name)


def _settle(run: "Run") -> tuple[list[str], dict[str, float]]:
    with contextlib.suppress(OSError):  # said when a file is written
        run.lock.take(run.folder)
    if not os.path.isfile(run.folder / "args.yaml"):
        say(run.console, f"warning: files in {run.folder} have been deleted; those that still can be are written anew")
        run.owed["args.yaml"] = partial(_write_args, options=recipe(run.config))
    if not os.path.isfile(run.folder / "config.json"):
        run.owed["config.json"] = partial(write_atomic, content=run.model_config)
    best = {name: top1 for name, top1 in run.state.best.items() if os.path.isfile(run.folder / f"{name}.safetensors")}
    for name, write in list(run.owed.items()):
        keep(run, name, write)
    return list(run.owed), best


def export_best(run: "Run") -> None:
    """Export the weights that were evaluated last where they are better than those in the file; all processes together.

    What cannot be written is kept in memory, and tried again until something better comes.
    """
    row = run.state.history[-1]
    for name, column in BEST.items():
        known = max(run.state.best.get(name, -1.0), run.waiting.get(name, -1.0))
        if row["update"] == run.state.update and row[column] is not None and row[column] > round(known, 4):
            weights = export_state(run.state.task, run.world, ema=name == "model_ema")
            run.waiting[name] = row[column]
            if run.world.main:
                run.owed[f"{name}.safetensors"] = partial(export, weights=snapshot(weights))
    settle(run)


def catch_up(run: "Run") -> None:
    """Make log, exported weights and `state.best` agree, as far as the state allows; all processes together."""
    settle(run)
    if run.world.main:
        for name in list(run.state.best):
            try:
                check_hash(run.folder / f"{name}.safetensors")
            except (CheckpointError, OSError) as error:
                say(run.console, f"warning: {error}")
                del run.state.best[name]
        keep_history(run)
        checkpoint.sweep(run.folder)
    settle(run)
    export_best(run)


def check_complete(run: "Run") -> None:
    """Raise OutputError if a file that a finished run promises is missing or older."""
    problems = [f"no {name}" for name in PROMISED if name in run.owed or not os.path.isfile(run.folder / name)]
    for name, column in BEST.items():
        best = max((row[column] for row in run.state.history if row[column] is not None), default=-1.0)
        held = run.state.best.get(name, -1.0)
        if round(held, 4) < best:
            instead = "" if held < 0 else f" but one of {held:.2f} %"
            problems.append(f"no {name}.safetensors of {best:.2f} % top-1{instead}")
    if problems:
        raise OutputError(
            f"expected all files of a finished run in {run.folder}, got {', '.join(problems)}; "
            f"try to make room there, and --resume {run.folder}"
        )
