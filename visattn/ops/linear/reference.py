"""The attentions of linear cost by the formulas of their papers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _flat(*tensors: Tensor) -> list[Tensor]:
    """[B, *spatial, N, D] -> [B, S, N, D], in float32 at least."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [t.flatten(1, -3).to(dtype) for t in tensors]


def _like(out: Tensor, q: Tensor, v: Tensor) -> Tensor:
    return out.to(v.dtype).reshape(*q.shape[:-1], v.shape[-1])


def efficient_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """See `visattn.ops.efficient_attention`."""
    query, key, value = _flat(q, k, v)
    hidden = None
    if mask is not None:
        hidden = ~mask.flatten(1)[..., None, None]  # [B, M, 1, 1]
        value = value.masked_fill(hidden, 0)
        key = key.masked_fill(hidden, float("-inf"))
        key = key.masked_fill(hidden.all(1, keepdim=True), 0)
    if hidden is not None and q.shape[1:-2] == k.shape[1:-2]:
        query = query.masked_fill(hidden, 0)
    context = torch.einsum("bmnd,bmne->bnde", key.softmax(dim=1), value)
    out = torch.einsum("blnd,bnde->blne", query.softmax(dim=-1), context)
    if hidden is not None and q.shape[1:-2] == k.shape[1:-2]:
        out = out.masked_fill(hidden, 0)
    return _like(out, q, v)


def inline_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """See `visattn.ops.inline_attention`."""
    query, key, value = _flat(q, k, v)
    context = torch.einsum("bmnd,bmne->bnde", key, value) * scale / key.shape[1]
    rest = 1 - scale * (query * key.mean(1, keepdim=True)).sum(-1, keepdim=True)
    return _like(torch.einsum("blnd,bnde->blne", query, context) + rest * value.mean(1, keepdim=True), q, v)


def focused_reference(q: Tensor, k: Tensor, v: Tensor, focus_scale: Tensor, factor: float) -> Tensor:
    """See `visattn.ops.focused_linear_attention`."""
    query, key, value = _flat(q, k, v)

    def focus(x: Tensor) -> Tensor:
        x = (x.relu() + 1e-6) / F.softplus(focus_scale.to(x.dtype))
        powered = x**factor
        return powered / powered.norm(dim=(-2, -1), keepdim=True) * x.norm(dim=(-2, -1), keepdim=True)

    query, key = focus(query), focus(key)
    total = (query * key.mean(1, keepdim=True)).sum(-1, keepdim=True) + 1e-6
    context = torch.einsum("bmnd,bmne->bnde", key, value) / key.shape[1]
    return _like(torch.einsum("blnd,bnde->blne", query, context) / total, q, v)


def dynamic_conv_reference(x: Tensor, kernels: Tensor) -> Tensor:
    """See `visattn.ops.dynamic_depthwise_conv`."""
    dtype, size = torch.promote_types(x.dtype, torch.float32), round(kernels.shape[-1] ** 0.5)
    pad = size // 2
    windows = F.pad(x.to(dtype), (0, 0, pad, pad, pad, pad)).unfold(1, size, 1).unfold(2, size, 1).flatten(-2)
    return torch.einsum("bhwcj,bcj->bhwc", windows, kernels.to(dtype)).to(x.dtype)
