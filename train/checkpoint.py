"""Files that survive a kill: whole or not there. Nothing is ever unpickled.

output/<run>/
    last.pt             everything to continue after the last complete epoch
    model.safetensors   weights of the epoch with the best top-1; timm.create_model(..., checkpoint_path=...) reads it
"""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import safetensors.torch
import torch

from train.config import Config, recipe
from train.errors import CheckpointError

if TYPE_CHECKING:
    from train.engine import TrainState

# A resumed run may move to another machine; everything else is what it is.
FREE_ON_RESUME = ("device", "workers")
PARTS = {"recipe", "model", "optimizer", "scheduler", "scaler", "progress", "random"}


def write_atomic(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a temporary file, flush it to the disk, rename it over `path`, flush the folder."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(path: Path, state: "TrainState", config: Config) -> None:
    """Save a run after a complete epoch."""
    progress = ("epoch", "updates", "best_top1", "best_epoch", "history")
    parts = {
        "recipe": recipe(config),
        "model": state.task.get_checkpoint_state()["state_dict"],
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "scaler": state.scaler.state_dict(),
        "progress": {name: getattr(state, name) for name in progress},
        "random": _random_states(),
    }
    write_atomic(path, lambda file: torch.save(parts, file))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running any code that it may hold."""
    if not path.is_file():
        raise CheckpointError(f"expected a checkpoint at {path}, got no file; try --resume output/RUN")
    try:
        parts = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises eight kinds of exception for damaged or unsafe files
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"expected a checkpoint of plain tensors at {path}, got a damaged or unsafe file ({reason}); "
            "try a last.pt that this trainer wrote"
        ) from error
    if not isinstance(parts, dict) or set(parts) != PARTS:
        raise CheckpointError(f"expected a training checkpoint at {path}, got other contents; try --resume output/RUN")
    return parts


def restore(parts: dict[str, Any], state: "TrainState", config: Config) -> None:
    """Put a loaded checkpoint back; the random generators come last, so that building the run cannot move them."""
    now, then = recipe(config), parts["recipe"]
    changed = [key for key in now if key not in FREE_ON_RESUME and now[key] != then.get(key)]
    if changed:
        got = ", ".join(f"--{key.replace('_', '-')} {now[key]} (was {then.get(key)})" for key in changed)
        raise CheckpointError(
            f"expected the options of the run that --resume continues, got {got}; "
            "try --resume without them, or a new run without --resume"
        )
    state.task.load_checkpoint_state(parts["model"])
    state.optimizer.load_state_dict(parts["optimizer"])
    state.scheduler.load_state_dict(parts["scheduler"])
    state.scaler.load_state_dict(parts["scaler"])
    for name, value in parts["progress"].items():
        setattr(state, name, value)
    _set_random_states(parts["random"])


def save_weights(path: Path, state: "TrainState") -> None:
    """Export the model's weights as safetensors."""
    weights = state.task.get_checkpoint_state()["state_dict"]
    # Copies, because safetensors refuses strided views and tensors that share memory.
    weights = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in weights.items()}
    write_atomic(path, safetensors.torch.save(weights, metadata={"format": "pt"}))


def _random_states() -> dict[str, Any]:
    """Generator states in types that weights_only loading accepts; numpy's own array is not one of them."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  the generator that timm's mixup draws from
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
