"""Window attention as a registered op: `torch.ops.visattn.window_attention`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from visattn.ops.checks import check_qkv, check_table
from visattn.ops.dispatch import Backend, Dispatcher, always
from visattn.ops.fused.support import automatic
from visattn.ops.geometry import Partition
from visattn.ops.registration import define_op
from visattn.ops.window.eager import window_eager
from visattn.ops.window.reference import window_reference
from visattn.ops.window.triton import refusal, window_triton

dispatcher = Dispatcher(
    "window_attention",
    (
        Backend("triton", refusal, window_triton, automatic),
        Backend("eager", always, window_eager),
        Backend("reference", always, window_reference),
    ),
)


def _axes(spatial: Sequence[int], window: Sequence[int], shift: Sequence[int], grid: bool) -> tuple[Partition, ...]:
    if any(w < 1 or not 0 <= s < w or (grid and s) for w, s in zip(window, shift, strict=True)):
        raise ValueError(
            f"expected window_size >= 1 and 0 <= shift < window_size on every axis, and no shift of a grid, got "
            f"window_size {list(window)}, shift {list(shift)}, grid {grid}"
        )
    return tuple(Partition(n, w, s, grid) for n, w, s in zip(spatial, window, shift, strict=True))


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: list[int],
    shift: list[int],
    grid: bool,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    check_qkv(q, k, v)
    axes = _axes(q.shape[1:-2], window_size, shift, grid)
    check_table(q, bias, window_size)
    return dispatcher(backend, q, k, v, axes, bias, q.shape[-1] ** -0.5 if scale is None else scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return v.new_empty(v.shape)


def _flops(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    window_size: Sequence[int],
    shift: Sequence[int],
    grid: bool,
    *args: Any,
) -> int:
    """Twice the multiply-adds for the pairs that see each other, whatever a backend computes."""
    pairs = math.prod(axis.pairs() for axis in _axes(q_shape[1:-2], window_size, shift, grid))
    return 2 * q_shape[0] * q_shape[-2] * pairs * (q_shape[-1] + v_shape[-1])


attend = define_op(
    "window_attention(Tensor q, Tensor k, Tensor v, SymInt[] window_size, SymInt[] shift, bool grid, "
    "Tensor? bias=None, float? scale=None, str backend='auto') -> Tensor",
    _run,
    _fake,
    _flops,
)
