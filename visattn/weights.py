"""Weights from files: plain tensors only, whatever a file pretends to be."""

import sys
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import nn


class WeightsError(ValueError):
    """A file of weights that is missing, damaged, unsafe, or of another model."""


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a .safetensors file, or in a .pth file that holds nothing but tensors and plain values.

    Raises:
        WeightsError: no such file, damaged, unsafe (anything that would have to run code), or no state dict.
    """
    if not path.is_file():
        raise WeightsError(f"expected weights at {path}, got no file; try output/RUN/model.safetensors")
    try:
        weights = timm.models.load_state_dict(str(path), weights_only=True)
        bad = [key for key, value in weights.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]
    except Exception as error:  # torch and safetensors raise a dozen kinds for damaged or unsafe files
        raise WeightsError(
            f"expected plain tensors at {path}, got a damaged or unsafe file ({first_line(error)}); "
            "try a .safetensors file"
        ) from error
    if bad or not weights:
        raise WeightsError(f"expected a state dict at {path}, got {bad[:3] or 'nothing'}; try a file of weights")
    return weights


def convert_weights(weights: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Bring official keys to the model's own by the `checkpoint_filter_fn` of its family, if that has one.

    Raises:
        WeightsError: tensors that the family's rules do not fit.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return dict(weights)
    try:
        return convert(weights, model)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"expected weights of this model, got others ({type(error).__name__}: {first_line(error)}); try others"
        ) from error


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
