"""Aggregated attention by its definition: all neighbours gathered, all pairs of tokens and pooled keys written out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.geometry import Pooled


def log_coordinates(axis: Pooled, pretrain: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[U] log8(1 + distance) with the sign of the distance, in units in which `pretrain` - 1 tokens are 8."""
    found = axis.distances
    distance = torch.arange(found.start, found.stop, found.step, device=device).to(dtype)
    distance = distance / 2 / max(pretrain - 1, 1) * 8
    return distance.sign() * (distance.abs() + 1).log2() / 3


def _position_bias(
    axes: tuple[Pooled, Pooled], size: tuple[int, int], bins: tuple[int, int], pretrain: list[int], cpb: list[Tensor]
) -> Tensor:
    """[N, H * W, PH * PW]: the perceptron of every pair's log-distances, then interpolated."""
    w1, b1, w2, b2 = cpb
    (h, w), (ph, pw) = ((axis.length for axis in axes), (axis.pooled for axis in axes))
    rows, columns = (
        log_coordinates(axis, n, w1.dtype, w1.device)[axis.index(w1.device)]
        for axis, n in zip(axes, pretrain, strict=True)
    )
    shape = (h, w, ph, pw)
    pairs = torch.stack([rows[:, None, :, None].expand(shape), columns[None, :, None, :].expand(shape)], dim=-1)
    bias = F.linear(F.linear(pairs, w1, b1).relu(), w2, b2)
    if (*size, *bins) != shape:
        heads = bias.shape[-1]
        bias = bias.permute(4, 0, 1, 2, 3).reshape(1, heads * h * w, ph, pw)
        bias = F.interpolate(bias, bins, mode="bilinear")
        bias = bias.reshape(heads, h * w, -1).transpose(1, 2).reshape(1, -1, h, w)
        bias = F.interpolate(bias, size, mode="bilinear")
        return bias.reshape(heads, -1, size[0] * size[1]).transpose(1, 2)
    return bias.flatten(2, 3).flatten(0, 1).permute(2, 0, 1)


def neighbours(x: Tensor, kernel_size: int) -> Tensor:
    """[B, H, W, N, D] -> [B, H, W, K * K, N, D]: row by row, zero outside the map."""
    h, w, r = *x.shape[1:3], kernel_size // 2
    x = F.pad(x, (0, 0, 0, 0, r, r, r, r))
    return torch.stack([x[:, i : i + h, j : j + w] for i in range(kernel_size) for j in range(kernel_size)], dim=3)


def visible(size: tuple[int, int], kernel_size: int, device: torch.device | None = None) -> Tensor:
    """[H, W, K * K] whether a neighbour lies on the map."""
    ones = torch.ones(1, *size, 1, 1, device=device)
    return neighbours(ones, kernel_size)[0, ..., 0, 0] > 0


def reference_weights(
    q: Tensor,
    pool_k: Tensor,
    scale: Tensor,
    query_embedding: Tensor,
    cpb: list[Tensor],
    axes: tuple[Pooled, Pooled],
    pretrain_size: list[int],
    k: Tensor | None,
    kernel_size: int,
    local_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The normalised queries, and what the softmax gives to neighbours [B, H, W, N, K * K] and pooled keys [.., P]."""
    size, bins = (q.shape[1], q.shape[2]), (pool_k.shape[1], pool_k.shape[2])
    unit = F.normalize(q, dim=-1)
    keys = F.normalize(pool_k.flatten(1, 2), dim=-1)
    there = None if k is None else visible(size, kernel_size, q.device)
    if there is None:
        length = torch.full(size, math.log(bins[0] * bins[1]), dtype=q.dtype, device=q.device)
    else:
        length = (there.sum(-1) + bins[0] * bins[1]).to(q.dtype).log()
    query = (unit + query_embedding) * scale[:, None] * length[:, :, None, None]
    pooled = torch.einsum("bhwnd,bpnd->bhwnp", query, keys)
    bias = _position_bias(axes, size, bins, pretrain_size, cpb)
    pooled = pooled + bias.unflatten(1, size).permute(1, 2, 0, 3)
    if there is None:
        return unit, None, pooled.softmax(-1)
    local = torch.einsum("bhwnd,bhwjnd->bhwnj", query, neighbours(F.normalize(k, dim=-1), kernel_size))
    if local_bias is not None:
        local = local + local_bias
    local = local.masked_fill(~there[:, :, None], float("-inf"))
    weights = torch.cat([local, pooled], dim=-1).softmax(-1)
    return unit, weights[..., : kernel_size**2], weights[..., kernel_size**2 :]


def aggregated_reference(
    q: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    scale: Tensor,
    query_embedding: Tensor,
    cpb: list[Tensor],
    axes: tuple[Pooled, Pooled],
    pretrain_size: list[int],
    k: Tensor | None,
    v: Tensor | None,
    kernel_size: int,
    local_bias: Tensor | None,
    tokens: Tensor | None,
    token_bias: Tensor | None,
) -> Tensor:
    """See `visattn.ops.aggregated_attention`; `scale` is softplus(temperature), `axes` those of the position bias."""
    dtype = scale.dtype
    q, pool_k, pool_v = (x.to(dtype) for x in (q, pool_k, pool_v))
    k, v = (None if x is None else x.to(dtype) for x in (k, v))
    unit, local, pooled = reference_weights(
        q, pool_k, scale, query_embedding, cpb, axes, pretrain_size, k, kernel_size, local_bias
    )
    out = torch.einsum("bhwnp,bpnd->bhwnd", pooled, pool_v.flatten(1, 2))
    if local is None:
        return out
    if tokens is not None:
        local = local + torch.einsum("bhwnd,ndj->bhwnj", unit, tokens)
    if token_bias is not None:
        local = local + token_bias
    return out + torch.einsum("bhwnj,bhwjnd->bhwnd", local, neighbours(v, kernel_size))
