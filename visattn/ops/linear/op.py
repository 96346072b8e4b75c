"""Attentions of linear cost as registered ops: `torch.ops.visattn.efficient_attention` and so on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visattn.ops._legacy import Backend, Dispatcher, always, define_op
from visattn.ops.checks import check_dtypes, spatial_axes
from visattn.ops.linear.eager import dynamic_conv_eager, efficient_eager, focused_eager, inline_eager
from visattn.ops.linear.reference import (
    dynamic_conv_reference,
    efficient_reference,
    focused_reference,
    inline_reference,
)
from visattn.ops.linear.triton import (
    attention_automatic,
    convolution_automatic,
    dynamic_conv_triton,
    efficient_triton,
    focused_triton,
    inline_triton,
    linear_refusal,
)


def _dispatcher(name: str, triton: Any, eager: Any, reference: Any, automatic: Any = attention_automatic) -> Dispatcher:
    return Dispatcher(
        name,
        (
            Backend("triton", linear_refusal, triton, automatic),
            Backend("eager", always, eager),
            Backend("reference", always, reference),
        ),
    )


dispatchers = {
    d.op: d
    for d in (
        _dispatcher("efficient_attention", efficient_triton, efficient_eager, efficient_reference),
        _dispatcher("inline_attention", inline_triton, inline_eager, inline_reference),
        _dispatcher("focused_linear_attention", focused_triton, focused_eager, focused_reference),
        _dispatcher(
            "dynamic_depthwise_conv",
            dynamic_conv_triton,
            dynamic_conv_eager,
            dynamic_conv_reference,
            convolution_automatic,
        ),
    )
}


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    spatial_axes(q)
    spatial_axes(k)
    if k.shape[0] != q.shape[0] or k.shape[-2:] != q.shape[-2:] or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"expected q [B, *spatial, N, D], k [B, *other, N, D] and v [B, *other, N, Dv], got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    check_dtypes(q, k, v)


def _fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return v.new_empty((*q.shape[:-1], v.shape[-1]))


def _efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, backend: str = "auto") -> Tensor:
    _check(q, k, v)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != k.shape[:-2]):
        raise ValueError(f"expected a boolean mask {tuple(k.shape[:-2])}, got {mask.dtype} {tuple(mask.shape)}")
    return dispatchers["efficient_attention"](backend, q, k, v, mask)


def _inline(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, backend: str = "auto") -> Tensor:
    _check(q, k, v)
    if scale is not None and not scale > 0:
        raise ValueError(f"expected scale > 0, got {scale}")
    return dispatchers["inline_attention"](backend, q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


def _focused(
    q: Tensor, k: Tensor, v: Tensor, focus_scale: Tensor, factor: float = 3.0, backend: str = "auto"
) -> Tensor:
    _check(q, k, v)
    if focus_scale.shape != q.shape[-2:]:
        raise ValueError(f"expected focus_scale {tuple(q.shape[-2:])} ([N, D]), got {tuple(focus_scale.shape)}")
    if not factor > 0:
        raise ValueError(f"expected factor > 0, got {factor}")
    return dispatchers["focused_linear_attention"](backend, q, k, v, focus_scale, factor)


def _dynamic_conv(x: Tensor, kernels: Tensor, backend: str = "auto") -> Tensor:
    size = math.isqrt(kernels.shape[-1]) if kernels.ndim == 3 else 0
    if x.ndim != 4 or size % 2 == 0 or kernels.shape != (x.shape[0], x.shape[-1], size * size):
        raise ValueError(
            f"expected x [B, H, W, C] and kernels [B, C, K * K] with an odd K, got {tuple(x.shape)} and "
            f"{tuple(kernels.shape)}"
        )
    check_dtypes(x, kernels)
    return dispatchers["dynamic_depthwise_conv"](backend, x, kernels)


def _fake_dynamic_conv(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


def _flops(q_shape: Sequence[int], k_shape: Sequence[int], v_shape: Sequence[int], *args: Any) -> int:
    """Twice the multiply-adds of the two products in the cheaper order."""
    queries, keys = math.prod(q_shape[1:-2]), math.prod(k_shape[1:-2])
    d, dv = q_shape[-1], v_shape[-1]
    return 2 * q_shape[0] * q_shape[-2] * min(queries * keys * (d + dv), (queries + keys) * d * dv)


efficient = define_op(
    "efficient_attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, str backend='auto') -> Tensor",
    _efficient,
    _fake,
    _flops,
)
inline = define_op(
    "inline_attention(Tensor q, Tensor k, Tensor v, float? scale=None, str backend='auto') -> Tensor",
    _inline,
    _fake,
    _flops,
)
focused = define_op(
    "focused_linear_attention(Tensor q, Tensor k, Tensor v, Tensor focus_scale, float factor=3.0, "
    "str backend='auto') -> Tensor",
    _focused,
    _fake,
    _flops,
)


def _dynamic_conv_flops(x_shape: Sequence[int], kernels_shape: Sequence[int], *args: Any) -> int:
    return 2 * math.prod(x_shape) * kernels_shape[-1]


dynamic_conv = define_op(
    "dynamic_depthwise_conv(Tensor x, Tensor kernels, str backend='auto') -> Tensor",
    _dynamic_conv,
    _fake_dynamic_conv,
    _dynamic_conv_flops,
    whole_on_cpu=True,
)
