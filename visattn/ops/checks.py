"""What calls of attention ops must satisfy, with the messages for those that do not."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def spatial_axes(q: Tensor) -> int:
    """The number of spatial axes of q [B, *spatial, N, D]."""
    axes = q.ndim - 3
    if axes not in (1, 2, 3):
        raise ValueError(f"expected q of shape [B, *spatial, N, D] with 1 to 3 spatial axes, got {tuple(q.shape)}")
    return axes


def per_axis(name: str, value: Any, kind: type, axes: int) -> list[Any]:
    """A value, or one value per axis, as a list of one per axis."""
    values = [value] * axes if isinstance(value, kind) else list(value)
    if len(values) != axes or not all(isinstance(x, kind) for x in values):
        raise ValueError(
            f"expected {name} of one {kind.__name__} or {axes} (one per spatial axis), got {reprlib.repr(value):.80}"
        )
    return values


def check_dtypes(*tensors: Tensor | None) -> None:
    """One floating dtype for all."""
    dtypes = [t.dtype for t in tensors if t is not None]
    if not dtypes[0].is_floating_point or any(d != dtypes[0] for d in dtypes):
        raise TypeError(f"expected q, k, v (and extra keys) of one floating dtype, got {dtypes}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q and k [B, *spatial, N, D], v [B, *spatial, N, Dv], of one dtype."""
    if k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"expected k like q and v [B, *spatial, N, Dv], got q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"v {tuple(v.shape)}"
        )
    check_dtypes(q, k, v)


def check_table(q: Tensor, bias: Tensor | None, window: Sequence[int]) -> None:
    """A relative position table [N, 2 * window - 1 per axis]."""
    if bias is not None and tuple(bias.shape) != (table := (q.shape[-2], *(2 * w - 1 for w in window))):
        raise ValueError(f"expected bias {table} ([N, 2 * window - 1 per axis]), got {tuple(bias.shape)}")
