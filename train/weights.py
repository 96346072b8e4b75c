"""Weights in and out: plain tensors only, whatever a file pretends to be."""

import hashlib
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import visattn.weights
from train.errors import CheckpointError
from train.files import sha256, write_atomic
from visattn.weights import WeightsError, convert_weights, load_fitting


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


def load_into(model: nn.Module, path: Path) -> list[str]:
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


def export(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a full state dict as safetensors, and its sha256 beside it."""
    # Copies, because safetensors refuses strided views and tensors that share memory.
    weights = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in weights.items()}
    content = safetensors.torch.save(weights, metadata={"format": "pt"})
    write_atomic(path, content)
    line = f"{hashlib.sha256(content).hexdigest()}  {path.name}\n"
    write_atomic(path.with_name(f"{path.name}.sha256"), line.encode())


def check_hash(path: Path) -> None:
    """Compare a file with the sha256 beside it, if there is one."""
    beside = path.with_name(f"{path.name}.sha256")
    if beside.is_file():
        expected = beside.read_text(errors="replace").split()
        if sha256(path) not in expected[:1]:
            raise CheckpointError(
                f"expected {path} with the sha256 in {beside.name}, got other content: it is damaged; try another copy"
            )
