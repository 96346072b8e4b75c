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

from visattn.ops import chunking, geometry
from visattn.ops.geometry import Tiles, is_symbolic

if TYPE_CHECKING:
    from visattn.ops.neighborhood import NeighborhoodProblem


def _rows(tokens: list[Tensor], q: Tensor, size: list[int]) -> Tensor:
    """Number the rows of q, flattened to [B * S * N, D], that tokens [T_a, t_a] of each axis lie in: [T, N, B, t]."""
    batch, heads, device = q.shape[0], q.shape[-2], q.device
    token = geometry.outer_index(tokens, size)[:, None, None]  # [T, 1, 1, t]
    image = torch.arange(batch, device=device)[:, None] * math.prod(size)  # [B, 1]
    return (token + image) * heads + torch.arange(heads, device=device)[:, None, None]


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """Copy rows [T, N, B, t] of x [B, *spatial, N, D], laid out as [T, N, B, t, D]."""
    x = x.flatten(0, -2).index_select(0, rows.flatten())  # [T N B t, D]
    return x.reshape(*rows.shape, x.shape[-1])  # [T, N, B, t, D]


def _scatter(x: Tensor, cut: list[Tiles]) -> Tensor:
    """Undo `_gather` for queries: [T, N, B, t, ...] -> [B, *spatial, N, ...], without the repeated ones."""
    tile = rank = torch.zeros_like(cut[0].slot[:1])
    for part in cut:
        number, t = part.query.shape
        tile = (tile[:, None] * number + part.slot // t).flatten()  # [L_1 ... L_a]
        rank = (rank[:, None] * t + part.slot % t).flatten()  # [L_1 ... L_a]
    heads, batch = x.shape[1:3]
    head = torch.arange(heads, device=x.device)
    image = torch.arange(batch, device=x.device)[:, None, None]
    # In the order in which x lies in memory (attention leaves [T, t, heads, D]), so that flattening copies nothing.
    order = list(range(4))
    if not is_symbolic(*x.stride()):
        order.sort(key=x.stride, reverse=True)
    rows = image.new_zeros(())
    for dim in order:
        rows = rows * x.shape[dim] + (tile[:, None], head, image, rank[:, None])[dim]
    spatial = [part.axis.length for part in cut]
    x = x.permute(*order, *range(4, x.ndim)).flatten(0, 3)  # [T N B t in memory's order, ...]
    x = x.index_select(0, rows.flatten())  # [B S N, ...]
    return x.reshape(batch, *spatial, heads, *x.shape[1:])  # [B, *spatial, N, ...]


def _mask(cut: list[Tiles], dtype: torch.dtype) -> Tensor:
    """Make [T, 1, t, U]: 0 where a query sees a key, -inf elsewhere."""
    total = zero = torch.zeros((), dtype=dtype, device=cut[0].slot.device)
    for a, part in enumerate(cut):
        hidden = zero.masked_fill(~part.visible(), float("-inf"))  # [T_a, t_a, U_a]
        total = total + hidden.reshape(*hidden.shape, *[1] * (3 * (len(cut) - 1 - a)))
    return geometry.interleave(total[None], len(cut))  # [T, 1, t, U]


def _hidden(key_mask: Tensor, cut: list[Tiles]) -> Tensor:
    """Tell [T, 1, B, 1, U] which keys of a tile key_mask [B, *spatial] hides."""
    token = geometry.outer_index([part.key_index() for part in cut], list(key_mask.shape[1:]))
    return ~key_mask.flatten(1)[:, token].transpose(0, 1)[:, None, :, None]


def attend(problem: NeighborhoodProblem) -> Tensor | tuple[Tensor, ...]:
    """See `visattn.ops.neighborhood_attention`. Shapes below: T tiles of t queries and U keys (E extra ones)."""
    q, bias, axes, scale = problem.q, problem.bias, problem.axes, problem.scale
    extra_k, extra_v, extra_bias = problem.extra_k, problem.extra_v, problem.extra_bias
    batch, heads, tile = q.shape[0], q.shape[-2], chunking.TILE[len(axes)]
    cut = [geometry.tiles(axis, tile, q.device) for axis in axes]
    key_rows = query_rows = _rows([c.query_index() for c in cut], q, problem.size)
    if any(c.key is not c.query for c in cut):
        key_rows = _rows([c.key_index() for c in cut], q, problem.size)

    # A bias that trains would push SDPA off its flash path (4x slower than explicit products on a CPU), and with
    # symbolic sizes SDPA ties the graph to more than one image.
    trains = any(b is not None and b.requires_grad for b in (bias, extra_bias))
    symbolic = is_symbolic(*problem.size)
    explicit = (trains and torch.is_grad_enabled()) or problem.return_lse or symbolic
    dtype = problem.dtype if explicit else q.dtype

    added = None  # [T, N or 1, B or 1, t, U (+ E)]
    if not all(geometry.sees_all(axis, tile) for axis in axes):
        added = _mask(cut, dtype)[:, :, None]
    if problem.key_mask is not None:
        added = q.new_zeros((), dtype=dtype) if added is None else added
        added = added.masked_fill(_hidden(problem.key_mask, cut), float("-inf"))
    if bias is not None:
        table = geometry.read_table(bias.to(dtype), [part.displacement() for part in cut])
        table = table[:, :, None]  # [T, N, 1, t, U]
        added = table if added is None else added + table

    query = _gather(q, query_rows)  # [T, N, B, t, D]
    key, value = (_gather(x, key_rows) for x in problem.visible_kv)  # [T, N, B, U, D]
    if extra_k is not None and extra_v is not None:
        keys, extra = key.shape[-2], None
        number = key.shape[0]
        key, value = (  # [T, N, B, U + E, D]
            torch.cat([x, more.permute(2, 0, 1, 3).expand(number, -1, -1, -1, -1)], dim=-2)
            for x, more in ((key, extra_k), (value, extra_v))
        )
        if extra_bias is not None:
            extra = _gather(extra_bias.to(dtype).expand(*q.shape[:-1], -1), query_rows)
        if added is not None or extra is not None:
            added = key.new_zeros(1, dtype=dtype) if added is None else added
            extra = key.new_zeros(1, dtype=dtype) if extra is None else extra
            shape, number = query.shape[:-1], extra_k.shape[1]  # [T, N, B, t]
            added = torch.cat([added.expand(*shape, keys), extra.expand(*shape, number)], dim=-1)

    blind = None  # [T, N or 1, B, t or 1, 1] queries without any key, whose softmax has no value
    if added is not None and problem.key_mask is not None:
        blind = (added == float("-inf")).all(-1, keepdim=True)
        added = added.masked_fill(blind, 0)

    def finish(x: Tensor, none: float) -> Tensor:
        """[T, N, B, t, ...] -> [B, *spatial, N, ...], `none` for queries without any key."""
        return _scatter(x if blind is None else x.masked_fill(blind, none), cut)

    if explicit:
        scores = (query * scale @ key.mT).to(dtype)
        scores = scores if added is None else (scores + added if symbolic else scores.add_(added))
        out = finish(scores.softmax(dim=-1).to(value.dtype) @ value, 0)
        if not problem.return_lse:
            return out
        return out, finish(scores.logsumexp(dim=-1, keepdim=True), float("-inf")).squeeze(-1)

    # Dimensions over which the mask is constant go together: (N, B) without a bias, B alone with one. A mask that
    # differs between images is written out for every head.
    dim = 1 if added is None or (added.shape[1] == 1 and blind is None) else 0
    if added is not None:
        added = (added if dim == 1 else added.expand(-1, heads, -1, -1, -1)).flatten(dim, dim + 1)
    query, key, value = (x.flatten(dim, dim + 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale)
    out = out.unflatten(dim, (heads, batch) if dim == 1 else (out.shape[0] // heads, heads))
    return finish(out, 0)
