"""Neighborhood attention as registered ops: `torch.ops.visattn.neighborhood_attention` and `..._lse`.

With known sizes both are composites of PyTorch operations. How a map is cut into tiles depends on its size, so while a
graph with symbolic sizes is traced they become one opaque node instead, `neighborhood_attention_opaque`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from visattn.ops.dispatch import Backend, Dispatcher, always
from visattn.ops.fused.support import automatic
from visattn.ops.neighborhood.checks import check_bias, check_tensors, checked_axes
from visattn.ops.neighborhood.eager import neighborhood_eager
from visattn.ops.neighborhood.reference import neighborhood_reference
from visattn.ops.neighborhood.triton import neighborhood_triton, refusal
from visattn.ops.registration import composite, flops_are_counted, opaque, sizes_are_known

dispatcher = Dispatcher(
    "neighborhood_attention",
    (
        Backend("triton", refusal, neighborhood_triton, automatic),
        Backend("eager", always, neighborhood_eager),
        Backend("reference", always, neighborhood_reference),
    ),
)

_WINDOW = "SymInt[] kernel_size, SymInt[] dilation, SymInt[] stride, bool[] is_causal"
_OPTIONAL = ("bias", "extra_k", "extra_v", "extra_bias")


def _run(
    tensors: Sequence[Tensor | None],
    window: Sequence[Any],
    scale: float | None,
    backend: str,
    return_lse: bool,
) -> tuple[Tensor, ...]:
    """Check the arguments and call a backend; (out,) or (out, lse)."""
    q, k, v, bias, extra_k, extra_v, extra_bias = tensors
    check_tensors(q, k, v, extra_k, extra_v)
    axes = checked_axes(q, *window)
    check_bias(q, axes, bias, extra_k, extra_bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return dispatcher(backend, q, k, v, axes, bias, extra_k, extra_v, extra_bias, scale, return_lse)


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
) -> Tensor | tuple[Tensor, ...]:
    tensors = (q, k, v, bias, extra_k, extra_v, extra_bias)
    window = (kernel_size, dilation, stride, is_causal)
    if sizes_are_known((*tensors, *window)) and not flops_are_counted():
        results = _run(tensors, window, scale, backend, return_lse)
    else:
        results = _opaque(*tensors, *window, scale, backend, return_lse)
    return tuple(results) if return_lse else results[0]


_arguments = (
    f"(Tensor q, Tensor k, Tensor v, {_WINDOW}, {', '.join(f'Tensor? {name}=None' for name in _OPTIONAL)}, "
    "float? scale=None, str backend='auto')"
)
attend = composite(f"neighborhood_attention{_arguments} -> Tensor", partial(_attend, False))
attend_lse = composite(f"neighborhood_attention_lse{_arguments} -> (Tensor, Tensor)", partial(_attend, True))


# The opaque node. The lse that is not asked for is an empty tensor, as an op cannot return None.


def _with_lse(*args: Any) -> tuple[Tensor, ...]:
    out, *lse = _run(args[:7], args[7:11], *args[11:])
    return out, lse[0] if lse else _no_lse(args[0])


def _no_lse(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    q, v, return_lse = args[0], args[2], args[-1]
    lse = _no_lse(q)
    return v.new_empty((*q.shape[:-1], v.shape[-1])), lse.new_empty(q.shape[:-1]) if return_lse else lse


def _flops(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    bias_shape: Any,
    extra_k_shape: Any,
    extra_v_shape: Any,
    extra_bias_shape: Any,
    kernel_size: Sequence[int],
    *args: Any,
) -> int:
    """Twice the multiply-adds for the keys that a query sees (causal axes in full), whatever a backend computes."""
    keys = math.prod(kernel_size) + (extra_k_shape[1] if extra_k_shape else 0)
    return 2 * math.prod(q_shape[:-1]) * keys * (q_shape[-1] + v_shape[-1])


_opaque = opaque(
    "neighborhood_attention",
    f"Tensor q, Tensor k, Tensor v, {', '.join(f'Tensor? {name}' for name in _OPTIONAL)}, {_WINDOW}, "
    "float? scale, str backend, bool return_lse",
    2,
    _with_lse,
    _fake,
    _flops,
)
