"""Routed attention: for some query regions at a time, copy their queries, keys and values and attend.

A chunk's copies stay in a CPU core's cache. They are made again in the backward pass, so that only the inputs are kept
for it, and where a token was copied for several query regions, its gradients are added up in one fixed order.

On small maps it is attention over the whole map with a mask instead: the copies would be as large and the batch of
small products slower.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.geometry import Partition
from visattn.ops.routed.routing import Axes, region_of, token_table

# Maps of at most this many keys take the masked form. Copied numbers per chunk: those of keys and values together. A
# traced graph holds every chunk, and on an accelerator there is one.
_DENSE, _CHUNK, _CHUNK_TRACED = 256, 1 << 18, 1 << 24


class _Map:
    """A map of B images cut into regions, as rows of tokens; partial regions share one more token per image, zero."""

    def __init__(self, axes: Axes, images: int, device: torch.device) -> None:
        self.axes, self.images = axes, images
        self.length = axes[0].length * axes[1].length
        self.more = int(any(axis.length % axis.layout()[1] for axis in axes))
        self.table = token_table(axes, device)  # [R, t]
        self.first = torch.arange(images, device=device)[:, None, None] * (self.length + self.more)

    def rows(self, x: Tensor) -> Tensor:
        """[B, H, W, N, D] -> [B * (L + more), N * D]."""
        x = x.flatten(1, 2).flatten(2)
        return (F.pad(x, (0, 0, 0, 1)) if self.more else x).flatten(0, 1)

    def map(self, rows: Tensor, heads: int) -> Tensor:
        """Inverse of `rows`."""
        x = rows.unflatten(0, (self.images, -1))[:, : self.length]
        return x.reshape(self.images, self.axes[0].length, self.axes[1].length, heads, -1)

    def slots(self) -> Tensor:
        """[L] where each token lies among those of all regions [R * t]."""
        slots = torch.argsort(self.table.flatten(), stable=True)  # places outside the map come last
        return slots[: self.length]

    def join(self, regions: Tensor, heads: int) -> Tensor:
        """[B * R, t, N, D] -> [B, H, W, N, D]."""
        x = regions.flatten(2).flatten(0, 1)
        number = self.table.numel()
        rows = self.slots() + torch.arange(self.images, device=x.device)[:, None] * number
        x = x.index_select(0, rows.flatten())
        return x.view(self.images, self.axes[0].length, self.axes[1].length, heads, -1)


class _Call:
    """What the chunks of a call share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, index: Tensor, q_axes: Axes, k_axes: Axes, mask_border: bool
    ) -> None:
        self.heads, images = q.shape[3], len(index)
        self.q_map, self.k_map = (_Map(axes, images, q.device) for axes in (q_axes, k_axes))
        self.index = index.flatten(0, 1)  # [B * query regions, topk]
        self.q, self.k, self.v = self.q_map.rows(q), self.k_map.rows(k), self.k_map.rows(v)
        self.q_rows = (self.q_map.table + self.q_map.first).flatten(0, 1)  # [B * query regions, t]
        keys = self.k_map.table[self.index].unflatten(0, (images, -1)).flatten(2)
        self.k_rows = (keys + self.k_map.first).flatten(0, 1)  # [B * query regions, topk * t]
        self.mask = None
        if mask_border and self.k_map.more:
            outside = self.k_map.table == self.k_map.length
            self.mask = torch.zeros_like(outside, dtype=q.dtype).masked_fill(outside, float("-inf"))

    def chunks(self) -> list[slice]:
        """Slices of the query regions of all images."""
        number = len(self.index)
        copied = self.k_rows.shape[1] * (self.k.shape[1] + self.v.shape[1])
        size = _CHUNK_TRACED if torch.compiler.is_compiling() else _CHUNK
        step = max(1, size // copied) if self.q.device.type == "cpu" else max(1, number)
        return [slice(i, min(i + step, number)) for i in range(0, number, step)]

    def take(self, x: Tensor, rows: Tensor, part: slice) -> Tensor:
        """Rows of a map -> [regions of the part, N, tokens, D], a view of a copy."""
        rows = rows[part]
        return x.index_select(0, rows.flatten()).view(*rows.shape, self.heads, -1).transpose(1, 2)

    def take_mask(self, part: slice) -> Tensor | None:
        """[regions of the part, 1, 1, keys]"""
        return None if self.mask is None else self.mask[self.index[part]].flatten(1)[:, None, None]

    def factors(self, weight: Tensor, part: slice) -> Tensor:
        """[regions of the part, 1, keys, 1]"""
        return weight[part].repeat_interleave(self.k_map.table.shape[1], 1)[:, None, :, None].to(self.q.dtype)

    @staticmethod
    def lines(x: Tensor) -> Tensor:
        """[regions, N, tokens, D] -> [regions * tokens, N * D]."""
        return x.transpose(1, 2).flatten(2).flatten(0, 1)

    def add(self, rows: Tensor, part: slice, x: Tensor) -> None:
        """Add the keys of a part to the rows that they are copies of."""
        x = self.lines(x).to(rows.dtype)
        if rows.device.type == "cpu":
            rows.index_add_(0, self.k_rows[part].flatten(), x)
        else:
            rows += self.sum_by_product(x)

    def sum_by_product(self, x: Tensor) -> Tensor:
        """The sums of all parts' copies. Adding row by row has no fixed order on an accelerator, a product has."""
        regions, tokens = self.k_map.table.shape
        listed = self.index.view(self.k_map.images, 1, -1)
        member = (listed == torch.arange(regions, device=x.device)[:, None]).to(x.dtype)  # [B, R, listed]
        total = (member @ x.view(*member.shape[::2], -1)).view(len(member), regions * tokens, -1)
        total = total.index_select(1, self.k_map.slots())
        return F.pad(total, (0, 0, 0, self.k_map.more)).flatten(0, 1)


class _Listed(torch.autograd.Function):
    """The tokens of each query region attend to those listed for it; index and weight [B, R, topk]."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        weight: Tensor | None,
        q_axes: Axes,
        k_axes: Axes,
        mask_border: bool,
        scale: float,
    ) -> Tensor:
        call = _Call(q, k, v, index, q_axes, k_axes, mask_border)
        weight = None if weight is None else weight.flatten(0, 1)
        out = v.new_empty(*call.q_rows.shape, *v.shape[3:])
        for part in call.chunks():
            query, key, value = (
                call.take(x, rows, part)
                for x, rows in ((call.q, call.q_rows), (call.k, call.k_rows), (call.v, call.k_rows))
            )
            if weight is not None:
                factors = call.factors(weight, part)
                key, value = key * factors, value * factors
            mask = call.take_mask(part)
            if mask is not None:
                mask = mask.expand(-1, -1, query.shape[2], -1)
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
            out[part] = found.transpose(1, 2)
        return call.q_map.join(out, call.heads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.how = inputs[5:]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, index, weight = ctx.saved_tensors
        q_axes, k_axes, mask_border, scale = ctx.how
        call = _Call(q, k, v, index, q_axes, k_axes, mask_border)
        shape, weight = index.shape, None if weight is None else weight.flatten(0, 1)
        grad_rows = call.q_map.rows(grad_out)
        dtype = torch.promote_types(q.dtype, torch.float32)
        grad_q = q.new_empty(*call.q_rows.shape, *q.shape[3:])
        grad_k, grad_v = (torch.zeros_like(x, dtype=dtype) for x in (call.k, call.v))
        grad_weight = None if weight is None else torch.empty_like(weight)
        for part in call.chunks():
            # Matrices of each region and head lie apart: products would copy them every time otherwise.
            query, grad = (call.take(x, call.q_rows, part).contiguous() for x in (call.q, grad_rows))
            plain = [call.take(x, call.k_rows, part).contiguous() for x in (call.k, call.v)]
            query, mask = query * scale, call.take_mask(part)
            factors = None if weight is None else call.factors(weight, part)
            key, value = plain if weight is None else (x * factors for x in plain)
            logits = query @ key.mT
            weights = (logits if mask is None else logits + mask).to(dtype).softmax(dim=-1)
            # The derivative of softmax: weights * (grad - sum of weights * grad).
            grad_logits = (grad @ value.mT).to(dtype)
            grad_logits = torch.ops.aten._softmax_backward_data(grad_logits, weights, -1, dtype).to(q.dtype)
            grad_q[part] = (grad_logits @ key).transpose(1, 2) * scale
            grads = grad_logits.mT @ query, weights.to(q.dtype).mT @ grad
            if weight is not None:
                products = sum((g * x).sum((1, 3)) for g, x in zip(grads, plain, strict=True))
                grad_weight[part] = products.unflatten(1, (shape[2], -1)).sum(2).to(weight.dtype)
                grads = [g * factors for g in grads]
            call.add(grad_k, part, grads[0])
            call.add(grad_v, part, grads[1])
        return (
            call.q_map.join(grad_q, call.heads),
            call.k_map.map(grad_k.to(k.dtype), call.heads),
            call.k_map.map(grad_v.to(v.dtype), call.heads),
            None,
            None if weight is None else grad_weight.view(shape),
            *(None,) * 4,
        )


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
    rows, columns = k_axes
    if not mask_border:  # zeros outside the map take part
        more = [-axis.length % axis.layout()[1] for axis in k_axes]
        k, v = (F.pad(x, (0, 0, 0, 0, 0, more[1], 0, more[0])) if any(more) else x for x in (k, v))
        rows, columns = (Partition(axis.length + n, axis.window) for axis, n in zip(k_axes, more, strict=True))
    # How often a query region lists a key region is a factor of exp(logits).
    number = rows.layout()[0] * columns.layout()[0]
    listed = q.new_zeros(*index.shape[:3], number).scatter_add_(3, index, q.new_ones(()).expand(index.shape))
    queries, keys = region_of(q_axes, q.device), region_of((rows, columns), q.device)
    mask = listed.log().index_select(3, keys).index_select(2, queries)
    query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])


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
    out = _Listed.apply(q, k, v, index.flatten(0, 1), weight, q_axes, k_axes, mask_border, scale)
    return out.squeeze(3).unflatten(0, (-1, heads)).movedim(1, 3).contiguous() if heads > 1 else out
