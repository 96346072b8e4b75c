"""Weights in and out: plain tensors only, whatever a file pretends to be."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import visattn.weights
from visattn.train.errors import CheckpointError
from visattn.train.files import hash_file, sha256, write_hashed
from visattn.weights import WeightsError, convert_weights, load_fitting


class TimmModel(nn.Module):
    """What timm.create_model makes, for type checkers."""

    num_classes: int
    pretrained_cfg: dict[str, Any]


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """`visattn.weights.load_weights`, after a look at the sha256 in `path`.sha256 where there is such a file.

    Raises:
        CheckpointError: no such file, damaged, unsafe (anything that would have to run code), or no state dict.
    """
    if path.is_file():
        check_hash(path)
    try:
        return visattn.weights.load_weights(path)
    except WeightsError as error:
        raise CheckpointError(str(error)) from error


def load_into(model: TimmModel, path: Path) -> list[str]:
    """Load weights (official layouts too) into a timm model; a head of another size is left out, and named.

    Raises:
        CheckpointError: as `load_weights`, or weights of another model, of which none has been loaded then.
    """
    try:
        weights = convert_weights(load_weights(path), model, str(path))
        own = model.state_dict()
        heads = model.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{name}." for name in ((heads,) if isinstance(heads, str) else heads))
        left_out = [k for k, v in weights.items() if k.startswith(heads) and k in own and own[k].shape != v.shape]
        weights = {k: v for k, v in weights.items() if k not in left_out}
        load_fitting(model, weights, "weights of this model", str(path), tuple(left_out))
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    return left_out


def snapshot(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU, which training leaves alone; safetensors takes no strided views nor shared memory either."""
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in weights.items()}


def export(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a `snapshot` as safetensors, and its sha256 beside it."""
    write_hashed(path, safetensors.torch.save(weights, metadata={"format": "pt"}))


def check_hash(path: Path) -> None:
    """Compare a file with the sha256 beside it, if there is one."""
    beside = hash_file(path)
    while expected := _first_word(beside):
        if sha256(path) == expected:
            return
        if _first_word(beside) == expected:  # otherwise a run has just replaced both
            raise CheckpointError(
                f"expected {path} with the sha256 in {beside.name}, got other content: it is damaged; try another copy"
            )


def _first_word(path: Path) -> str | None:
    """None without such a file."""
    try:
        return (path.read_text(errors="replace").split() or ["nothing"])[0]
    except FileNotFoundError:
        return None
