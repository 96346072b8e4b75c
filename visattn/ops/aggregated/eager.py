"""Aggregated attention with channels before tokens, a few rows of the map at a time.

With tokens last, one row of the map after the other and `K // 2` zeros between rows, the neighbours of all tokens at
some displacement are one contiguous slice: their logits are a product and a sum over channels, without a copy of keys.
Pooled keys are ordinary products of matrices, and their position bias is read from a small table. Nothing of the size
of the logits outlives a chunk: the backward pass makes them again, and the only things kept for it are the inputs.

With symbolic sizes, and for log-sum-exps, there is a form without chunks.

Shapes: T places of a chunk of rows, zeros included; P pooled keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops import chunking
from visattn.ops.aggregated.cpb import PositionBias, position_table
from visattn.ops.cut import contiguous_copy
from visattn.ops.geometry import ceil_div, is_symbolic

if TYPE_CHECKING:
    from visattn.ops.aggregated import AggregatedProblem


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise x [B, N, D, T] along D; also returns the factor [B, N, 1, T] that did it."""
    factor = (x * x).sum(2, keepdim=True).clamp_min(1e-24).rsqrt()
    return x * factor, factor


def _unit_gradient(grad: Tensor, unit: Tensor, factor: Tensor) -> Tensor:
    """Differentiate `_unit`: the gradient [B, N, D, T] of x from that of its result."""
    return (grad - unit * (grad * unit).sum(2, keepdim=True)) * factor


class _Layout:
    """A map of H x W tokens as one line: rows of W tokens and `reach` zeros, and `reach` rows of zeros around them."""

    def __init__(self, size: Sequence[int], kernel_size: int) -> None:
        self.size, self.reach = size, kernel_size // 2
        self.pitch = size[1] + self.reach
        self.margin = self.reach * (self.pitch + 1)
        self.steps = range(-self.reach, self.reach + 1)

    def line(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Lay out a map [B, H, W, N, D] as [B, N, D, margin + H * pitch + margin]."""
        b, _, _, n, d = x.shape
        line = x.new_zeros(b, n, d, 2 * self.margin + self.size[0] * self.pitch, dtype=dtype)
        self.map(line[..., self.margin : line.shape[-1] - self.margin])[...] = x
        return line

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Lay out rows [B, r, W, N, D] as [B, N, D, r * pitch]."""
        x = x.permute(0, 3, 4, 1, 2).to(dtype)  # [B, N, D, r, W]
        return F.pad(x, (0, self.reach)).flatten(3)  # [B, N, D, r pitch]

    def map(self, rows: Tensor) -> Tensor:
        """Invert `rows`, [B, N, D, r * pitch] -> [B, r, W, N, D], a view."""
        rows = rows.unflatten(-1, (int(rows.shape[-1]) // self.pitch, self.pitch))
        return rows[..., : self.size[1]].permute(0, 3, 4, 1, 2)  # [B, r, W, N, D]

    def neighbours(self, line: Tensor, rows: slice) -> Iterator[Tensor]:
        """Yield views [B, N, D, T] of a line: the neighbours of each token of some rows, row by row of the window.

        Made when they are asked for: autograd does not let one be written to that is older than a change of the line.
        """
        length = (rows.stop - rows.start) * self.pitch
        for i in self.steps:
            for j in self.steps:
                start = self.margin + (rows.start + i) * self.pitch + j
                yield line[..., start : start + length]

    def outside(self, device: torch.device) -> Tensor:
        """Tell, as [K * K, H * pitch], whether a neighbour does not lie on the map."""
        step = torch.arange(-self.reach, self.reach + 1, device=device)[:, None]
        lengths = self.size[0], self.pitch
        places = (torch.arange(length, device=device) + step for length in lengths)  # [K, length]
        row, column = ((x < 0) | (x >= n) for x, n in zip(places, self.size, strict=True))
        outside = row[:, None, :, None] | column[None, :, None, :]  # [K, K, H, pitch]
        return outside.flatten(2).flatten(0, 1)  # [K K, H pitch]


class _Attention:
    """One call: what all chunks share, and the forward pass of a chunk: some images, some rows of the map.

    Its inputs are the problem's tensors, but the position table [N, U, V] for the perceptron's, and its sizes.
    """

    def __init__(self, *inputs: Any) -> None:
        q, pool_k, pool_v, scale, embedding, table, k, v, *local, axes, size, pooled, kernel = (
            inputs
        )
        dtype, self.pool = scale.dtype, pooled
        self.q, self.scale, self.embedding = q, scale[:, None, None], embedding[..., None]
        self.local_bias, self.tokens, self.token_bias = local
        self.bias = PositionBias(axes, size, self.pool, table)
        pools = (x.flatten(1, 2).permute(0, 2, 3, 1) for x in (pool_k, pool_v))  # [B, N, D, P]
        keys, self.pool_v = (x.to(dtype) for x in pools)
        self.pool_k, self.pool_factor = _unit(keys)
        self.slots = 0 if k is None else kernel**2
        self.layout = _Layout(size, kernel if self.slots else 1)
        count = math.prod(self.pool)
        if k is not None and v is not None:
            self.k, self.k_factor = _unit(self.layout.line(k, dtype))
            self.v = self.layout.line(v, dtype)
            outside = self.layout.outside(q.device)
            self.length = (count + self.slots - outside.sum(0)).to(dtype).log()
            hidden = torch.zeros_like(outside, dtype=dtype).masked_fill(outside, float("-inf"))
            self.hidden = hidden if local[0] is None else hidden + local[0][..., None]
        else:
            self.length = q.new_full((math.prod(size),), math.log(count), dtype=dtype)

    def chunks(self) -> list[tuple[slice, list[slice]]]:
        """Slice the rows of the map, and for each slice the batch."""
        b, h, n = self.q.shape[0], self.layout.size[0], int(self.q.shape[3])
        # A graph for any number of images cannot hold its parts.
        whole = is_symbolic(b) or torch.jit.is_tracing()
        row = n * self.layout.pitch * (self.slots + math.prod(self.pool))
        limit = chunking.chunk_size(self.q.device)
        # No more than MOST while a chunk is no larger than the queries: memory stays linear in tokens.
        if whole:
            limit = max(limit, h * row // chunking.MOST)
        else:
            limit = max(limit, min(b * h * row // chunking.MOST, self.q.numel()))
        r = ceil_div(h, ceil_div(h, max(1, limit // row)))
        images = max(1, limit // (row * r))
        batch = [slice(None)] if whole else chunking.slices(b, images)
        return [(part, batch) for part in chunking.slices(h, r)]

    def read_bias(self, rows: slice) -> Tensor:
        """Read the bias [N, P, T] of some rows."""
        bias = F.pad(self.bias.read(rows), (0, self.layout.reach))  # [N, PH, PW, r, pitch]
        return bias.flatten(3).flatten(1, 2)  # [N, P, T]

    def weights(self, images: slice, rows: slice, bias: Tensor) -> tuple[Tensor, ...]:
        """Compute unit queries, their factor, the queries that meet the keys, and the softmax [B, N, K * K + P, T]."""
        unit, factor = _unit(self.layout.rows(self.q[images, rows], self.scale.dtype))
        places = slice(rows.start * self.layout.pitch, rows.stop * self.layout.pitch)
        query = (unit + self.embedding) * (self.scale * self.length[places])
        logits = (self.pool_k[images].mT @ query).add_(bias)
        if self.slots:
            local = [(query * key).sum(2) for key in self.layout.neighbours(self.k[images], rows)]
            local = torch.stack(local, dim=2).add_(self.hidden[..., places])  # [B, N, K K, T]
            logits = torch.cat([local, logits], dim=2)
        return unit, factor, query, logits.softmax(2)

    def mixing(self, unit: Tensor, weights: Tensor) -> Tensor:
        """Compute what the values of neighbours are multiplied by, [B, N, K * K, T]."""
        local = weights[:, :, : self.slots]
        local = local if self.tokens is None else self.tokens.mT @ unit + local
        return local if self.token_bias is None else local + self.token_bias[..., None]

    def attend(self, images: slice, rows: slice, bias: Tensor) -> Tensor:
        """Attend from some rows of some images: [B, r, W, N, Dv]."""
        unit, _, _, weights = self.weights(images, rows, bias)
        out = self.pool_v[images] @ weights[:, :, self.slots :]
        if self.slots:
            mixing = self.mixing(unit, weights)[:, :, :, None]
            values = self.layout.neighbours(self.v[images], rows)
            for weight, value in zip(mixing.unbind(2), values, strict=True):
                out.addcmul_(weight, value)
        return self.layout.map(out)


class _Gradients(_Attention):
    """The backward pass of a call: gradients that chunks are added to, in operations that can be differentiated."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.grad_q = self.q.new_empty(self.q.shape)
        zeros = torch.zeros_like
        self.grad_pool_k, self.grad_pool_v = zeros(self.pool_k), zeros(self.pool_v)
        self.grad_scale, self.grad_embedding, self.grad_table = (zeros(x) for x in args[3:6])
        if self.slots:
            self.grad_k, self.grad_v = zeros(self.k), zeros(self.v)
        self.grads_local = [None if x is None else zeros(x) for x in args[8:11]]

    def add(self, images: slice, rows: slice, bias: Tensor, grad_out: Tensor) -> Tensor:
        """Add a chunk to all gradients but the table's; returns the gradient of `bias`."""
        grad_out = self.layout.rows(grad_out[images, rows], self.scale.dtype)
        unit, factor, query, weights = self.weights(images, rows, bias)
        grad = grad_mixing = self.pool_v[images].mT @ grad_out
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
        pitch = self.layout.pitch
        grad_query = grad_query * self.length[rows.start * pitch : rows.stop * pitch]
        self.grad_scale += (grad_query * (unit + self.embedding)).sum((0, 2, 3))
        grad_unit = grad_query * self.scale
        self.grad_embedding += grad_unit.sum((0, 3))
        grad_bias, grad_tokens, grad_token_bias = self.grads_local
        if grad_bias is not None:
            grad_bias += local.sum((0, 3))
        if grad_token_bias is not None:
            grad_token_bias += grad_mixing.sum((0, 3))
        if grad_tokens is not None and self.tokens is not None:
            grad_tokens += (unit @ grad_mixing.mT).sum(0)
            grad_unit = grad_unit + self.tokens @ grad_mixing
        self.grad_q[images, rows] = self.layout.map(_unit_gradient(grad_unit, unit, factor))
        return pooled.sum(0)

    def add_bias(self, rows: slice, grad: Tensor) -> None:
        """Add the gradient [N, P, T] of the bias of some rows to the table's."""
        shape = rows.stop - rows.start, self.layout.pitch
        grad = grad.unflatten(1, self.pool).unflatten(-1, shape)  # [N, PH, PW, r, pitch]
        self.grad_table += self.bias.add(rows, grad[..., : self.layout.size[1]])

    def all(self) -> tuple[Tensor | None, ...]:
        """Return them in the order of the arguments."""
        dtype, margin = self.q.dtype, self.layout.margin
        pool = (_unit_gradient(self.grad_pool_k, self.pool_k, self.pool_factor), self.grad_pool_v)
        pool = (x.permute(0, 3, 1, 2).unflatten(1, self.pool) for x in pool)  # [B, PH, PW, N, D]
        maps = ()
        if self.slots:
            lines = (_unit_gradient(self.grad_k, self.k, self.k_factor), self.grad_v)
            maps = (self.layout.map(x[..., margin : x.shape[-1] - margin]) for x in lines)
        grad_maps = [x.to(dtype) for x in maps] or (None, None)
        shared = (self.grad_scale, self.grad_embedding, self.grad_table)
        grads = (*(x.to(dtype) for x in pool), *shared, *grad_maps, *self.grads_local)
        return self.grad_q, *grads, *(None,) * 4


def _forward(*args: Any) -> Tensor:
    call = _Attention(*args)
    q, _, pool_v = args[:3]
    out = pool_v.new_empty(*q.shape[:-1], pool_v.shape[-1])
    for rows, batch in call.chunks():
        bias = call.read_bias(rows)
        for images in batch:
            out[images, rows] = call.attend(images, rows, bias)
    return out


class _AggregatedAttention(chunking.Recomputed):
    """`_forward`, keeping only its inputs for the backward pass."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _forward(*args)

    @staticmethod
    # pyrefly: ignore[bad-override]: as many gradients as forward has results
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        call = _Gradients(*ctx.saved_tensors, *ctx.how)
        for rows, batch in call.chunks():
            bias = call.read_bias(rows)
            grad = torch.zeros_like(bias)
            for images in batch:
                grad += call.add(images, rows, bias, grad_out)
            call.add_bias(rows, grad)
        return call.all()


def _attend_to_any_size(
    problem: AggregatedProblem, table: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with all logits at once, in operations that are the same for every size and write to nothing.

    S tokens; j is a place in the window, P the pooled keys.
    """
    dtype, size, reach = problem.dtype, problem.size, problem.kernel_size // 2

    def heads_first(x: Tensor) -> Tensor:
        """Copy [B, H, W, N, D] -> [B, N, S, D]."""
        x = x.to(dtype).permute(0, 3, 1, 2, 4)  # [B, N, H, W, D]
        return contiguous_copy(x).flatten(2, 3)  # [B, N, S, D]

    maps = problem.q, problem.pool_k
    unit, keys = (F.normalize(heads_first(x), dim=-1) for x in maps)  # [B, N, S or P, D]
    values = heads_first(problem.pool_v)
    length = unit.new_zeros(size) + math.prod(problem.pooled)  # [H, W]
    # Per place of the window where its rows and columns lie [H], [W], and whether that is on the map [S].
    places = []
    if problem.local_k is not None:
        axes = []
        for n in size:
            token = torch.arange(n, device=unit.device)
            at = [token + step for step in range(-reach, reach + 1)]
            axes.append([(x.clamp(0, n - 1), (x >= 0) & (x < n)) for x in at])
        for row, has_row in axes[0]:
            for column, has_column in axes[1]:
                there = has_row[:, None] & has_column  # [H, W]
                length = length + there
                places.append((row, column, there.flatten()))
    length = length.log().flatten()[:, None]  # [S, 1]
    scale = problem.scale[:, None, None] * length  # [N, S, 1]
    query = (unit + problem.query_embedding[:, None]) * scale  # [B, N, S, D]
    bias = PositionBias(problem.axes, size, problem.pooled, table).all()  # [N, S, P]
    pooled = query @ keys.mT + bias  # [B, N, S, P]
    if problem.local_k is None or problem.local_v is None:
        out, lse = pooled.softmax(-1) @ values, pooled.logsumexp(-1, keepdim=True)
    else:
        near = [
            x.index_select(1, row).index_select(2, column)
            for x in (problem.local_k, problem.local_v)
            for row, column, _ in places
        ]
        near = [heads_first(x) for x in near]  # [B, N, S, D], clamped to the map
        local = [(query * F.normalize(x, dim=-1)).sum(-1) for x in near[: len(places)]]
        local = torch.stack(local, -1)  # [B, N, S, j]
        there = torch.stack([there for *_, there in places], -1)  # [S, j]
        if problem.local_bias is not None:
            local = local + problem.local_bias[:, None]
        local = local.masked_fill(~there, float("-inf"))
        m_i = torch.maximum(local.amax(-1, keepdim=True), pooled.amax(-1, keepdim=True))
        local, pooled = (local - m_i).exp(), (pooled - m_i).exp()
        l_i = local.sum(-1, keepdim=True) + pooled.sum(-1, keepdim=True)
        lse = m_i + l_i.log()  # [B, N, S, 1]
        out, mixing = pooled @ values / l_i, local / l_i
        if problem.tokens is not None:
            mixing = mixing + unit @ problem.tokens
        if problem.token_bias is not None:
            mixing = mixing + problem.token_bias[:, None]
        for weight, value in zip((mixing * there).unbind(-1), near[len(places) :], strict=True):
            out = out + weight[..., None] * value
    out, lse = (
        contiguous_copy(x.unflatten(2, size).permute(0, 2, 3, 1, 4))  # [B, H, W, N, Dv or 1]
        for x in (out.to(problem.v.dtype), lse)
    )
    return (out, lse.squeeze(-1)) if problem.return_lse else out


def attend(problem: AggregatedProblem) -> Tensor | tuple[Tensor, Tensor]:
    """See `visattn.ops.aggregated_attention`."""
    table = position_table(problem)
    if problem.return_lse or is_symbolic(*problem.size, *problem.pooled):
        return _attend_to_any_size(problem, table)
    pooled = (problem.q, problem.pool_k, problem.pool_v)
    shared = (problem.scale, problem.query_embedding, table)
    local = (problem.local_k, problem.local_v, problem.local_bias)
    tensors = (*pooled, *shared, *local, problem.tokens, problem.token_bias)
    run = _AggregatedAttention.apply if problem.trains() else _forward
    return run(*tensors, problem.axes, problem.size, problem.pooled, problem.kernel_size)
