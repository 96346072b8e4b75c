"""Aggregated attention by the fused Triton kernels: neighbours as a sliding window, pooled keys as extra keys.

Normalisation, the queries' length and the position bias are PyTorch; see `visattn.ops.fused`.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops import _legacy as support
from visattn.ops._legacy import opaque
from visattn.ops.aggregated.cpb import position_table
from visattn.ops.aggregated.reference import visible
from visattn.ops.fused.tables import Lookup, select
from visattn.ops.geometry import Clipped, Pooled, Whole, interpolated

# The position bias is a tensor of heads x queries x pooled keys, shared by the images of a batch.
_MOST = 1 << 28


def refusal(
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
    *parameters: Tensor | None,
) -> str | None:
    """Why the kernels cannot run this call."""
    bias = q.shape[1:4].numel() * pool_k.shape[1:3].numel()
    if bias > _MOST:
        return f"expected at most {_MOST} heads x queries x pooled keys for the position bias, got {bias}"
    return support.attention_refusal(q, pool_v, pool_k, scale, query_embedding, *cpb, k, v, *parameters)


@functools.lru_cache(maxsize=64)
def _reader(length: int, pooled: int, size: int, bins: int, device: torch.device) -> tuple[Lookup, Tensor | None]:
    axis = Pooled(length, pooled)
    with torch.inference_mode(False):
        index, weight = interpolated(axis, size, bins, device)
    return Lookup(index, len(axis.distances)), weight


def _read(table: Tensor, sizes: list[int]) -> Tensor:
    table = table.transpose(1, 2)  # [N, V, U]
    for axis in (sizes[:4], sizes[4:]):
        lookup, weight = _reader(*axis, table.device)
        table = select(table, lookup)
        table = table.squeeze(-1) if weight is None else (table * weight.to(table)).sum(-1)
        table = table.movedim(1, -1) if table.ndim == 4 else table  # [N, H, PH, V], then [N, H, PH, W, PW]
    return table.transpose(2, 3).flatten(3).flatten(1, 2)


# The bias of pooled keys [N, H * W, PH * PW] from the table [N, U, V] of distances; sizes: per axis queries and keys
# that the table was made for, then those asked for. An op, as its tables must not be made while a graph is traced.
read_positions = opaque(
    "aggregated_positions",
    "Tensor table, int[] sizes",
    1,
    _read,
    lambda table, sizes: table.new_empty((table.shape[0], sizes[2] * sizes[6], sizes[3] * sizes[7])),
)


def aggregated_triton(
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
    from visattn.ops.fused.attention import flat, fused_attention
    from visattn.ops.fused.depthwise import mix_neighbours

    size, pooled, dtype = (q.shape[1], q.shape[2]), (pool_k.shape[1], pool_k.shape[2]), scale.dtype

    def unit(x: Tensor) -> Tensor:
        return F.normalize(x.to(dtype), dim=-1)

    sizes = [n for a, s, p in zip(axes, size, pooled, strict=True) for n in (a.length, a.pooled, s, p)]
    bias = read_positions(position_table(axes, pretrain_size, cpb), sizes).to(q.dtype)
    count, unit_q = math.prod(pooled), unit(q)
    pool_k, pool_v = flat(unit(pool_k).to(q.dtype)), flat(pool_v)
    if k is None or v is None:
        query = (unit_q + query_embedding) * (scale[:, None] * math.log(count))
        out, _ = fused_attention(
            flat(query.to(q.dtype)), pool_k, pool_v, [Whole(math.prod(size), count)], 1.0, bias=bias
        )
        return out.view(*q.shape[:-1], pool_v.shape[-1])

    length = (visible(size, kernel_size, q.device).sum(-1) + count).to(dtype).log()
    query = ((unit_q + query_embedding) * (scale[:, None] * length[..., None, None])).to(q.dtype)
    out, _ = fused_attention(
        flat(query),
        flat(unit(k).to(q.dtype)),
        flat(v),
        [Clipped(n, kernel_size) for n in size],
        1.0,
        bias=None if local_bias is None else local_bias.unflatten(1, (kernel_size, kernel_size)),
        extra_k=pool_k,
        extra_v=pool_v,
        extra_bias=bias.transpose(0, 1)[None],
    )
    out = out.view(v.shape)
    if tokens is None and token_bias is None:
        return out
    mixing = unit_q.new_zeros(*q.shape[:-1], 1) if tokens is None else torch.einsum("bhwnd,ndj->bhwnj", unit_q, tokens)
    return out + mix_neighbours(v, mixing if token_bias is None else mixing + token_bias)
