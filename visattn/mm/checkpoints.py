"""Checkpoints of mmengine that torch reads without unpickling anything."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader, Runner

from visattn.weights import WeightsError, check_file, check_state_dict, first_line

_BUFFER = "HistoryBuffer"


@HOOKS.register_module()
class PlainCheckpointHook(Hook):
    """Keeps mmengine's checkpoints plain, so that `torch.load(weights_only=True)` takes them with no class allowed.

    mmengine puts objects of its own and of numpy into a checkpoint; here they become tensors and plain values when it
    is saved, and mmengine's again when it is loaded.
    """

    priority = "LOWEST"  # after the hooks that add to the checkpoint

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Replace, in place, what is not plain."""
        for key, value in checkpoint.items():
            checkpoint[key] = _plain(value, key)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Bring back, in place, the buffers that mmengine expects."""
        scalars = checkpoint.get("message_hub", {}).get("log_scalars", {})
        for key, value in scalars.items():
            if isinstance(value, dict) and _BUFFER in value:
                history, count = (part.numpy() for part in value[_BUFFER])
                scalars[key] = HistoryBuffer(history, count, value["max_length"])


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, torch.Tensor) or value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, HistoryBuffer):
        return {_BUFFER: [torch.tensor(part) for part in value.data], "max_length": value.max_length}
    if isinstance(value, dict):
        # the order of a state dict is kept, its metadata are not: torch asks for them to read files of old versions
        return {_plain(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item, where) for item in value) if type(value) in (list, tuple) else [*value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    raise TypeError(
        f"expected plain values in a checkpoint, got {type(value).__name__} at {where}; try a list or a dict"
    )


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_file(filename: str, map_location: Any) -> dict[str, Any]:
    """mmengine's loader of local files, for `load_from` and `resume`: safe whatever the environment says.

    Raises:
        WeightsError: no such file, damaged or unsafe, or without a state dict.
    """
    path = Path(filename).expanduser()
    check_file(path, "a checkpoint", "work_dirs/RUN/epoch_1.pth")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for damaged or unsafe files
        raise WeightsError(
            f"expected a plain checkpoint at {path}, got a damaged or unsafe file ({first_line(error)}); "
            "try one that was saved with PlainCheckpointHook, or weights alone"
        ) from error
    weights = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else checkpoint
    check_state_dict(weights, str(path))
    return checkpoint
