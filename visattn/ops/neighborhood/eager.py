"""Neighborhood attention as a few dense attentions: tiles of queries against the union of their windows.

Each dilation group is a smaller map of its own. A tile of queries and the keys of all its windows are gathered by
`index_select` (its backward, `index_add`, is far cheaper than that of `unfold`) straight into the layout in which the
mask, which is the same for every image, broadcasts: tiles and heads as the batch of
`scaled_dot_product_attention`, images as its heads.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops import chunking
from visattn.ops.geometry import (
    Tiles,
    interleave,
    is_symbolic,
    outer_index,
    read_table,
    sees_all,
    tiles,
)

if TYPE_CHECKING:
    from visattn.ops.neighborhood import NeighborhoodProblem


def _rows(token: Tensor, batch: int, tokens: int, heads: int) -> Tensor:
    """Row of the flattened [B * S * N, D] tensor, for [T, N, B, t] and tokens [T, t]."""
    image = torch.arange(batch, device=token.device)[:, None] * tokens
    head = torch.arange(heads, device=token.device)[:, None, None]
    return (token[:, None, None, :] + image) * heads + head


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x [B, *spatial, N, D], laid out as [T, N, B, t, D] in one copy."""
    return x.flatten(0, -2).index_select(0, rows.flatten()).reshape(*rows.shape, x.shape[-1])


def _scatter(x: Tensor, cut: list[Tiles]) -> Tensor:
    """Inverse of `_gather` for queries: [T, N, B, t, ...] -> [B, *spatial, N, ...], without the repeated ones."""
    tile, rank = torch.zeros_like(cut[0].slot[:1]), torch.zeros_like(cut[0].slot[:1])
    for part in cut:
        number, t = part.query.shape
        tile = (tile[:, None] * number + part.slot // t).flatten()
        rank = (rank[:, None] * t + part.slot % t).flatten()
    heads, batch = x.shape[1:3]
    head = torch.arange(heads, device=x.device)
    image = torch.arange(batch, device=x.device)[:, None, None]
    # In the order in which x lies in memory (attention leaves [T, t, heads, D]), so that flattening copies nothing.
    order = (
        list(range(4)) if is_symbolic(*x.stride()) else sorted(range(4), key=x.stride, reverse=True)
    )
    rows = image.new_zeros(())
    for dim in order:
        rows = rows * x.shape[dim] + (tile[:, None], head, image, rank[:, None])[dim]
    spatial = [part.axis.length for part in cut]
    x = x.permute(*order, *range(4, x.ndim)).flatten(0, 3)
    return x.index_select(0, rows.flatten()).reshape(batch, *spatial, heads, *x.shape[1:])


def _mask(cut: list[Tiles], dtype: torch.dtype) -> Tensor:
    """[T, 1, t, U]: 0 where a query sees a key, -inf elsewhere."""
    zero = torch.zeros((), dtype=dtype, device=cut[0].slot.device)
    total = zero.reshape((1,) * (1 + 3 * len(cut)))
    for a, part in enumerate(cut):
        hidden = ~part.visible()
        shape = (1,) * (1 + 3 * a) + tuple(hidden.shape) + (1,) * (3 * (len(cut) - 1 - a))
        total = total + zero.masked_fill(hidden, float("-inf")).reshape(shape)
    return interleave(total, len(cut))


def attend(problem: NeighborhoodProblem) -> Tensor | tuple[Tensor, ...]:
    """See `visattn.ops.neighborhood_attention`. Shapes below: T tiles of t queries and U keys (E extra ones)."""
    q, k, v, bias, axes, scale = (
        problem.q,
        problem.k,
        problem.v,
        problem.bias,
        problem.axes,
        problem.scale,
    )
    extra_k, extra_v, extra_bias, spatial = (
        problem.extra_k,
        problem.extra_v,
        problem.extra_bias,
        problem.size,
    )
    batch, heads = q.shape[0], q.shape[-2]
    tile = chunking.TILE[len(axes)]
    cut = [tiles(axis, tile, q.device) for axis in axes]
    query_rows = _rows(
        outer_index([c.query_index() for c in cut], spatial), batch, math.prod(spatial), heads
    )
    if all(c.key is c.query for c in cut):
        key_rows = query_rows
    else:
        key_rows = _rows(
            outer_index([c.key_index() for c in cut], spatial), batch, math.prod(spatial), heads
        )

    # A bias that trains would push SDPA off its flash path (4x slower than explicit products on a CPU), and with
    # symbolic sizes SDPA ties the graph to more than one image.
    trains = torch.is_grad_enabled() and any(
        b is not None and b.requires_grad for b in (bias, extra_bias)
    )
    symbolic = is_symbolic(*spatial)
    explicit = trains or problem.return_lse or symbolic
    dtype = torch.promote_types(q.dtype, torch.float32) if explicit else q.dtype

    added = None  # [T, N or 1, B or 1, t, U (+ E)]
    if not all(sees_all(axis, tile) for axis in axes):
        added = _mask(cut, dtype)[:, :, None]
    if bias is not None:
        table = read_table(bias.to(dtype), [part.displacement() for part in cut])[:, :, None]
        added = table if added is None else added + table

    query, key, value = _gather(q, query_rows), _gather(k, key_rows), _gather(v, key_rows)
    if extra_k is not None and extra_v is not None:
        number, keys = key.shape[0], key.shape[-2]
        key = torch.cat([key, extra_k.permute(2, 0, 1, 3).expand(number, -1, -1, -1, -1)], dim=-2)
        value = torch.cat(
            [value, extra_v.permute(2, 0, 1, 3).expand(number, -1, -1, -1, -1)], dim=-2
        )
        extra = None
        if extra_bias is not None:
            extra = _gather(extra_bias.to(dtype).expand(*q.shape[:-1], -1), query_rows)
        if added is not None or extra is not None:
            added = key.new_zeros(1, dtype=dtype) if added is None else added
            extra = key.new_zeros(1, dtype=dtype) if extra is None else extra
            parts = (
                added.expand(*query.shape[:-1], keys),
                extra.expand(*query.shape[:-1], extra_k.shape[1]),
            )
            added = torch.cat(parts, dim=-1)

    if explicit:
        scores = (query * scale @ key.mT).to(dtype)
        scores = scores if added is None else (scores + added if symbolic else scores.add_(added))
        out = scores.softmax(dim=-1).to(value.dtype) @ value
        out = _scatter(out, cut)
        return (out, _scatter(scores.logsumexp(dim=-1), cut)) if problem.return_lse else out

    # Dimensions over which the mask is constant go together: (N, B) without a bias, B alone with one.
    dim = 1 if added is None or added.shape[1] == 1 else 0
    query, key, value = (x.flatten(dim, dim + 1) for x in (query, key, value))
    added = None if added is None else added.flatten(dim, dim + 1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale)
    out = out.unflatten(dim, (heads, batch) if dim == 1 else (out.shape[0] // heads, heads))
    return _scatter(out, cut)
