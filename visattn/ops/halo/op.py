"""Halo attention as a registered op: `torch.ops.visattn.halo_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from visattn.ops._legacy import Backend, Dispatcher, always, automatic, define_op
from visattn.ops.checks import check_dtypes
from visattn.ops.geometry import Halo
from visattn.ops.halo.eager import halo_eager
from visattn.ops.halo.reference import halo_reference
from visattn.ops.halo.triton import halo_triton, refusal

dispatcher = Dispatcher(
    "halo_attention",
    (
        Backend("triton", refusal, halo_triton, automatic),
        Backend("eager", always, halo_eager),
        Backend("reference", always, halo_reference),
    ),
)


def _axes(
    spatial: Sequence[int], block: Sequence[int], halo: Sequence[int], stride: Sequence[int]
) -> tuple[Halo, Halo]:
    if any(b < 1 or h < 0 or s < 1 or b % s for b, h, s in zip(block, halo, stride, strict=True)):
        raise ValueError(
            f"expected block_size >= 1, halo_size >= 0 and a stride that divides block_size on both axes, got "
            f"block_size {list(block)}, halo_size {list(halo)}, stride {list(stride)}"
        )
    first, second = (Halo(*a) for a in zip(spatial, block, halo, stride, strict=True))
    return first, second


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: list[int],
    halo_size: list[int],
    stride: list[int],
    rel_h: Tensor | None = None,
    rel_w: Tensor | None = None,
    mask_border: bool = True,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    if q.ndim != 5 or k.ndim != 5 or v.shape[:-1] != k.shape[:-1] or k.shape[3:] != q.shape[3:]:
        raise ValueError(
            f"expected q [B, H', W', N, D], k [B, H, W, N, D] and v [B, H, W, N, Dv], got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    check_dtypes(q, k, v)
    axes = _axes(k.shape[1:3], block_size, halo_size, stride)
    expected = (k.shape[0], *(axis.queries for axis in axes))
    if tuple(q.shape[:3]) != expected:
        raise ValueError(
            f"expected q with [B, H', W'] = {expected} (the keys' map over stride {list(stride)}, rounded up), got "
            f"{tuple(q.shape[:3])}"
        )
    for name, table, axis in (("rel_h", rel_h, axes[0]), ("rel_w", rel_w, axes[1])):
        if table is not None and tuple(table.shape) != (2 * axis.window - 1, q.shape[-1]):
            raise ValueError(
                f"expected {name} {(2 * axis.window - 1, q.shape[-1])} ([2 * (block + 2 * halo) - 1, D]), got "
                f"{tuple(table.shape)}"
            )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return dispatcher(backend, q, k, v, axes, rel_h, rel_w, mask_border, scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return v.new_empty((*q.shape[:-1], v.shape[-1]))


def _flops(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    block_size: Sequence[int],
    halo_size: Sequence[int],
    stride: Sequence[int],
    rel_h_shape: Any = None,
    rel_w_shape: Any = None,
    mask_border: bool = True,
    *args: Any,
) -> int:
    """Twice the multiply-adds for the pairs that take part and the relative terms, whatever a backend computes."""
    axes = _axes(k_shape[1:3], block_size, halo_size, stride)
    pairs = axes[0].pairs(mask_border) * axes[1].pairs(mask_border)
    heads, dim = q_shape[0] * q_shape[3], q_shape[4]
    tables = zip(axes, (rel_h_shape, rel_w_shape), strict=True)
    relative = q_shape[1] * q_shape[2] * sum(axis.window for axis, shape in tables if shape)
    return 2 * heads * (pairs * (dim + v_shape[-1]) + relative * dim)


attend = define_op(
    "halo_attention(Tensor q, Tensor k, Tensor v, SymInt[2] block_size, SymInt[2] halo_size, SymInt[2] stride, "
    "Tensor? rel_h=None, Tensor? rel_w=None, bool mask_border=True, float? scale=None, str backend='auto') -> Tensor",
    _run,
    _fake,
    _flops,
)
