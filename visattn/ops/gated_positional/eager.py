"""Gated positional attention as fused attention to content, and two small products for that to positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.cut import contiguous_copy
from visattn.ops.geometry import is_symbolic

if TYPE_CHECKING:
    from visattn.ops.gated_positional import GatedPositionalProblem


def _along(axis: Tensor, linear: Tensor, square: Tensor, bias: Tensor | None) -> Tensor:
    """Weigh the places [L] of an axis by their distance, for factors [N] of it and of its square: [N, L, L]."""
    step = axis - axis[:, None]  # [L, L], key - query
    logits = linear[:, None, None] * step + square[:, None, None] * step**2
    return (logits if bias is None else logits + bias[:, None, None]).softmax(dim=-1)


def add_positional(problem: GatedPositionalProblem, content: Tensor) -> Tensor:
    """Mix attention to content [B, S, N, Dv] with that to positions: [B, H, W, N, Dv]."""
    v, size, dtype = problem.v, problem.size, problem.dtype
    dx, dy, square = problem.pos_weight.to(dtype).unbind(-1)  # [N]
    bias = None if problem.pos_bias is None else problem.pos_bias.to(dtype)
    y, x = (torch.arange(n, dtype=dtype, device=v.device) for n in size)
    rows = _along(y, dy, square, bias).to(v.dtype)  # [N, H, H]
    columns = _along(x, dx, square, None).to(v.dtype)  # [N, W, W]
    mixed = torch.einsum("nyj,bjind->byind", rows, v)
    mixed = torch.einsum("nxi,byind->byxnd", columns, mixed)  # [B, H, W, N, Dv]
    gate = problem.gate.to(dtype).sigmoid().to(v.dtype)[:, None]  # [N, 1]
    return torch.lerp(content.unflatten(1, size), mixed, gate)  # [B, H, W, N, Dv]


def attend(problem: GatedPositionalProblem) -> Tensor:
    """See `visattn.ops.gated_positional_attention`; S tokens."""
    # With symbolic sizes SDPA ties the graph to more than one image.
    symbolic = is_symbolic(*problem.size)
    maps = (problem.q, problem.k, problem.v)
    if symbolic:  # whether flattening copies is then not asked
        maps = (contiguous_copy(x) for x in maps)
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in maps)  # [B, N, S, D]
    if symbolic:
        scores = (q * problem.scale @ k.mT).to(problem.dtype)  # [B, N, S, S]
        content = scores.softmax(dim=-1).to(v.dtype) @ v
    else:
        content = F.scaled_dot_product_attention(q, k, v, scale=problem.scale)
    return add_positional(problem, content.transpose(1, 2))
