"""TensorBoard and Weights & Biases. What they show is a copy: a run never ends because one of them fails."""

import importlib.util
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console

from visattn.train.config import Config, recipe
from visattn.train.errors import ConfigError
from visattn.train.files import write_atomic
from visattn.train.metrics import say

WANDB_SECONDS = 120  # longest wait at the end of a run for a server that does not answer
DROPPED = "training goes on without it"

Result = TypeVar("Result")


def check_packages(config: Config) -> None:
    """Raise ConfigError if a logger is asked for that is not installed."""
    for package, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb != "off")):
        # A folder of that name, such as the one wandb itself leaves behind, is found too, but has no origin.
        if wanted and getattr(importlib.util.find_spec(package), "origin", None) is None:
            raise ConfigError(
                f'--{package}: expected the package {package}, got none; try pip install -e ".[log]", or without it'
            )


class Loggers:
    """The loggers that the config asks for; one that fails is named in a warning and left out from then on.

    Only one process of a run may have them. `start_update` is the update after which the run continues: what an
    earlier session logged beyond it will be logged anew.
    """

    def __init__(self, folder: Path, config: Config, console: Console, start_update: int = 0) -> None:
        check_packages(config)
        self._folder, self._console = folder, console
        self._loggers: dict[str, TensorBoard | Wandb] = {}
        if config.tensorboard:
            self._add("tensorboard", TensorBoard, folder / "tensorboard", start_update)
        if config.wandb == "online":
            sync = f"it goes on offline, try `wandb sync {folder}/wandb/offline-run-*` later"
            self._add("wandb", Wandb, folder, config, console, "online", otherwise=sync)
        if config.wandb != "off" and "wandb" not in self._loggers:
            self._add("wandb", Wandb, folder, config, console, "offline")

    def update(self, update: int, values: dict[str, float]) -> None:
        """Log how an update went."""
        self._log({f"update/{key}": value for key, value in values.items()}, update)

    def epoch(self, row: dict[str, Any], update: int) -> None:
        """Log a row of log.csv."""
        values = {key: value for key, value in row.items() if key not in ("epoch", "update") and value is not None}
        self._log({f"epoch/{key}": value for key, value in values.items()}, update)

    def close(self) -> None:
        """Write and send what is left."""
        for name, logger in list(self._loggers.items()):
            self._try(name, logger.close, otherwise=f"what did not get there is in {self._folder / name}")
        self._loggers.clear()

    def _add(self, name: str, make: Callable[..., "TensorBoard | Wandb"], *args: Any, otherwise: str = DROPPED) -> None:
        if logger := self._try(name, make, *args, otherwise=otherwise):
            self._loggers[name] = logger

    def _log(self, values: dict[str, float], update: int) -> None:
        for name, logger in list(self._loggers.items()):
            self._try(name, logger.log, values, update)

    def _try(self, name: str, action: Callable[..., Result], *args: Any, otherwise: str = DROPPED) -> Result | None:
        try:
            return action(*args)
        except Exception as error:  # full disks, dead servers and services, missing logins: each package has its own
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            say(self._console, f"warning: {name}: {reason}; {otherwise}")
            self._loggers.pop(name, None)
            return None


class TensorBoard:
    """Event files in a folder; what they hold beyond `start_update` is hidden."""

    def __init__(self, folder: Path, start_update: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_update + 1)

    def log(self, values: dict[str, float], update: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, update)
        self._writer.flush()  # a killed run has its points, and a full disk shows

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run in FOLDER/wandb; every session of a training run continues the same one."""

    def __init__(self, folder: Path, config: Config, console: Console, mode: Literal["online", "offline"]) -> None:
        import wandb

        id_file = folder / "wandb_id.txt"
        if not id_file.exists():
            write_atomic(id_file, secrets.token_hex(4).encode())
        # Silent: it must not ask for a login in the middle of a job, nor print between the lines of the progress bar.
        settings = wandb.Settings(silent=True, console="off", finish_timeout=WANDB_SECONDS, finish_timeout_raises=True)
        try:
            wandb.setup(settings)
            self._run = wandb.init(
                project=config.wandb_project,
                name=folder.name,
                id=id_file.read_text().strip(),
                resume="allow",
                dir=folder,
                mode=mode,
                config=recipe(config),
                settings=settings,
            )
        except Exception:
            wandb.teardown()  # its service would hold the id
            raise
        if mode == "online":
            say(console, f"wandb: {self._run.url}")

    def log(self, values: dict[str, float], update: int) -> None:
        self._run.log(values, step=update)

    def close(self) -> None:
        self._run.finish()
