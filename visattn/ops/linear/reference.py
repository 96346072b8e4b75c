"""The attentions of linear cost by the formulas of their papers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from visattn.ops import linear


def _flat(problem: linear.LinearProblem) -> list[Tensor]:
    """Flatten [B, *spatial, N, D] -> [B, S, N, D], in float32 at least."""
    return [t.to(problem.dtype) for t in problem.flat()]


def attend_efficient(problem: linear.EfficientProblem) -> Tensor:
    """See `visattn.ops.efficient_attention`."""
    query, key, value = _flat(problem)
    hidden, hidden_queries = problem.hidden()
    if hidden is not None:
        value = value.masked_fill(hidden, 0)
        key = key.masked_fill(hidden, float("-inf"))
        key = key.masked_fill(hidden.all(1, keepdim=True), 0)
    if hidden_queries is not None:
        query = query.masked_fill(hidden_queries, 0)
    context = torch.einsum("bmnd,bmne->bnde", key.softmax(dim=1), value)
    out = torch.einsum("blnd,bnde->blne", query.softmax(dim=-1), context)
    return problem.unflat(out if hidden_queries is None else out.masked_fill(hidden_queries, 0))


def attend_inline(problem: linear.InlineProblem) -> Tensor:
    """See `visattn.ops.inline_attention`."""
    (query, key, value), scale = _flat(problem), problem.scale
    context = torch.einsum("bmnd,bmne->bnde", key, value) * scale / key.shape[1]
    rest = 1 - scale * (query * key.mean(1, keepdim=True)).sum(-1, keepdim=True)
    out = torch.einsum("blnd,bnde->blne", query, context)
    return problem.unflat(out + rest * value.mean(1, keepdim=True))


def attend_focused(problem: linear.FocusedProblem) -> Tensor:
    """See `visattn.ops.focused_linear_attention`."""
    query, key, value = _flat(problem)

    def focus(x: Tensor) -> Tensor:
        x = (x.relu() + 1e-6) / F.softplus(problem.focus_scale.to(x.dtype))
        powered, axes = x**problem.factor, (-2, -1)
        return powered / powered.norm(dim=axes, keepdim=True) * x.norm(dim=axes, keepdim=True)

    query, key = focus(query), focus(key)
    total = (query * key.mean(1, keepdim=True)).sum(-1, keepdim=True) + 1e-6
    context = torch.einsum("bmnd,bmne->bnde", key, value) / key.shape[1]
    return problem.unflat(torch.einsum("blnd,bnde->blne", query, context) / total)


def attend_relu(problem: linear.ReluProblem) -> Tensor:
    """See `visattn.ops.relu_linear_attention`."""
    query, key, value = _flat(problem)
    query, key = query.relu(), key.relu()
    total = (query * key.sum(1, keepdim=True)).sum(-1, keepdim=True).clamp(min=problem.floor)
    context = torch.einsum("bmnd,bmne->bnde", key, value)
    out = torch.einsum("blnd,bnde->blne", query, context) / total
    return problem.unflat(out * problem.temperature.to(out.dtype)[:, None])


def flows(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Measure incoming flow and allocation [B, L, N, 1], competition [B, M, N, 1] of sigmoids [B, L or M, N, D]."""
    eps = 1e-6

    def flow(x: Tensor, total: Tensor) -> Tensor:
        return ((x + eps) * (total + eps)).sum(-1, keepdim=True) + eps

    incoming, outgoing = (
        flow(query, key.sum(1, keepdim=True)),
        flow(key, query.sum(1, keepdim=True)),
    )
    conserved_sink = flow(query, (key / outgoing).sum(1, keepdim=True))
    conserved_source = flow(key, (query / incoming).sum(1, keepdim=True)).clamp(-1, 1)
    allocation = (conserved_sink * (query.shape[1] / key.shape[1])).sigmoid()
    return incoming, allocation, conserved_source.softmax(1) * key.shape[1]


def attend_flow(problem: linear.LinearProblem) -> Tensor:
    """See `visattn.ops.flow_attention`."""
    query, key, value = _flat(problem)
    query, key = query.sigmoid(), key.sigmoid()
    incoming, allocation, competition = flows(query, key)
    context = torch.einsum("bmnd,bmne->bnde", key, value * competition)
    out = torch.einsum("blnd,bnde->blne", query, context)
    return problem.unflat(out / incoming * allocation)


def convolve(problem: linear.DynamicConvProblem) -> Tensor:
    """See `visattn.ops.dynamic_depthwise_conv`."""
    x, kernels, size = problem.x, problem.kernels, problem.kernel_size
    dtype, pad = torch.promote_types(x.dtype, torch.float32), size // 2
    windows = F.pad(x.to(dtype), (0, 0, pad, pad, pad, pad)).unfold(1, size, 1).unfold(2, size, 1)
    windows = windows.flatten(-2)  # [B, H, W, C, K K]
    return torch.einsum("bhwcj,bcj->bhwc", windows, kernels.to(dtype)).to(x.dtype)
