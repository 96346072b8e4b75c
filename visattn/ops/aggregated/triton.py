"""Aggregated attention by the fused Triton kernels: neighbours as a sliding window, pooled keys as extra keys.

Normalisation, the queries' length and the position bias are PyTorch; see `visattn.ops.fused`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.aggregated.cpb import PositionBias, position_table
from visattn.ops.aggregated.reference import visible
from visattn.ops.fused import support
from visattn.ops.fused.tables import Lookup, select
from visattn.ops.geometry import CPU, Clipped, Pooled, Whole, interpolated
from visattn.ops.registration import register

if TYPE_CHECKING:
    from visattn.ops.aggregated import AggregatedProblem

# The position bias is a tensor of heads x queries x pooled keys, shared by the images of a batch.
_MOST = 1 << 28


def can_run(problem: AggregatedProblem) -> str | None:
    """None, or why the kernels cannot run this call."""
    bias = problem.q.shape[1:4].numel() * problem.pool_k.shape[1:3].numel()
    if bias > _MOST:
        expected = f"at most {_MOST} heads x queries x pooled keys for the position bias"
        return f"expected {expected}, got {bias}"
    return support.can_run(problem)


@functools.lru_cache(maxsize=4096)
def _reader(
    length: int, pooled: int, size: int, bins: int, device: torch.device
) -> tuple[Lookup, Tensor | None]:
    """Find what `_read` looks up for the size x bins pairs of an axis, and its weights."""
    axis = Pooled(length, pooled)
    with torch.inference_mode(False):
        index, weight = interpolated(axis, size, bins, CPU)
        weight = None if weight is None else weight.to(device)
        return Lookup(index, len(axis.distances), device), weight


def _read(table: Tensor, sizes: Sequence[int]) -> Tensor:
    """Read the bias of pooled keys [N, H * W, PH * PW] from the table [N, U, V] of distances.

    Sizes are, for rows and then for columns, the queries and keys that the table was made for, and those asked for.
    """
    table = table.transpose(1, 2)  # [N, V, U]
    for axis in (sizes[:4], sizes[4:]):
        lookup, weight = _reader(*axis, table.device)
        table = select(table, lookup)
        table = table.squeeze(-1) if weight is None else (table * weight.to(table)).sum(-1)
        if table.ndim == 4:  # [N, V, H, PH] -> [N, H, PH, V]; then it is [N, H, PH, W, PW]
            table = table.movedim(1, -1)
    return table.transpose(2, 3).flatten(3).flatten(1, 2)  # [N, H W, PH PW]


def _empty(table: Tensor, sizes: Sequence[int]) -> Tensor:
    return table.new_empty((table.shape[0], sizes[2] * sizes[6], sizes[3] * sizes[7]))


def _read_any_size(table: Tensor, sizes: Sequence[int]) -> Tensor:
    """Do what `_read` does, in operations that do not depend on the sizes."""
    axes = [Pooled(*axis[:2]) for axis in (sizes[:4], sizes[4:])]
    return PositionBias(axes, sizes[2::4], sizes[3::4], table).all()


# An op, as the lookups of `_reader` must not be made while a graph is traced.
_read_positions = register("aggregated_positions", _read, fake=_empty, decomposition=_read_any_size)


def attend(problem: AggregatedProblem) -> Tensor | tuple[Tensor, Tensor]:
    """See `visattn.ops.aggregated_attention`."""
    from visattn.ops.fused.attention import flat, fused_attention
    from visattn.ops.fused.depthwise import mix_neighbours

    q, k, v, kernel_size = problem.q, problem.local_k, problem.local_v, problem.kernel_size
    size, pooled, dtype = problem.size, problem.pooled, problem.dtype

    def unit(x: Tensor) -> Tensor:
        return F.normalize(x.to(dtype), dim=-1)

    sizes = []
    for axis, queries, keys in zip(problem.axes, size, pooled, strict=True):
        sizes += [axis.length, axis.pooled, queries, keys]
    bias = _read_positions(position_table(problem), sizes).to(q.dtype)  # [N, H W, P]
    count, unit_q, scale = math.prod(pooled), unit(q), problem.scale[:, None]
    pool_k, pool_v = flat(unit(problem.pool_k).to(q.dtype)), flat(problem.pool_v)
    if k is None or v is None:
        query = (unit_q + problem.query_embedding) * (scale * math.log(count))
        query, axes = flat(query.to(q.dtype)), [Whole(math.prod(size), count)]
        out, lse = fused_attention(query, pool_k, pool_v, axes, 1.0, bias=bias)
        out = out.view(*q.shape[:-1], pool_v.shape[-1])  # [B, H, W, N, Dv]
        return (out, lse.view(q.shape[:-1])) if problem.return_lse else out

    length = (visible(size, kernel_size, q.device).sum(-1) + count).to(dtype).log()  # [H, W]
    query = (unit_q + problem.query_embedding) * (scale * length[..., None, None])
    query, key = (flat(x.to(q.dtype)) for x in (query, unit(k)))
    local_bias, tokens, token_bias = problem.local_bias, problem.tokens, problem.token_bias
    if local_bias is not None:
        local_bias = local_bias.unflatten(1, (kernel_size, kernel_size))  # [N, K, K]
    extra = {"extra_k": pool_k, "extra_v": pool_v, "extra_bias": bias.transpose(0, 1)[None]}
    axes = [Clipped(n, kernel_size) for n in size]
    out, lse = fused_attention(query, key, flat(v), axes, 1.0, bias=local_bias, **extra)
    out = out.view(v.shape)  # [B, H, W, N, Dv]
    if tokens is not None or token_bias is not None:
        mixing = unit_q.new_zeros(*q.shape[:-1], 1)
        if tokens is not None:
            mixing = torch.einsum("bhwnd,ndj->bhwnj", unit_q, tokens)
        if token_bias is not None:
            mixing = mixing + token_bias
        out = (out + mix_neighbours(v, mixing)).to(v.dtype)
    return (out, lse.view(q.shape[:-1])) if problem.return_lse else out
