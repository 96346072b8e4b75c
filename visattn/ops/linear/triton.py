"""Attentions of linear cost through a context per head, both products in Triton; feature maps in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops._legacy import automatic, refusal
from visattn.ops.fused.products import apply, outer
from visattn.ops.fused.stencil import dynamic_conv
from visattn.ops.linear.eager import focus, is_quadratic


def linear_refusal(q: Tensor, *others: Tensor | float | None) -> str | None:
    """Why the kernels cannot run a call of any of the four ops, or None."""
    return refusal(q, *(x for x in others if isinstance(x, Tensor)))


def attention_automatic(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | float | None) -> str | None:
    """Why "auto" should not take the kernels for an attention, or None."""
    if is_quadratic(*(x.flatten(1, -3) for x in (q, k, v))):
        return "few tokens of wide heads cost less token by token"
    return automatic(q)


def convolution_automatic(x: Tensor, kernels: Tensor) -> str | None:
    """Why "auto" should not take the kernels for the convolution, or None."""
    return automatic(x)


def efficient_triton(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """See `visattn.ops.efficient_attention`."""
    shape, dtype, same = q.shape[:-1], v.dtype, q.shape[1:-2] == k.shape[1:-2]
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    hidden = None if mask is None else ~mask.flatten(1)[:, :, None, None]
    if hidden is not None:
        k, v = k.float().masked_fill(hidden, torch.finfo(torch.float32).min), v.masked_fill(hidden, 0)
        q = q.masked_fill(hidden, 0) if same else q
    q, k = q.softmax(-1, dtype=torch.float32).to(dtype), k.softmax(1, dtype=torch.float32).to(dtype)
    out = apply(q, outer(k, v))
    if hidden is not None and same:
        out = out.masked_fill(hidden, 0)
    return out.reshape(*shape, -1)


def inline_triton(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """See `visattn.ops.inline_attention`."""
    shape = q.shape[:-1]
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    context = outer(k - k.mean(1, keepdim=True), v) * (scale / k.shape[1])
    return (apply(q, context) + v.mean(1, keepdim=True)).reshape(*shape, -1)


def focused_triton(q: Tensor, k: Tensor, v: Tensor, focus_scale: Tensor, factor: float) -> Tensor:
    """See `visattn.ops.focused_linear_attention`."""
    shape, dtype = q.shape[:-1], v.dtype
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    scale = F.softplus(focus_scale.float())
    q, k = focus(q, scale, factor), focus(k, scale, factor)
    q = q / ((q * k.mean(1, keepdim=True)).sum(-1, keepdim=True) + 1e-6)
    context = outer(k.to(dtype), v) / k.shape[1]
    return apply(q.to(dtype), context).reshape(*shape, -1)


def dynamic_conv_triton(x: Tensor, kernels: Tensor) -> Tensor:
    """See `visattn.ops.dynamic_depthwise_conv`."""
    return dynamic_conv(x, kernels)
