"""What calls of attention ops must satisfy, with the messages for those that do not."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_tensors(**tensors: Any) -> None:
    """Every argument is a tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"expected {name} to be a tensor, got {type(x).__name__}")


def spatial_axes(q: Any) -> int:
    """The number of spatial axes of q [B, *spatial, N, D]."""
    check_tensors(q=q)
    axes = q.ndim - 3
    if axes not in (1, 2, 3):
        raise ValueError(
            f"expected q of shape [B, *spatial, N, D] with 1 to 3 spatial axes, got {tuple(q.shape)}"
        )
    return axes


def _as(kind: type, value: Any) -> Any:
    """The int or bool that `value` is; NumPy's are welcome, floats and, as ints, bools are not."""
    if kind is bool:
        return (
            bool(value)
            if isinstance(value, (bool, torch.SymBool)) or type(value).__name__ == "bool_"
            else None
        )
    if isinstance(value, torch.SymInt):
        return value
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def per_axis(name: str, value: Any, kind: type, axes: int) -> list[Any]:
    """A value, or one value per axis, as a list of one per axis."""
    is_sequence = isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1
    values = [
        _as(kind, x)
        for x in (value if is_sequence and not isinstance(value, str) else [value] * axes)
    ]
    if len(values) != axes or any(x is None for x in values):
        raise ValueError(
            f"expected {name} of one {kind.__name__} or {axes} (one per spatial axis), got {reprlib.repr(value):.80}"
        )
    return values


def one_int(name: str, value: Any) -> int:
    """A value that is an int, NumPy's too."""
    found = _as(int, value)
    if found is None:
        raise ValueError(f"expected {name} of one int, got {reprlib.repr(value):.80}")
    return found


def check_dtypes(*tensors: Tensor | None) -> None:
    """One floating dtype for all."""
    dtypes = [t.dtype for t in tensors if t is not None]
    if not dtypes[0].is_floating_point or any(d != dtypes[0] for d in dtypes):
        raise TypeError(f"expected q, k, v (and extra keys) of one floating dtype, got {dtypes}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q and k [B, *spatial, N, D], v [B, *spatial, N, Dv], of one dtype."""
    check_tensors(q=q, k=k, v=v)
    if k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"expected k like q and v [B, *spatial, N, Dv], got q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"v {tuple(v.shape)}"
        )
    check_dtypes(q, k, v)


def check_floating(**tensors: Tensor | None) -> None:
    """Real floating point where there is a tensor at all."""
    for name, x in tensors.items():
        if x is None:
            continue
        check_tensors(**{name: x})
        if not x.is_floating_point():
            raise TypeError(f"expected {name} of a floating dtype, got {x.dtype}")


def check_table(q: Tensor, bias: Tensor | None, window: Sequence[int]) -> None:
    """A relative position table [N, 2 * window - 1 per axis]."""
    check_floating(bias=bias)
    if bias is not None and tuple(bias.shape) != (
        table := (q.shape[-2], *(2 * w - 1 for w in window))
    ):
        raise ValueError(
            f"expected bias {table} ([N, 2 * window - 1 per axis]), got {tuple(bias.shape)}"
        )


def default_scale(dim: int, scale: float | None) -> float:
    """`scale`, or `dim` ** -0.5; `dim` is a tensor while `torch.jit.trace` runs."""
    return int(dim) ** -0.5 if scale is None else float(scale)
