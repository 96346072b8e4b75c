"""What calls of attention ops must satisfy, with the messages for those that do not."""

import operator
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_tensors(**tensors: Any) -> None:
    """Check that every argument is a tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"expected {name} to be a tensor, got {type(x).__name__}")


def check_floating(**tensors: Tensor | None) -> None:
    """Check for real floating point where there is a tensor at all."""
    for name, x in tensors.items():
        if x is not None:
            check_tensors(**{name: x})
            if not x.is_floating_point():
                raise TypeError(f"expected {name} of a floating dtype, got {x.dtype}")


def check_dtypes(*tensors: Tensor | None) -> None:
    """Check for one floating dtype of all."""
    dtypes = [t.dtype for t in tensors if t is not None]
    if not dtypes[0].is_floating_point or dtypes.count(dtypes[0]) != len(dtypes):
        raise TypeError(f"expected q, k, v (and extra keys) of one floating dtype, got {dtypes}")


def shapes(**tensors: Tensor) -> str:
    """Write names and shapes for a message."""
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())


def check_shape(name: str, x: Tensor | None, shape: Sequence[Any], meaning: str = "") -> None:
    """Check for this shape where there is a tensor at all; the message says what it means, too."""
    if x is not None and tuple(x.shape) != tuple(shape):
        expected = f"{name} {tuple(shape)} {meaning}".rstrip()
        raise ValueError(f"expected {expected}, got {tuple(x.shape)}")


def check_mask(name: str, mask: Tensor | None, shape: Sequence[Any]) -> None:
    """Check for a boolean mask of this shape where there is one at all."""
    if mask is not None:
        check_tensors(**{name: mask})
        if mask.dtype != torch.bool or tuple(mask.shape) != tuple(shape):
            got = f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(f"expected a boolean {name} {tuple(shape)}, got {got}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check for q and k [B, *spatial, N, D] and v [B, *spatial, N, Dv] of one dtype."""
    check_tensors(q=q, k=k, v=v)
    shape = q.shape
    if k.shape != shape or (v.shape != shape and v.shape[:-1] != shape[:-1]):
        got = shapes(q=q, k=k, v=v)
        raise ValueError(f"expected k like q and v [B, *spatial, N, Dv], got {got}")
    check_dtypes(q, k, v)


def check_table(q: Tensor, bias: Tensor | None, window: Sequence[int]) -> None:
    """Check for a relative position table [N, 2 * window - 1 per axis]."""
    if bias is None:
        return
    check_floating(bias=bias)
    shape = (q.shape[-2], *(2 * w - 1 for w in window))
    check_shape("bias", bias, shape, "([N, 2 * window - 1 per axis])")


def spatial_axes(q: Any) -> int:
    """Count the spatial axes of q [B, *spatial, N, D]."""
    check_tensors(q=q)
    axes = q.ndim - 3
    if axes not in (1, 2, 3):
        expected = "q of shape [B, *spatial, N, D] with 1 to 3 spatial axes"
        raise ValueError(f"expected {expected}, got {tuple(q.shape)}")
    return axes


def _as(kind: type, value: Any) -> Any:
    """Find the int or bool that `value` is; NumPy's are welcome, floats and, as ints, bools are not."""
    if kind is bool:
        is_bool = isinstance(value, (bool, torch.SymBool)) or type(value).__name__ == "bool_"
        return bool(value) if is_bool else None
    if isinstance(value, torch.SymInt):
        return value
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def per_axis(name: str, value: Any, kind: type, axes: int) -> list[Any]:
    """List a value, or one value per axis, once for each axis."""
    if type(value) is kind:  # what most calls give
        return [value] * axes
    is_sequence = isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1
    given = value if is_sequence and not isinstance(value, str) else [value] * axes
    values = [_as(kind, x) for x in given]
    if len(values) != axes or any(x is None for x in values):
        expected = f"{name} of one {kind.__name__} or {axes} (one per spatial axis)"
        raise ValueError(f"expected {expected}, got {reprlib.repr(value):.80}")
    return values


def one_int(name: str, value: Any) -> int:
    """Take a value that is an int, NumPy's too."""
    found = _as(int, value)
    if found is None:
        raise ValueError(f"expected {name} of one int, got {reprlib.repr(value):.80}")
    return found


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check that a value is one of some words."""
    if value not in choices:
        *others, last = map(repr, choices)
        got = f"{reprlib.repr(value):.80}"
        raise ValueError(f"expected {name} {', '.join(others)} or {last}, got {got}")


def default_scale(dim: int, scale: float | None) -> float:
    """Take `scale`, or `dim` ** -0.5; `dim` is a tensor while `torch.jit.trace` runs."""
    return int(dim) ** -0.5 if scale is None else float(scale)
