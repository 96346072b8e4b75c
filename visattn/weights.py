"""Weights from files: plain tensors only, whatever a file pretends to be, and nothing loaded before everything fits."""

import re
import sys
import warnings
import zipfile
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

# Within a kind one tensor may be copied into another.
_KINDS = (
    {torch.float16, torch.bfloat16, torch.float32, torch.float64},
    {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64},
)


class WeightsError(ValueError, RuntimeError):
    """A file of weights that is missing, damaged, unsafe, or of another model. torch's own errors are RuntimeErrors."""


def load_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file, or in a .pth file that holds nothing but tensors and plain values.

    Raises:
        WeightsError: no such file, damaged, unsafe (anything that would have to run code), or no state dict.
    """
    check_file(path, "weights", "output/RUN/model.safetensors")
    try:
        weights = timm.models.load_state_dict(str(path), weights_only=True)
    except (AttributeError, TypeError) as error:  # what timm makes of a list, a number, or keys of another type
        raise WeightsError(f"expected a state dict at {path}, got others ({first_line(error)}); try weights") from error
    except Exception as error:  # torch and safetensors raise a dozen kinds for damaged or unsafe files
        raise WeightsError(
            f"expected plain tensors at {path}, got a damaged or unsafe file ({first_line(error)}); "
            "try a .safetensors file"
        ) from error
    return check_state_dict(weights, str(path))


def check_file(path: Path, what: str, other: str) -> None:
    """Refuse what is no regular file, and a zip archive, as `torch.save` writes them, that is not as it was written.

    torch compares no checksums. Files of a format without any are left to their readers.

    Raises:
        WeightsError: no such file, or a damaged one.
    """
    try:
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "a pipe or device" if path.exists() else "no file"
            raise WeightsError(f"expected {what} at {path}, got {kind}; try {other}")
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len({entry.filename for entry in entries}) < len(entries):
                raise zipfile.BadZipFile("names that occur twice")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise zipfile.BadZipFile("compressed entries, which torch never writes")
            # torch.serialization.set_crc32_options(False) leaves the checksums out
            damaged = archive.testzip() if any(entry.CRC for entry in entries) else None
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} does not fit its checksum")
    except WeightsError:
        raise
    except Exception as error:  # zipfile too raises a dozen kinds
        raise WeightsError(
            f"expected {what} at {path}, got a damaged or unsafe file ({first_line(error)}); try another copy"
        ) from error


def check_state_dict(weights: Any, where: str) -> dict[str, Tensor]:
    """`weights`, if they are tensors by name.

    Raises:
        WeightsError: Something else, or nothing.
    """
    if not isinstance(weights, Mapping):
        got = type(weights).__name__
    elif not weights:
        got = "nothing"
    else:
        bad = [k for k, v in weights.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
        got = f"{str(bad[0])[:100]!r}: {type(weights[bad[0]]).__name__}" if bad else ""
    if got:
        raise WeightsError(f"expected a state dict, tensors by name, at {where}, got {got}; try a file of weights")
    return weights


def convert_weights(weights: Mapping[str, Tensor], model: nn.Module, source: str = "others") -> dict[str, Tensor]:
    """Bring official keys to the model's own by the `checkpoint_filter_fn` of its family, if that has one.

    An error calls the weights `source`.

    Raises:
        WeightsError: tensors that the family's rules do not fit.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return dict(weights)
    try:
        return convert(weights, model)
    except WeightsError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"expected weights of this model, got {source} ({type(error).__name__}: {first_line(error)}); try others"
        ) from error


def rename_earlier(key: str, own: Container[str]) -> str:
    """Name what files of earlier versions call otherwise: stems of several layers, `proj` as if they were one.

    Only names in `own` are given.
    """
    now = re.sub(r"\bpatch_embed\.proj\.(?=\d)", "patch_embed.conv.", key)
    return now if now in own else key


def load_fitting(
    model: nn.Module, weights: Mapping[str, Any], expected: str, got: str, new: tuple[str, ...] = ()
) -> None:
    """Copy `weights` into `model` if all of them fit; arguments and errors are those of `check_fit`."""
    check_fit(model, weights, expected, got, new)
    nn.Module.load_state_dict(model, weights, strict=False)  # a method of the model's own would check again


def check_fit(
    model: nn.Module,
    weights: Mapping[str, Any],
    expected: str,
    got: str,
    new: tuple[str, ...] = (),
    strict: bool = True,
) -> None:
    """Compare weights with the state dict of a model; every loader does before it changes the first tensor.

    Values that are NaN or infinite are told by a warning.

    Args:
        model: Whose the weights shall be.
        weights: Tensors by name.
        expected: What to call the weights in an error.
        got: Where they come from.
        new: Beginnings of keys that may be missing.
        strict: Refuse keys that are missing and unknown ones.

    Raises:
        WeightsError: Other keys, or a tensor of another shape or of another kind, such as integers for a parameter.
    """
    own = model.state_dict()
    metadata, unfit, odd = getattr(weights, "_metadata", None) or {}, [], []
    weights = {rename_earlier(key, own): value for key, value in weights.items()}
    for key, target in own.items():
        if key not in weights or not isinstance(target, Tensor):
            continue
        value = weights[key]
        if not _is_same_kind(value, target):
            unfit.append(f"{key} of {_describe(value)} in place of {_describe(target)}")
        elif value.shape != target.shape and not (target.ndim == 0 and value.shape == (1,)):  # torch takes that too
            unfit.append(f"a size mismatch at {key}, {[*value.shape]} in place of {[*target.shape]}")
        elif number := _count_odd(value):
            odd.append(f"{key} ({number} of {value.numel()} values)")
    if unfit:
        more = f" and {len(unfit) - 1} more" if len(unfit) > 1 else ""
        raise WeightsError(f"expected {expected}, got {got}, with {unfit[0]}{more}; try others")

    def is_filled_in(key: str) -> bool:
        """torch makes the counter of a batch norm's batches where old or plain state dicts have none."""
        module, _, name = key.rpartition(".")
        return name == "num_batches_tracked" and (metadata.get(module, {}).get("version") or 0) < 2

    missing = [key for key in own if key not in weights and not key.startswith(new) and not is_filled_in(key)]
    unknown = [key for key in weights if key not in own]
    if strict and (missing or unknown):
        raise WeightsError(
            f"expected {expected}, got {got}, which lacks {missing[:3]} and adds {unknown[:3]}; "
            "try another model, or its options"
        )
    if odd:
        text = f"expected finite weights, got NaN or infinity in {got}: tensors {len(odd)}, the first {odd[0]}"
        warnings.warn(text, stacklevel=3)


def _is_same_kind(value: Any, target: Tensor) -> bool:
    """`target` can become a copy of it, and means the same then."""
    if not isinstance(value, Tensor) or value.layout != target.layout or value.is_nested != target.is_nested:
        return False
    if value.is_meta and not target.is_meta:
        return False
    if target.ndim == 0 and target.dtype == torch.int64 and value.is_floating_point():
        return True  # a counter of batches, in checkpoints that are averages of others
    return value.dtype == target.dtype or any({value.dtype, target.dtype} <= kind for kind in _KINDS)


def _count_odd(value: Tensor) -> int:
    """How many values are NaN or infinite, of those that are here: neither on the meta device nor with other ranks."""
    if value.is_meta or type(value) not in (Tensor, nn.Parameter) or value.dtype not in _KINDS[0]:
        return 0
    return value.numel() - int(value.isfinite().sum())


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    notes = [str(value.dtype)]
    notes += [str(value.layout)] if value.layout != torch.strided else []
    notes += ["nested"] if value.is_nested else []
    notes += ["without data"] if value.is_meta else []
    return " ".join(notes).replace("torch.", "")


class ChecksWeights(nn.Module):
    """A module whose `load_state_dict` changes nothing unless everything fits, whoever calls it."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As for any module.

        Raises:
            WeightsError: A tensor of another shape or kind; with `strict`, other keys than the module's.
        """
        if isinstance(state_dict, Mapping):
            check_fit(self, state_dict, f"weights of {type(self).__name__}", "others", strict=strict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    # pyrefly: ignore[bad-override]: torch and mmengine give all by position
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *how: Any) -> None:
        """Rename, in place, keys of earlier versions; a detector's `load_state_dict` calls this for its backbone."""
        own = {f"{prefix}{key}" for key in self.state_dict()}
        for key in [key for key in state_dict if rename_earlier(key, own) != key]:
            state_dict[rename_earlier(key, own)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *how)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
