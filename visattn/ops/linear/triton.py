"""Attentions of linear cost through a context per head, both products in Triton; feature maps in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visattn.ops.fused import support
from visattn.ops.linear.eager import flow_pair, focused_pair, relu_pair

if TYPE_CHECKING:
    from visattn.ops import linear


def automatic(problem: linear.LinearProblem) -> str | None:
    """None, or why "auto" should not take the kernels for an attention."""
    if problem.is_quadratic:
        return "few tokens of wide heads cost less token by token"
    return support.automatic(problem)


def attend_efficient(problem: linear.EfficientProblem) -> Tensor:
    """See `visattn.ops.efficient_attention`."""
    from visattn.ops.fused.linear import apply, outer

    (q, k, v), dtype = problem.flat(), problem.v.dtype
    hidden, hidden_queries = problem.hidden()
    if hidden is not None:
        k = k.float().masked_fill(hidden, torch.finfo(torch.float32).min)
        v = v.masked_fill(hidden, 0)
    if hidden_queries is not None:
        q = q.masked_fill(hidden_queries, 0)
    q, k = q.softmax(-1, dtype=torch.float32).to(dtype), k.softmax(1, dtype=torch.float32).to(dtype)
    out = apply(q, outer(k, v))
    return problem.unflat(out if hidden_queries is None else out.masked_fill(hidden_queries, 0))


def attend_inline(problem: linear.InlineProblem) -> Tensor:
    """See `visattn.ops.inline_attention`."""
    from visattn.ops.fused.linear import apply, outer

    q, k, v = problem.flat()
    context = outer(k - k.mean(1, keepdim=True), v) * (problem.scale / k.shape[1])
    return problem.unflat(apply(q, context) + v.mean(1, keepdim=True))


def attend_focused(problem: linear.FocusedProblem) -> Tensor:
    """See `visattn.ops.focused_linear_attention`."""
    from visattn.ops.fused.linear import apply, outer

    q, k, scale = focused_pair(problem)
    return problem.unflat(apply(q, outer(k, problem.v.flatten(1, -3)) * scale))


def attend_relu(problem: linear.ReluProblem) -> Tensor:
    """See `visattn.ops.relu_linear_attention`."""
    from visattn.ops.fused.linear import apply, outer

    q, k, scale = relu_pair(problem)
    return problem.unflat(apply(q, outer(k, problem.v.flatten(1, -3)) * scale))


def attend_flow(problem: linear.LinearProblem) -> Tensor:
    """See `visattn.ops.flow_attention`."""
    from visattn.ops.fused.linear import apply, outer

    q, k, scale = flow_pair(problem)
    return problem.unflat(apply(q, outer(k, problem.v.flatten(1, -3)) * scale))


def convolve(problem: linear.DynamicConvProblem) -> Tensor:
    """See `visattn.ops.dynamic_depthwise_conv`."""
    from visattn.ops.fused.depthwise import dynamic_conv

    return dynamic_conv(problem.x, problem.kernels)
