"""Neighborhood attention as registered ops: `torch.ops.visattn.neighborhood_attention` and `..._lse`.

With known sizes both are composites of PyTorch operations. While a graph with symbolic sizes is traced they become one
opaque node instead, `neighborhood_attention_opaque`, which runs when the sizes are known: how a map is cut into tiles
depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visattn.ops.dispatch import Backend, Dispatcher, always
from visattn.ops.neighborhood.checks import check_bias, check_tensors, checked_axes
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
    if all(isinstance(n, int) for t in tensors if t is not None for n in t.shape):
        results = _run(tensors, window, scale, backend, return_lse)
    else:
        results = torch.ops.visattn.neighborhood_attention_opaque(*tensors, *window, scale, backend, return_lse)
    return tuple(results) if return_lse else results[0]


_arguments = (
    f"(Tensor q, Tensor k, Tensor v, {_WINDOW}, {', '.join(f'Tensor? {name}=None' for name in _OPTIONAL)}, "
    "float? scale=None, str backend='auto')"
)
attend = composite(f"neighborhood_attention{_arguments} -> Tensor", partial(_attend, False))
attend_lse = composite(f"neighborhood_attention_lse{_arguments} -> (Tensor, Tensor)", partial(_attend, True))


@register_flop_formula([attend, attend_lse])
def _flops(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    bias_shape: Any = None,
    extra_k_shape: Any = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Twice the multiply-adds for the keys that a query sees (causal axes in full), whatever a backend computes.

    The counter reaches these ops under `torch.inference_mode`; elsewhere it counts a backend's own operations.
    """
    keys = math.prod(kernel_size) + (extra_k_shape[1] if extra_k_shape else 0)
    return 2 * math.prod(q_shape[:-1]) * keys * (q_shape[-1] + v_shape[-1])


# The opaque node. Results that are not asked for are empty tensors, as an op cannot return None.

_opaque_arguments = (
    f"Tensor q, Tensor k, Tensor v, {', '.join(f'Tensor? {name}' for name in _OPTIONAL)}, {_WINDOW}, "
    "float? scale, str backend"
)


def _score_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


@torch.library.custom_op(
    "visattn::neighborhood_attention_opaque",
    mutates_args=(),
    schema=f"({_opaque_arguments}, bool return_lse) -> (Tensor, Tensor)",
)
def _opaque(*args: Any) -> tuple[Tensor, Tensor]:
    q, (scale, backend, return_lse) = args[0], args[11:]
    out, *lse = _run(args[:7], args[7:11], scale, backend, return_lse)
    return out.contiguous(), lse[0].contiguous() if return_lse else q.new_empty(0, dtype=_score_dtype(q))


@_opaque.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    q, v, return_lse = args[0], args[2], args[-1]
    lse = q.new_empty(q.shape[:-1] if return_lse else 0, dtype=_score_dtype(q))
    return v.new_empty((*q.shape[:-1], v.shape[-1])), lse


@torch.library.custom_op(
    "visattn::neighborhood_attention_opaque_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor? grad_lse, bool[] needs, {_opaque_arguments}) -> Tensor[]",
)
def _opaque_backward(grad_out: Tensor, grad_lse: Tensor | None, needs: list[bool], *args: Any) -> list[Tensor]:
    tensors, how = list(args[:7]), args[7:]
    wanted = [i for i, n in enumerate(needs) if n]

    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        for i, t in zip(wanted, inputs, strict=True):
            tensors[i] = t
        return _run(tensors, how[:4], *how[4:], grad_lse is not None)

    # A kernel runs below autograd, where only a functional transform can differentiate.
    _, differentiate = torch.func.vjp(forward, *(tensors[i] for i in wanted))
    return [g.contiguous() for g in differentiate((grad_out,) if grad_lse is None else (grad_out, grad_lse))]


@_opaque_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor | None, needs: list[bool], *args: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, n in zip(args[:7], needs, strict=True) if n]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.rest, ctx.return_lse = inputs[7:13], inputs[13]


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:7])
    grad_lse = grad_lse if ctx.return_lse else None
    found = iter(
        torch.ops.visattn.neighborhood_attention_opaque_backward(
            grad_out, grad_lse, needs, *ctx.saved_tensors, *ctx.rest
        )
    )
    return tuple(next(found) if n else None for n in needs) + (None,) * 7


_opaque.register_autograd(_differentiate, setup_context=_setup_context)
