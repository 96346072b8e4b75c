"""Routed attention as batched attention of query regions against copies of the key regions that they attend to.

Where a region is attended to by several query regions, the gradients of its copies are added up in one fixed order.

On small maps it is attention over the whole map with a mask instead: the copies would be as large and the batch of
small products slower.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.geometry import Partition
from visattn.ops.routed.routing import cut, token_table

Axes = tuple[Partition, Partition]

# Maps of at most this many keys take the masked form.
_DENSE = 256


class _Take(torch.autograd.Function):
    """x [B, L, F], regions [B, n], their tokens [R, t] -> [B, n * t, F]: the tokens of the listed regions."""

    @staticmethod
    def forward(x: Tensor, listed: Tensor, table: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, _rows(listed, table, x.shape[1])).unflatten(0, (len(x), -1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.length = inputs[0].shape[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Add.apply(grad, *ctx.saved_tensors, ctx.length), None, None


class _Add(torch.autograd.Function):
    """Transpose of `_Take`: x [B, n * t, F] -> [B, L, F], the sums over all copies of a token."""

    @staticmethod
    def forward(x: Tensor, listed: Tensor, table: Tensor, length: int) -> Tensor:
        add = _add_by_row if x.device.type == "cpu" else _add_by_product
        return add(x, listed, table, length)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Take.apply(grad, *ctx.saved_tensors), None, None, None


def _rows(listed: Tensor, table: Tensor, length: int) -> Tensor:
    """Where the tokens of the regions [B, n] lie among those of all images."""
    first = torch.arange(len(listed), device=listed.device)[:, None] * length
    return (table[listed].flatten(1) + first).flatten()


def _add_by_row(x: Tensor, listed: Tensor, table: Tensor, length: int) -> Tensor:
    """The fast way, which has one order on a CPU only."""
    total = x.new_zeros(len(x) * length, x.shape[2], dtype=torch.promote_types(x.dtype, torch.float32))
    total.index_add_(0, _rows(listed, table, length), x.flatten(0, 1).to(total.dtype))
    return total.unflatten(0, (-1, length)).to(x.dtype)


def _add_by_product(x: Tensor, listed: Tensor, table: Tensor, length: int) -> Tensor:
    """A product with ones and zeros has one order everywhere."""
    regions = torch.arange(len(table), device=x.device)
    member = (listed[:, None] == regions[:, None]).to(x.dtype)  # [B, R, n]
    total = (member @ x.unflatten(1, (-1, table.shape[1])).flatten(2)).view(len(x), -1, x.shape[2])
    places = torch.arange(table.numel(), device=x.device)
    # A place outside the map stands for some token too, after the token's own place.
    slots = places.new_full((length,), len(places)).scatter_reduce_(0, table.flatten(), places, "amin")
    return total.index_select(1, slots)


def _regions(x: Tensor, axes: Axes) -> Tensor:
    """[B, H, W, N, D] -> [B, R, t, N, D]."""
    return cut(x, axes).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _join(x: Tensor, axes: Axes) -> Tensor:
    """Inverse of `_regions`."""
    (ra, sa, _), (rb, sb, _) = (axis.layout() for axis in axes)
    x = x.unflatten(2, (sa, sb)).unflatten(1, (ra, rb)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, : axes[0].length, : axes[1].length].contiguous()


def _listed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    q_axes: Axes,
    k_axes: Axes,
    weight: Tensor | None,
    mask_border: bool,
    scale: float,
) -> Tensor:
    """With copies of the listed regions; index and weight [B, R, topk]."""
    (batch, number, _), query = index.shape, _regions(q, q_axes)
    table = token_table(k_axes, q.device)
    partial = any(axis.length % axis.layout()[1] for axis in k_axes)
    mask = None
    if partial and mask_border:
        outside = table == k.shape[1] * k.shape[2]
        table = table.masked_fill(outside, 0)
        mask = torch.zeros_like(outside, dtype=q.dtype).masked_fill(outside, float("-inf"))
        mask = mask[index].flatten(2).flatten(0, 1)[:, None, None].expand(-1, -1, query.shape[2], -1)
    copies = []
    for x in (k, v):
        tokens = x.flatten(1, 2).flatten(2)
        if partial and not mask_border:
            tokens = F.pad(tokens, (0, 0, 0, 1))
        tokens = _Take.apply(tokens, index.flatten(1), table)
        if weight is not None:
            tokens = tokens * weight.flatten(1).repeat_interleave(table.shape[1], 1)[..., None].to(x.dtype)
        # [B * R, N, topk * t, D]
        copies.append(tokens.view(batch * number, -1, *x.shape[3:]).transpose(1, 2))
    query = query.flatten(0, 1).transpose(1, 2)
    out = F.scaled_dot_product_attention(query, *copies, attn_mask=mask, scale=scale)
    return _join(out.transpose(1, 2).unflatten(0, (batch, number)), q_axes)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    q_axes: Axes,
    k_axes: Axes,
    mask_border: bool,
    scale: float,
) -> Tensor:
    """With all keys and a mask."""
    size = [axis.length for axis in k_axes]
    if not mask_border:  # zeros outside the map take part
        size = [axis.layout()[0] * axis.layout()[1] for axis in k_axes]
        pads = (0, 0, 0, 0, 0, size[1] - k_axes[1].length, 0, size[0] - k_axes[0].length)
        k, v = (F.pad(x, pads) if any(pads) else x for x in (k, v))
    number = k_axes[0].layout()[0] * k_axes[1].layout()[0]
    # How often a query region lists a key region is a factor of exp(logits).
    listed = q.new_zeros(*index.shape[:3], number).scatter_add_(3, index, q.new_ones(()).expand(index.shape))
    queries, keys = (
        _region_of(axes, length, q.device)
        for axes, length in ((q_axes, [axis.length for axis in q_axes]), (k_axes, size))
    )
    mask = listed.log().index_select(3, keys).index_select(2, queries)
    query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])


def _region_of(axes: Axes, size: list[int], device: torch.device) -> Tensor:
    """The region of every token of a map of this size, row by row."""
    rows, columns = (torch.arange(n, device=device) // axis.layout()[1] for n, axis in zip(size, axes, strict=True))
    return (rows[:, None] * axes[1].layout()[0] + columns).flatten()


def routed_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    q_axes: Axes,
    k_axes: Axes,
    weight: Tensor | None,
    mask_border: bool,
    scale: float,
) -> Tensor:
    """See `visattn.ops.routed_attention`."""
    if weight is None and k.shape[1] * k.shape[2] <= _DENSE:
        return _dense(q, k, v, index, q_axes, k_axes, mask_border, scale)
    heads = index.shape[1]
    if heads > 1:  # every head is an image of its own
        q, k, v = (x.movedim(3, 1).flatten(0, 1)[:, :, :, None] for x in (q, k, v))
    weight = None if weight is None else weight.flatten(0, 1)
    out = _listed(q, k, v, index.flatten(0, 1), q_axes, k_axes, weight, mask_border, scale)
    return out.squeeze(3).unflatten(0, (-1, heads)).movedim(1, 3).contiguous() if heads > 1 else out
