"""Aggregated attention with channels before tokens, a few rows of the map at a time.

With tokens last, one row of the map after the other and `K // 2` zeros between rows, the neighbours of all tokens at
some displacement are one contiguous slice: their logits are a product and a sum over channels, without a copy of keys.
Pooled keys are ordinary products of matrices, and their position bias is read from a small table. Nothing of the size
of the logits outlives a chunk: the backward pass makes them again, and the only things kept for it are the inputs.

Shapes: T places of a chunk of rows, zeros included; P pooled keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.aggregated.cpb import CHUNKS, PositionBias, chunk_size, position_table
from visattn.ops.geometry import Pooled


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, D, T] normalised along D, and the factor [B, N, 1, T] that did it."""
    factor = (x * x).sum(2, keepdim=True).clamp_min(1e-24).rsqrt()
    return x * factor, factor


def _unit_gradient(grad: Tensor, unit: Tensor, factor: Tensor) -> Tensor:
    return (grad - unit * (grad * unit).sum(2, keepdim=True)) * factor


class _Layout:
    """A map of H x W tokens as one line: rows of W tokens and `reach` zeros, and `reach` rows of zeros around them."""

    def __init__(self, size: tuple[int, int], kernel_size: int) -> None:
        self.size, self.reach = size, kernel_size // 2
        self.pitch = size[1] + self.reach
        self.margin = self.reach * (self.pitch + 1)
        self.steps = range(-self.reach, self.reach + 1)

    def line(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, H, W, N, D] -> [B, N, D, margin + H * pitch + margin]."""
        b, _, _, n, d = x.shape
        line = x.new_zeros(b, n, d, 2 * self.margin + self.size[0] * self.pitch, dtype=dtype)
        self.map(line[..., self.margin : line.shape[-1] - self.margin])[...] = x
        return line

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, r, W, N, D] -> [B, N, D, r * pitch]."""
        return F.pad(x.permute(0, 3, 4, 1, 2).to(dtype), (0, self.reach)).flatten(3)

    def map(self, rows: Tensor) -> Tensor:
        """Inverse of `rows`, a view."""
        return rows.unflatten(-1, (-1, self.pitch))[..., : self.size[1]].permute(0, 3, 4, 1, 2)

    def neighbours(self, line: Tensor, rows: slice) -> Iterator[Tensor]:
        """Views [B, N, D, T] of a line: the neighbours of each token of some rows, row by row of the window.

        Made when they are asked for: autograd does not let one be written to that is older than a change of the line.
        """
        length = (rows.stop - rows.start) * self.pitch
        for i in self.steps:
            for j in self.steps:
                start = self.margin + (rows.start + i) * self.pitch + j
                yield line[..., start : start + length]

    def outside(self, device: torch.device) -> Tensor:
        """[K * K, H * pitch] whether a neighbour does not lie on the map."""
        step = torch.arange(-self.reach, self.reach + 1, device=device)[:, None]
        places = (torch.arange(length, device=device) + step for length in (self.size[0], self.pitch))
        row, column = ((x < 0) | (x >= n) for x, n in zip(places, self.size, strict=True))
        return (row[:, None, :, None] | column[None, :, None, :]).flatten(2).flatten(0, 1)


class _Attention:
    """One call: what all chunks share, and the forward pass of a chunk: some images, some rows of the map."""

    def __init__(
        self,
        q: Tensor,
        pool_k: Tensor,
        pool_v: Tensor,
        scale: Tensor,
        embedding: Tensor,
        table: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        local_bias: Tensor | None,
        tokens: Tensor | None,
        token_bias: Tensor | None,
        axes: tuple[Pooled, Pooled],
        kernel_size: int,
    ) -> None:
        dtype, size, self.pool = scale.dtype, (q.shape[1], q.shape[2]), (pool_k.shape[1], pool_k.shape[2])
        self.q, self.scale, self.embedding = q, scale[:, None, None], embedding[..., None]
        self.local_bias, self.tokens, self.token_bias = local_bias, tokens, token_bias
        self.bias = PositionBias(axes, size, self.pool, table)
        keys, self.pool_v = (x.flatten(1, 2).permute(0, 2, 3, 1).to(dtype) for x in (pool_k, pool_v))  # [B, N, D, P]
        self.pool_k, self.pool_factor = _unit(keys)
        self.slots = 0 if k is None else kernel_size**2
        self.layout = _Layout(size, kernel_size if self.slots else 1)
        count = math.prod(self.pool)
        if self.slots:
            self.k, self.k_factor = _unit(self.layout.line(k, dtype))
            self.v = self.layout.line(v, dtype)
            outside = self.layout.outside(q.device)
            self.length = (count + self.slots - outside.sum(0)).to(dtype).log()
            hidden = torch.zeros_like(outside, dtype=dtype).masked_fill(outside, float("-inf"))
            self.hidden = hidden if local_bias is None else hidden + local_bias[..., None]
        else:
            self.length = q.new_full((math.prod(size),), math.log(count), dtype=dtype)

    def chunks(self) -> list[tuple[slice, list[slice]]]:
        """Rows of the map, and for each the parts of the batch."""
        b, h, _, n, _ = self.q.shape
        row = n * self.layout.pitch * (self.slots + self.pool_k.shape[-1])
        # No more than CHUNKS while a chunk is no larger than the queries: memory stays linear in tokens.
        limit = max(chunk_size(self.q.device), min(b * h * row // CHUNKS, self.q.numel()))
        r = -(-h // -(-h // max(1, limit // row)))
        images = max(1, limit // (row * r))
        batch = [slice(i, min(i + images, b)) for i in range(0, b, images)]
        return [(slice(i, min(i + r, h)), batch) for i in range(0, h, r)]

    def read_bias(self, rows: slice) -> Tensor:
        """[N, P, T]"""
        return F.pad(self.bias.read(rows), (0, self.layout.reach)).flatten(3).flatten(1, 2)

    def weights(self, images: slice, rows: slice, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Unit queries, their factor, the queries that meet the keys, and the softmax [B, N, K * K + P, T]."""
        unit, factor = _unit(self.layout.rows(self.q[images, rows], self.scale.dtype))
        places = slice(rows.start * self.layout.pitch, rows.stop * self.layout.pitch)
        query = (unit + self.embedding) * (self.scale * self.length[places])
        logits = (self.pool_k[images].mT @ query).add_(bias)
        if self.slots:
            local = [(query * key).sum(2) for key in self.layout.neighbours(self.k[images], rows)]
            logits = torch.cat([torch.stack(local, dim=2).add_(self.hidden[..., places]), logits], dim=2)
        return unit, factor, query, logits.softmax(2)

    def mixing(self, unit: Tensor, weights: Tensor) -> Tensor:
        """What the values of neighbours are multiplied by, [B, N, K * K, T]."""
        local = weights[:, :, : self.slots]
        local = local if self.tokens is None else self.tokens.mT @ unit + local
        return local if self.token_bias is None else local + self.token_bias[..., None]

    def attend(self, images: slice, rows: slice, bias: Tensor) -> Tensor:
        """[B, r, W, N, Dv]"""
        unit, _, _, weights = self.weights(images, rows, bias)
        out = self.pool_v[images] @ weights[:, :, self.slots :]
        if self.slots:
            mixing = self.mixing(unit, weights)[:, :, :, None]
            for weight, value in zip(mixing.unbind(2), self.layout.neighbours(self.v[images], rows), strict=True):
                out.addcmul_(weight, value)
        return self.layout.map(out)


class _Gradients(_Attention):
    """The backward pass of a call: gradients that chunks are added to, in operations that can be differentiated."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.grad_q = self.q.new_empty(self.q.shape)
        self.grad_pool_k, self.grad_pool_v = torch.zeros_like(self.pool_k), torch.zeros_like(self.pool_v)
        self.grad_scale, self.grad_embedding = self.scale.new_zeros(len(self.scale)), torch.zeros_like(args[4])
        self.grad_table = torch.zeros_like(self.bias.table)
        if self.slots:
            self.grad_k, self.grad_v = torch.zeros_like(self.k), torch.zeros_like(self.v)
        given = (self.local_bias, self.tokens, self.token_bias)
        self.grads_local = [None if x is None else torch.zeros_like(x) for x in given]

    def add(self, images: slice, rows: slice, bias: Tensor, grad_out: Tensor) -> Tensor:
        """Adds a chunk to all gradients but the table's; returns the gradient of `bias`."""
        grad_out = self.layout.rows(grad_out[images, rows], self.scale.dtype)
        unit, factor, query, weights = self.weights(images, rows, bias)
        grad = self.pool_v[images].mT @ grad_out
        if self.slots:
            values = self.layout.neighbours(self.v[images], rows)
            grad_mixing = torch.stack([(grad_out * value).sum(2) for value in values], dim=2)
            grad = torch.cat([grad_mixing, grad], dim=2)
            mixing = self.mixing(unit, weights)[:, :, :, None]
            lines = self.layout.neighbours(self.grad_v[images], rows)
            for line, weight in zip(lines, mixing.unbind(2), strict=True):
                line.addcmul_(weight, grad_out)
        # The derivative of softmax: weights * (grad - sum of weights * grad).
        grad = torch.ops.aten._softmax_backward_data(grad, weights, 2, weights.dtype)
        local, pooled = grad[:, :, : self.slots], grad[:, :, self.slots :]
        self.grad_pool_k[images] += query @ pooled.mT
        self.grad_pool_v[images] += grad_out @ weights[:, :, self.slots :].mT
        grad_query = self.pool_k[images] @ pooled
        if self.slots:
            keys, lines = (self.layout.neighbours(x[images], rows) for x in (self.k, self.grad_k))
            for key, line, part in zip(keys, lines, local[:, :, :, None].unbind(2), strict=True):
                grad_query.addcmul_(part, key)
                line.addcmul_(part, query)
        grad_query = grad_query * self.length[rows.start * self.layout.pitch : rows.stop * self.layout.pitch]
        self.grad_scale += (grad_query * (unit + self.embedding)).sum((0, 2, 3))
        grad_unit = grad_query * self.scale
        self.grad_embedding += grad_unit.sum((0, 3))
        grad_bias, grad_tokens, grad_token_bias = self.grads_local
        if grad_bias is not None:
            grad_bias += local.sum((0, 3))
        if grad_token_bias is not None:
            grad_token_bias += grad_mixing.sum((0, 3))
        if grad_tokens is not None:
            grad_tokens += (unit @ grad_mixing.mT).sum(0)
            grad_unit = grad_unit + self.tokens @ grad_mixing
        self.grad_q[images, rows] = self.layout.map(_unit_gradient(grad_unit, unit, factor))
        return pooled.sum(0)

    def add_bias(self, rows: slice, grad: Tensor) -> None:
        """Adds the gradient [N, P, T] of the bias of some rows to the table's."""
        grad = grad.unflatten(1, self.pool).unflatten(-1, (-1, self.layout.pitch))
        self.grad_table += self.bias.add(rows, grad[..., : self.layout.size[1]])

    def all(self) -> tuple[Tensor | None, ...]:
        """In the order of the arguments."""
        dtype, margin = self.q.dtype, self.layout.margin
        pool = (_unit_gradient(self.grad_pool_k, self.pool_k, self.pool_factor), self.grad_pool_v)
        grad_pool = (x.permute(0, 3, 1, 2).unflatten(1, self.pool).to(dtype) for x in pool)
        grad_maps = (None, None)
        if self.slots:
            lines = (_unit_gradient(self.grad_k, self.k, self.k_factor), self.grad_v)
            grad_maps = (self.layout.map(x[..., margin : x.shape[-1] - margin]).to(dtype) for x in lines)
        shared = (self.grad_scale, self.grad_embedding, self.grad_table)
        return (self.grad_q, *grad_pool, *shared, *grad_maps, *self.grads_local, None, None)


def _forward(*args: Any) -> Tensor:
    call = _Attention(*args)
    q, _, pool_v = args[:3]
    out = pool_v.new_empty(*q.shape[:-1], pool_v.shape[-1])
    for rows, batch in call.chunks():
        bias = call.read_bias(rows)
        for images in batch:
            out[images, rows] = call.attend(images, rows, bias)
    return out


class _AggregatedAttention(torch.autograd.Function):
    """`_forward`, keeping only its inputs for the backward pass."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:-2])
        ctx.how = inputs[-2:]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        call = _Gradients(*ctx.saved_tensors, *ctx.how)
        for rows, batch in call.chunks():
            bias = call.read_bias(rows)
            grad = torch.zeros_like(bias)
            for images in batch:
                grad += call.add(images, rows, bias, grad_out)
            call.add_bias(rows, grad)
        return call.all()


def aggregated_eager(
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
    table = position_table(axes, pretrain_size, cpb)
    tensors = (q, pool_k, pool_v, scale, query_embedding, table, k, v, local_bias, tokens, token_bias)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    run = _AggregatedAttention.apply if trains else _forward
    return run(*tensors, axes, kernel_size)
