"""Neighborhood attention (NA): each query attends to the keys nearest to it. See README.md in this folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visattn.ops.dispatch import Backend, Dispatcher, always
from visattn.ops.geometry import Axis
from visattn.ops.neighborhood.eager import neighborhood_eager
from visattn.ops.neighborhood.reference import neighborhood_reference
from visattn.ops.registration import composite

dispatcher = Dispatcher(
    "neighborhood_attention",
    (
        Backend("eager", always, neighborhood_eager),
        Backend("reference", always, neighborhood_reference),
    ),
)


def _per_axis(name: str, value: Any, kind: type, axes: int) -> list[Any]:
    values = [value] * axes if isinstance(value, kind) else list(value)
    if len(values) != axes or not all(isinstance(x, kind) for x in values):
        raise ValueError(f"expected {name} of one {kind.__name__} or {axes} (one per spatial axis), got {value!r}")
    return values


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    bias: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    extra_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + bias) v over the `kernel_size` nearest keys of every query.

    Per axis, the window is centred on the query, shifted (never cut) at the border, so that every query has exactly
    `kernel_size` keys; an even window leans to the left. Differentiable in every tensor argument.

    Args:
        q: Queries [B, *spatial, N, D] with one, two or three spatial axes; N heads of D channels. Any strides.
        k: Keys [B, *spatial, N, D].
        v: Values [B, *spatial, N, Dv].
        kernel_size: Keys per axis, >= 1.
        dilation: Distance between neighbouring keys, in tokens. Tokens i and j see each other only if
            i = j (mod dilation); axes need not be divisible by it. `kernel_size * dilation` must not exceed the axis.
        stride: Generalized NA: this many consecutive queries share the window of their central (causal: last) one.
            `stride == kernel_size` is blocked (window) attention.
        is_causal: On a causal axis, keys after the query are hidden; the first queries have fewer keys.
        bias: Relative position table [N, 2 * kernel_size - 1 per axis]; entry K - 1 is displacement 0 (key - query,
            in units of the dilation). Only with stride 1 and no causal axis.
        extra_k: Keys [B, E, N, D] that every query sees besides its neighbours, in the same softmax.
        extra_v: Values [B, E, N, Dv] of the extra keys.
        extra_bias: Added to the logits of the extra keys; broadcastable to [B, *spatial, N, E].
        scale: Factor of q k^T. Default: D ** -0.5.
        return_lse: Also return the natural log of the sum of the exponentials of the logits.
        backend: "auto", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, *spatial, N, Dv] of v's dtype; with `return_lse` also [B, *spatial, N], float32 (float64 for float64).

    Raises:
        ValueError: Shapes or window arguments that do not fit.
        TypeError: q, k, v (and extra keys) of different dtypes, or not floating point.
        BackendError: The requested backend cannot run this call.

    Sources: arXiv:2204.07143 eq. 1-3 (NA), arXiv:2209.15001 eq. 2 (dilation), arXiv:2504.16922 (stride).
    """
    axes = q.ndim - 3
    if axes not in (1, 2, 3):
        raise ValueError(f"expected q of shape [B, *spatial, N, D] with 1 to 3 spatial axes, got {tuple(q.shape)}")
    windows = (
        _per_axis("kernel_size", kernel_size, int, axes),
        _per_axis("dilation", dilation, int, axes),
        _per_axis("stride", stride, int, axes),
        _per_axis("is_causal", is_causal, bool, axes),
    )
    op = torch.ops.visattn.neighborhood_attention_lse if return_lse else torch.ops.visattn.neighborhood_attention
    return op(q, k, v, *windows, bias, extra_k, extra_v, extra_bias, scale, backend)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None) -> None:
    if k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"expected k like q and v [B, *spatial, N, Dv], got q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"v {tuple(v.shape)}"
        )
    if (extra_k is None) != (extra_v is None):
        raise ValueError("expected extra_k and extra_v together, got only one of them")
    given = [t for t in (q, k, v, extra_k, extra_v) if t is not None]
    if not q.is_floating_point() or any(t.dtype != q.dtype for t in given):
        raise TypeError(f"expected q, k, v (and extra keys) of one floating dtype, got {[t.dtype for t in given]}")
    if extra_k is not None and extra_v is not None:
        head = (q.shape[0], extra_k.shape[1], q.shape[-2])
        if tuple(extra_k.shape) != (*head, q.shape[-1]) or tuple(extra_v.shape) != (*head, v.shape[-1]):
            raise ValueError(
                f"expected extra_k {(*head, q.shape[-1])} and extra_v {(*head, v.shape[-1])} ([B, E, N, D]), "
                f"got {tuple(extra_k.shape)} and {tuple(extra_v.shape)}"
            )


def _axes(
    q: Tensor, kernel_size: list[int], dilation: list[int], stride: list[int], is_causal: list[bool]
) -> tuple[Axis, ...]:
    spatial = q.shape[1:-2]
    for k, d, s, n in zip(kernel_size, dilation, stride, spatial, strict=True):
        if isinstance(k, int) and (k < 1 or d < 1 or not 1 <= s <= k):
            raise ValueError(
                f"expected kernel_size >= 1, dilation >= 1 and 1 <= stride <= kernel_size on every axis, got "
                f"kernel_size {kernel_size}, dilation {dilation}, stride {stride}"
            )
        if isinstance(n, int) and isinstance(k, int) and k * d > n:  # symbolic sizes are the caller's promise
            raise ValueError(
                f"expected kernel_size * dilation <= size on every axis, got kernel_size {kernel_size}, dilation "
                f"{dilation} on a map of {tuple(spatial)}; try torch.ops.visattn.pad_to_at_least before projecting q, k, v"
            )
    return tuple(Axis(*a) for a in zip(spatial, kernel_size, dilation, stride, is_causal, strict=True))


def _check_bias(
    q: Tensor,
    axes: tuple[Axis, ...],
    bias: Tensor | None,
    extra_k: Tensor | None,
    extra_bias: Tensor | None,
) -> None:
    if bias is not None:
        if any(a.stride > 1 or a.is_causal for a in axes):
            raise ValueError(f"expected stride 1 and no causal axis with a bias, got {axes}")
        table = (q.shape[-2], *(2 * a.kernel_size - 1 for a in axes))
        if tuple(bias.shape) != table:
            raise ValueError(f"expected bias {table} ([N, 2 * kernel_size - 1 per axis]), got {tuple(bias.shape)}")
    if extra_bias is not None:
        if extra_k is None:
            raise ValueError("expected extra_k and extra_v with extra_bias, got extra_bias alone")
        target, got = (*q.shape[:-1], extra_k.shape[1]), tuple(extra_bias.shape)
        fits = all(n in (1, m) for n, m in zip(reversed(got), reversed(target), strict=False))
        if len(got) > len(target) or not fits:
            raise ValueError(f"expected extra_bias broadcastable to {target} ([B, *spatial, N, E]), got {got}")


def _attend(
    return_lse: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: list[int],
    dilation: list[int],
    stride: list[int],
    is_causal: list[bool],
    bias: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    extra_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    _check_tensors(q, k, v, extra_k, extra_v)
    axes = _axes(q, kernel_size, dilation, stride, is_causal)
    _check_bias(q, axes, bias, extra_k, extra_bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = dispatcher(backend, q, k, v, axes, bias, extra_k, extra_v, extra_bias, scale, return_lse)
    return (out, lse) if return_lse else out


_ARGUMENTS = (
    "(Tensor q, Tensor k, Tensor v, SymInt[] kernel_size, int[] dilation, int[] stride, bool[] is_causal, "
    "Tensor? bias=None, Tensor? extra_k=None, Tensor? extra_v=None, Tensor? extra_bias=None, "
    "float? scale=None, str backend='auto')"
)
_op = composite(f"neighborhood_attention{_ARGUMENTS} -> Tensor", partial(_attend, False))
_op_lse = composite(f"neighborhood_attention_lse{_ARGUMENTS} -> (Tensor, Tensor)", partial(_attend, True))


@register_flop_formula([_op, _op_lse])
def _flops(
    q_shape: Sequence[int], k_shape: Sequence[int], v_shape: Sequence[int], kernel_size: Sequence[int], *args: Any,
    out_shape: Any = None, **kwargs: Any,
) -> int:
    """Multiply-adds times two of the visible keys alone (causal axes counted in full), whatever a backend computes."""
    extra = next((shape[1] for shape in args[4:5] if shape is not None), 0)
    return 2 * math.prod(q_shape[:-1]) * (math.prod(kernel_size) + extra) * (q_shape[-1] + v_shape[-1])
