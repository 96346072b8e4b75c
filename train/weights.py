"""Weights in and out: plain tensors only, whatever a file pretends to be."""

import hashlib
import sys
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import nn

from train.errors import CheckpointError
from train.files import sha256, write_atomic


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a .safetensors file, or in a .pth file that holds nothing but tensors and plain values.

    Raises:
        CheckpointError: no such file, damaged, unsafe (anything that would have to run code), no state dict, or its
            sha256 differs from the one in `path`.sha256 where there is such a file.
    """
    if not path.is_file():
        raise CheckpointError(f"expected weights at {path}, got no file; try output/RUN/model.safetensors")
    check_hash(path)
    try:
        weights = timm.models.load_state_dict(str(path), weights_only=True)
        bad = [key for key, value in weights.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]
    except Exception as error:  # torch and safetensors raise a dozen kinds for damaged or unsafe files
        raise CheckpointError(
            f"expected plain tensors at {path}, got a damaged or unsafe file ({first_line(error)}); "
            "try a .safetensors file"
        ) from error
    if bad or not weights:
        raise CheckpointError(f"expected a state dict at {path}, got {bad[:3] or 'nothing'}; try a file of weights")
    return weights


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def load_into(model: nn.Module, path: Path) -> list[str]:
    """Load weights (official layouts too) into a timm model; a head of another size is left out, and named."""
    weights = load_weights(path)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            weights = convert(weights, model)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"expected weights of this model, got {path} ({type(error).__name__}: {first_line(error)}); "
                "try another --model"
            ) from error
    own = model.state_dict()
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ((heads,) if isinstance(heads, str) else heads))
    left_out = [k for k, v in weights.items() if k.startswith(heads or "\0") and own.get(k, v).shape != v.shape]
    try:
        missing, unknown = model.load_state_dict({k: v for k, v in weights.items() if k not in left_out}, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"expected weights of this model, got {path}: {error}; try another --model") from error
    missing = [key for key in missing if key not in left_out]
    if missing or unknown:
        raise CheckpointError(
            f"expected weights of this model, got {path}, which lacks {missing[:3]} and adds {list(unknown)[:3]}; "
            "try another --model"
        )
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
