"""Routed attention as registered ops: `torch.ops.visattn.routed_attention` and `...bilevel_routing_attention`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from visattn.ops._legacy import Backend, Dispatcher, always, automatic, define_op
from visattn.ops.checks import check_dtypes
from visattn.ops.geometry import Partition
from visattn.ops.routed.eager import routed_eager
from visattn.ops.routed.reference import routed_reference
from visattn.ops.routed.routing import Axes, pool_regions, route
from visattn.ops.routed.triton import refusal, routed_triton

dispatcher = Dispatcher(
    "routed_attention",
    (
        Backend("triton", refusal, routed_triton, automatic),
        Backend("eager", always, routed_eager),
        Backend("reference", always, routed_reference),
    ),
)


def region_axes(name: str, spatial: Sequence[int], size: Sequence[int]) -> Axes:
    """Both axes of a map cut into regions."""
    if len(size) != 2 or any(n < 1 for n in size):
        raise ValueError(f"expected {name} of two ints from 1, got {list(size)}")
    rows, columns = (Partition(n, s) for n, s in zip(spatial, size, strict=True))
    return rows, columns


def count_regions(axes: Axes) -> int:
    """Regions of a map."""
    return axes[0].layout()[0] * axes[1].layout()[0]


def check_maps(q: Tensor, k: Tensor) -> None:
    """Maps of queries and keys, of one batch, number of heads and width."""
    if q.ndim != 5 or k.ndim != 5 or q.shape[0] != k.shape[0] or q.shape[3:] != k.shape[3:]:
        raise ValueError(
            f"expected q [B, H, W, N, D] and k [B, Hk, Wk, N, D], got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    region_size: list[int],
    kv_region_size: list[int],
    weight: Tensor | None = None,
    mask_border: bool = True,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    check_maps(q, k)
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"expected v [B, Hk, Wk, N, Dv], got {tuple(v.shape)} for k {tuple(k.shape)}")
    check_dtypes(q, k, v)
    q_axes = region_axes("region_size", q.shape[1:3], region_size)
    k_axes = region_axes("kv_region_size", k.shape[1:3], kv_region_size)
    batch, heads = q.shape[0], q.shape[3]
    expected = (batch, f"1 or {heads}", count_regions(q_axes), "topk")
    if index.ndim != 4 or index.shape[:3] not in ((batch, n, count_regions(q_axes)) for n in (1, heads)):
        raise ValueError(f"expected index {expected} (a list per query region), got {tuple(index.shape)}")
    if not index.shape[3] or index.is_floating_point():
        raise ValueError(f"expected index of at least one int64 region, got {index.shape[3]} of {index.dtype}")
    if weight is not None and weight.shape != index.shape:
        raise ValueError(f"expected weight like index {tuple(index.shape)}, got {tuple(weight.shape)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return dispatcher(backend, q, k, v, index, q_axes, k_axes, weight, mask_border, scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return v.new_empty((*q.shape[:-1], v.shape[-1]))


def _attention_flops(q_shape: Sequence[int], v_shape: Sequence[int], keys: int) -> int:
    """Twice the multiply-adds for so many keys per query, whatever a backend computes."""
    return 2 * math.prod(q_shape[:4]) * keys * (q_shape[4] + v_shape[4])


def _flops(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    index_shape: Sequence[int],
    region_size: Sequence[int],
    kv_region_size: Sequence[int],
    *args: Any,
) -> int:
    """With full regions."""
    tokens = math.prod(min(n, s) for n, s in zip(k_shape[1:3], kv_region_size, strict=True))
    return _attention_flops(q_shape, v_shape, index_shape[-1] * tokens)


attend = define_op(
    "routed_attention(Tensor q, Tensor k, Tensor v, Tensor index, SymInt[] region_size, SymInt[] kv_region_size, "
    "Tensor? weight=None, bool mask_border=True, float? scale=None, str backend='auto') -> Tensor",
    _run,
    _fake,
    _flops,
)


def region_sizes(spatial: Sequence[int], n_win: Sequence[int], rule: str) -> list[int]:
    """Tokens of a region per axis, for a wished number of regions."""
    if rule not in ("mask", "zero") or len(n_win) != 2 or any(n < 1 for n in n_win):
        raise ValueError(f"expected n_win of two ints from 1 and rule 'mask' or 'zero', got {list(n_win)} and {rule!r}")
    if rule == "mask":
        return [-(-n // w) for n, w in zip(spatial, n_win, strict=True)]
    return [max(1, n // w) for n, w in zip(spatial, n_win, strict=True)]


def _run_bilevel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n_win: list[int],
    topk: int,
    rule: str = "mask",
    per_head: bool = False,
    soft: bool = False,
    diff: bool = False,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
    kv_pool: str = "none",
    kv_size: int = 1,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    check_maps(q, k)
    if k.shape != q.shape or topk < 1:
        raise ValueError(f"expected k like q and topk >= 1, got q {tuple(q.shape)}, k {tuple(k.shape)}, topk {topk}")
    size = region_sizes(q.shape[1:3], n_win, rule)
    axes = region_axes("region_size", q.shape[1:3], size)
    scale = (q.shape[3] * q.shape[4]) ** -0.5 if scale is None else scale
    index, weight = route(q, k, axes, axes, topk, scale, per_head, diff, router_weight, router_bias)
    k_axes = axes
    if kv_pool != "none":
        k, k_axes = pool_regions(k, axes, kv_pool, kv_size)
        v, _ = pool_regions(v, axes, kv_pool, kv_size)
    kv_region_size = [axis.window for axis in k_axes]
    return _run(q, k, v, index, size, kv_region_size, weight if soft else None, rule == "mask", scale, backend)


def _bilevel_flops(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    n_win: Sequence[int],
    topk: int,
    rule: str = "mask",
    per_head: bool = False,
    soft: bool = False,
    diff: bool = False,
    router_weight_shape: Any = None,
    router_bias_shape: Any = None,
    kv_pool: str = "none",
    kv_size: int = 1,
    *args: Any,
) -> int:
    """Attention with full regions; routing is left out."""
    size = region_sizes(q_shape[1:3], n_win, rule)
    topk = min(topk, count_regions(region_axes("region_size", q_shape[1:3], size)))
    if kv_pool != "none":
        size = [kv_size if kv_pool.startswith("ada_") else s // kv_size for s in size]
    return _attention_flops(q_shape, v_shape, topk * math.prod(size))


attend_bilevel = define_op(
    "bilevel_routing_attention(Tensor q, Tensor k, Tensor v, SymInt[] n_win, SymInt topk, str rule='mask', "
    "bool per_head=False, bool soft=False, bool diff=False, Tensor? router_weight=None, Tensor? router_bias=None, "
    "str kv_pool='none', SymInt kv_size=1, float? scale=None, str backend='auto') -> Tensor",
    _run_bilevel,
    _fake,
    _bilevel_flops,
)
