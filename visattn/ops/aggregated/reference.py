"""Aggregated attention by its definition: all neighbours gathered, all pairs of tokens and pooled keys written out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.geometry import Pooled

if TYPE_CHECKING:
    from visattn.ops.aggregated import AggregatedProblem


def log_coordinates(
    axis: Pooled, pretrain: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Compute [U] log8(1 + distance) with the sign of the distance, in units in which `pretrain` - 1 tokens are 8."""
    distance = torch.arange(*axis.bounds, device=device).to(dtype)
    distance = distance / 2 / max(pretrain - 1, 1) * 8
    return distance.sign() * (distance.abs() + 1).log2() / 3


def _position_bias(problem: AggregatedProblem) -> Tensor:
    """Evaluate the perceptron at every pair's log-distances, then interpolate: [N, H * W, PH * PW]."""
    axes, size, bins = problem.axes, problem.size, problem.pooled
    w1, b1, w2, b2 = problem.cpb_weight1, problem.cpb_bias1, problem.cpb_weight2, problem.cpb_bias2
    (h, w), (ph, pw) = shape = [axis.length for axis in axes], [axis.pooled for axis in axes]
    rows, columns = (
        log_coordinates(axis, n, w1.dtype, w1.device)[axis.index(w1.device)]
        for axis, n in zip(axes, problem.pretrain_size, strict=True)
    )
    rows, columns = rows[:, None, :, None], columns[:, None]  # [H0, 1, PH0, 1], [W0, 1, PW0]
    pairs = torch.stack(torch.broadcast_tensors(rows, columns), dim=-1)  # [H0, W0, PH0, PW0, 2]
    bias = F.linear(F.linear(pairs, w1, b1).relu(), w2, b2)  # [H0, W0, PH0, PW0, N]
    if (size, bins) != shape:
        heads, bias = bias.shape[-1], bias.permute(4, 0, 1, 2, 3)  # [N, H0, W0, PH0, PW0]
        bias = bias.reshape(1, heads * h * w, ph, pw)  # [1, N H0 W0, PH0, PW0]
        bias = F.interpolate(bias, bins, mode="bilinear")
        bias = bias.reshape(heads, h * w, -1).transpose(1, 2)  # [N, PH PW, H0 W0]
        bias = bias.reshape(1, -1, h, w)  # [1, N PH PW, H0, W0]
        bias = F.interpolate(bias, size, mode="bilinear")
        return bias.reshape(heads, -1, size[0] * size[1]).transpose(1, 2)  # [N, H W, PH PW]
    return bias.flatten(2, 3).flatten(0, 1).permute(2, 0, 1)  # [N, H W, PH PW]


def neighbours(x: Tensor, kernel_size: int) -> Tensor:
    """Gather the neighbours, zero outside the map, row by row: [B, H, W, N, D] -> [B, H, W, K * K, N, D]."""
    h, w, r = *x.shape[1:3], kernel_size // 2
    x = F.pad(x, (0, 0, 0, 0, r, r, r, r))
    places = itertools.product(range(kernel_size), repeat=2)
    return torch.stack([x[:, i : i + h, j : j + w] for i, j in places], dim=3)


def visible(size: Sequence[int], kernel_size: int, device: torch.device | None = None) -> Tensor:
    """Tell, as [H, W, K * K], whether a neighbour lies on the map."""
    ones = torch.ones(1, *size, 1, 1, device=device)
    return neighbours(ones, kernel_size)[0, ..., 0, 0] > 0


def weights(problem: AggregatedProblem) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Compute unit queries and what the softmax gives to neighbours [B, H, W, N, K * K] and pooled keys [.., P].

    Also returns the log-sum-exps of the logits [B, H, W, N].
    """
    size, slots, dtype = problem.size, problem.kernel_size**2, problem.dtype
    k, count = problem.local_k, math.prod(problem.pooled)
    unit = F.normalize(problem.q.to(dtype), dim=-1)  # [B, H, W, N, D]
    keys = F.normalize(problem.pool_k.flatten(1, 2).to(dtype), dim=-1)  # [B, P, N, D]
    there = None if k is None else visible(size, problem.kernel_size, unit.device)
    seen = unit.new_zeros(size) if there is None else there.sum(-1)
    length = (seen + count).to(dtype).log()  # [H, W]
    query = (unit + problem.query_embedding) * problem.scale[:, None] * length[:, :, None, None]
    pooled = torch.einsum("bhwnd,bpnd->bhwnp", query, keys)
    bias = _position_bias(problem).unflatten(1, size).permute(1, 2, 0, 3)  # [H, W, N, P]
    pooled = pooled + bias  # [B, H, W, N, P]
    if there is None or k is None:
        return unit, None, pooled.softmax(-1), pooled.logsumexp(-1)
    gathered = neighbours(F.normalize(k.to(dtype), dim=-1), problem.kernel_size)
    local = torch.einsum("bhwnd,bhwjnd->bhwnj", query, gathered)
    if problem.local_bias is not None:
        local = local + problem.local_bias
    local = local.masked_fill(~there[:, :, None], float("-inf"))
    logits = torch.cat([local, pooled], dim=-1)
    weight = logits.softmax(-1)
    return unit, weight[..., :slots], weight[..., slots:], logits.logsumexp(-1)


def attend(problem: AggregatedProblem) -> Tensor | tuple[Tensor, Tensor]:
    """See `visattn.ops.aggregated_attention`."""
    unit, local, pooled, lse = weights(problem)
    out = torch.einsum("bhwnp,bpnd->bhwnd", pooled, problem.pool_v.flatten(1, 2).to(problem.dtype))
    if local is not None and problem.local_v is not None:
        if problem.tokens is not None:
            local = local + torch.einsum("bhwnd,ndj->bhwnj", unit, problem.tokens)
        if problem.token_bias is not None:
            local = local + problem.token_bias
        gathered = neighbours(problem.local_v.to(problem.dtype), problem.kernel_size)
        out = out + torch.einsum("bhwnj,bhwjnd->bhwnd", local, gathered)
    out = out.to(problem.v.dtype)
    return (out, lse) if problem.return_lse else out
