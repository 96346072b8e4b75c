"""Routed attention: for some query regions at a time, copy their queries, keys and values and attend.

A chunk's copies stay in a CPU core's cache. They are made again in the backward pass, so that only the inputs are kept
for it, and where a token was copied for several query regions, its gradients are added up in one fixed order.

On small maps it is attention over the whole map with a mask instead: the copies would be as large and the batch of
small products slower.

With symbolic sizes, and for log-sum-exps, all regions are copied at once, each with all its slots, and what a slot does
not hold is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops import chunking
from visattn.ops.cut import contiguous_copy, cut_blocks, join_blocks
from visattn.ops.geometry import Partition, is_symbolic
from visattn.ops.routed.routing import Axes, choose, region_of, token_table

if TYPE_CHECKING:
    from visattn.ops.routed import BilevelProblem, RoutedProblem


class _Map:
    """A map of B images cut into regions, as rows of tokens; partial regions share one more token per image, zero."""

    def __init__(self, axes: Axes, images: int, device: torch.device) -> None:
        self.axes, self.images = axes, images
        self.length = axes[0].length * axes[1].length
        self.more = int(any(axis.length % axis.layout()[1] for axis in axes))
        self.table = token_table(axes, device)  # [R, t]
        self.first = torch.arange(images, device=device)[:, None, None] * (self.length + self.more)

    def rows(self, x: Tensor) -> Tensor:
        """Lay [B, H, W, N, D] out as [B * (L + more), N * D]."""
        x = x.flatten(1, 2).flatten(2)  # [B, L, N D]
        rows = F.pad(x, (0, 0, 0, 1)) if self.more else x  # [B, L + more, N D]
        return rows.flatten(0, 1)  # [B (L + more), N D]

    def map(self, rows: Tensor, heads: int) -> Tensor:
        """Undo `rows`: [B * (L + more), N * D] -> [B, H, W, N, D]."""
        x = rows.view(self.images, self.length + self.more, rows.shape[1])[:, : self.length]
        size = [axis.length for axis in self.axes]
        return x.reshape(self.images, *size, heads, rows.shape[1] // heads)  # [B, H, W, N, D]

    def slots(self) -> Tensor:
        """Find where each token lies among those of all regions [R * t]: [L]."""
        (region_a, rank_a), (region_b, rank_b) = (a.place(self.table.device) for a in self.axes)
        (_, sa, _), (rb, sb, _) = (axis.layout() for axis in self.axes)
        rows, columns = region_a * (rb * sa * sb) + rank_a * sb, region_b * (sa * sb) + rank_b
        return (rows[:, None] + columns).flatten()  # [L]

    def join(self, regions: Tensor) -> Tensor:
        """Join [B * R, t, N, D] -> [B, H, W, N, D]."""
        number, head = self.table.numel(), regions.shape[2:]
        rows = self.slots() + torch.arange(self.images, device=regions.device)[:, None] * number
        x = regions.flatten(2).flatten(0, 1).index_select(0, rows.flatten())  # [B L, N D]
        return x.view(self.images, *(axis.length for axis in self.axes), *head)  # [B, H, W, N, D]


class _Call:
    """What the chunks of a call share; index and weight [B, R, topk], and the axes of queries and of keys."""

    def __init__(self, *inputs: Any) -> None:
        q, k, v, index, weight, q_axes, k_axes, mask_border, self.scale = inputs
        self.heads, images = q.shape[3], q.shape[0]
        self.q_map, self.k_map = (_Map(axes, images, q.device) for axes in (q_axes, k_axes))
        self.index = index.flatten(0, 1)  # [B * query regions, topk]
        self.weight = None if weight is None else weight.flatten(0, 1)  # [B * query regions, topk]
        self.q, self.k, self.v = self.q_map.rows(q), self.k_map.rows(k), self.k_map.rows(v)
        self.q_rows = (self.q_map.table + self.q_map.first).flatten(0, 1)  # [B * query regions, t]
        keys = self.k_map.table[index].flatten(2)  # [B, query regions, topk * t]
        self.k_rows = (keys + self.k_map.first).flatten(0, 1)  # [B * query regions, topk * t]
        self.mask = None
        if mask_border and self.k_map.more:
            outside = self.k_map.table == self.k_map.length
            self.mask = torch.zeros_like(outside, dtype=q.dtype).masked_fill(outside, float("-inf"))

    def chunks(self) -> list[slice]:
        """Slice the query regions of all images; one slice where their number is not known."""
        number = self.index.shape[0]
        if is_symbolic(number) or torch.jit.is_tracing():
            return [slice(None)]
        copied = self.k_rows.shape[1] * (self.k.shape[1] + self.v.shape[1])
        size = chunking.TRACED_COPIES if torch.compiler.is_compiling() else chunking.CHUNK
        step = max(1, size // copied) if self.q.device.type == "cpu" else max(1, number)
        return chunking.slices(number, step)

    def take(self, x: Tensor, rows: Tensor, part: slice) -> Tensor:
        """Copy rows of a map [., N * D]: [regions of the part, N, tokens, D], a view of a copy."""
        rows = rows[part]
        copy, dim = x.index_select(0, rows.flatten()), x.shape[1] // self.heads
        return copy.view(*rows.shape, self.heads, dim).transpose(1, 2)  # [regions, N, tokens, D]

    def take_mask(self, part: slice) -> Tensor | None:
        """Read the mask of the listed keys, [regions of the part, 1, 1, keys]."""
        if self.mask is None:
            return None
        return self.mask[self.index[part]].flatten(1)[:, None, None]  # [regions, 1, 1, keys]

    def factors(self, part: slice) -> Tensor | None:
        """Repeat the factors of regions for their keys: [regions of the part, 1, keys, 1]."""
        if self.weight is None:
            return None
        keys = self.k_map.table.shape[1]
        factors = self.weight[part].repeat_interleave(keys, 1)  # [regions, topk keys]
        return factors[:, None, :, None].to(self.q.dtype)  # [regions, 1, keys, 1]

    @staticmethod
    def lines(x: Tensor) -> Tensor:
        """Lay [regions, N, tokens, D] out as [regions * tokens, N * D]."""
        return x.transpose(1, 2).flatten(2).flatten(0, 1)  # [regions tokens, N D]

    def add(self, rows: Tensor, part: slice, x: Tensor) -> None:
        """Add the keys of a part to the rows that they are copies of."""
        x = self.lines(x).to(rows.dtype)
        if rows.device.type == "cpu":
            rows.index_add_(0, self.k_rows[part].flatten(), x)
        else:
            rows += self.sum_by_product(x)

    def sum_by_product(self, x: Tensor) -> Tensor:
        """Sum the copies of all parts. Adding row by row has no fixed order on an accelerator, a product has."""
        (regions, tokens), images = self.k_map.table.shape, self.k_map.images
        listed = self.q_map.table.shape[0] * self.index.shape[1]
        index = self.index.view(images, 1, listed)  # [B, 1, listed]
        region = torch.arange(regions, device=x.device)[:, None]  # [R, 1]
        total = (index == region).to(x.dtype) @ x.view(images, listed, tokens * x.shape[1])
        total = total.view(images, regions * tokens, x.shape[1])  # [B, R t, N D]
        total = total.index_select(1, self.k_map.slots())  # [B, L, N D]
        return F.pad(total, (0, 0, 0, self.k_map.more)).flatten(0, 1)  # [B (L + more), N D]


class _Listed(chunking.Recomputed):
    """The tokens of each query region attend to those listed for it; index and weight [B, R, topk]."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        call = _Call(*inputs)
        out = call.v.new_empty(*call.q_rows.shape, *inputs[2].shape[3:])  # [B R, t, N, Dv]
        for part in call.chunks():
            query = call.take(call.q, call.q_rows, part)  # [regions, N, t, D]
            key, value = (call.take(x, call.k_rows, part) for x in (call.k, call.v))
            mask, factors = call.take_mask(part), call.factors(part)
            if factors is not None:
                key, value = key * factors, value * factors
            if mask is not None:
                mask = mask.expand(-1, -1, query.shape[2], -1)
            found = F.scaled_dot_product_attention(query, key, value, mask, scale=call.scale)
            out[part] = found.transpose(1, 2)  # [regions, t, N, Dv]
        return call.q_map.join(out)

    @staticmethod
    # pyrefly: ignore[bad-override]: as many gradients as forward has results
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        call, (q, k, v, index, _) = _Call(*ctx.saved_tensors, *ctx.how), ctx.saved_tensors
        topk, keys = index.shape[2], call.k_map.table.shape[1]
        grad_rows, dtype = call.q_map.rows(grad_out), torch.promote_types(q.dtype, torch.float32)
        grad_q = q.new_empty(*call.q_rows.shape, *q.shape[3:])  # [B R, t, N, D]
        grad_k, grad_v = (torch.zeros_like(x, dtype=dtype) for x in (call.k, call.v))
        grad_weight = None if call.weight is None else torch.empty_like(call.weight)
        for part in call.chunks():
            # Matrices of each region and head lie apart: products would copy them every time otherwise.
            copies = (call.take(x, call.q_rows, part) for x in (call.q, grad_rows))
            query, grad = (x.contiguous() for x in copies)  # [regions, N, t, D]
            plain = [call.take(x, call.k_rows, part).contiguous() for x in (call.k, call.v)]
            query, mask, factors = query * call.scale, call.take_mask(part), call.factors(part)
            key, value = plain if factors is None else (x * factors for x in plain)
            logits = query @ key.mT  # [regions, N, t, keys]
            weights = (logits if mask is None else logits + mask).to(dtype).softmax(dim=-1)
            # The derivative of softmax: weights * (grad - sum of weights * grad).
            grads = (grad @ value.mT).to(dtype)
            grads = torch.ops.aten._softmax_backward_data(grads, weights, -1, dtype).to(q.dtype)
            grad_q[part] = (grads @ key).transpose(1, 2) * call.scale  # [regions, t, N, D]
            of_key, of_value = grads.mT @ query, weights.to(q.dtype).mT @ grad
            if factors is not None and grad_weight is not None:
                products = (of_key * plain[0]).sum((1, 3)) + (of_value * plain[1]).sum((1, 3))
                products = products.unflatten(1, (topk, keys)).sum(2)  # [regions, topk]
                grad_weight[part] = products.to(grad_weight.dtype)
                of_key, of_value = of_key * factors, of_value * factors
            call.add(grad_k, part, of_key)
            call.add(grad_v, part, of_value)
        grad_k = call.k_map.map(grad_k.to(k.dtype), call.heads)
        grad_v = call.k_map.map(grad_v.to(v.dtype), call.heads)
        grad_weight = None if grad_weight is None else grad_weight.view(index.shape)
        return call.q_map.join(grad_q), grad_k, grad_v, None, grad_weight, *(None,) * 4


def _dense(problem: RoutedProblem) -> Tensor:
    """Attend to all keys with a mask."""
    q, k, v, index, k_axes = problem.q, problem.k, problem.v, problem.index, problem.k_axes
    rows, columns = k_axes
    if not problem.mask_border:  # zeros outside the map take part
        more = [-axis.length % axis.layout()[1] for axis in k_axes]
        k, v = (F.pad(x, (0, 0, 0, 0, 0, more[1], 0, more[0])) if any(more) else x for x in (k, v))
        full = zip(k_axes, more, strict=True)
        rows, columns = (Partition(axis.length + n, axis.window) for axis, n in full)
    # How often a query region lists a key region is a factor of exp(logits).
    number = rows.layout()[0] * columns.layout()[0]
    ones = q.new_ones(()).expand(index.shape)
    listed = q.new_zeros(*index.shape[:3], number).scatter_add(3, index, ones)
    queries, keys = region_of(problem.q_axes, q.device), region_of((rows, columns), q.device)
    mask = listed.log().index_select(3, keys).index_select(2, queries)  # [B, 1 or N, H W, keys]
    query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))  # [B, N, tokens, D]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=problem.scale)
    return out.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])  # [B, H, W, N, Dv]


class _Cut(NamedTuple):
    """An axis of `length` tokens cut into `number` regions of `slots` places, of which the last may be empty."""

    length: int
    number: int
    slots: int

    def places(self, device: torch.device) -> Tensor:
        """Number the places of regions, [number, slots]; those from `length` on hold no token."""
        return torch.arange(self.number * self.slots, device=device).view(self.number, self.slots)


def _regions(x: Tensor, cut: list[_Cut]) -> Tensor:
    """Cut [B, H, W, N, D] -> [B, N, R, t, D], zero where there is no token."""
    x = cut_blocks(x, [c.places(x.device) for c in cut]).flatten(1, 2).transpose(1, 2)
    return contiguous_copy(x)  # [B, N, R, t, D]


def _tokens(cut: list[_Cut], device: torch.device) -> Tensor:
    """Tell which places of regions hold a token, [R, t]."""
    rows, columns = (c.places(device) < c.length for c in cut)
    return (rows[:, None, :, None] & columns[:, None]).flatten(2).flatten(0, 1)  # [R, t]


def _attend_regions(
    qkv: Sequence[Tensor], index: Tensor, weight: Tensor | None, takes_part: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from [B, N, R, t, D] to keys [B, N, Rk, u, D] of listed regions, those that take part [Rk, u].

    Also returns the log-sum-exps [B, N, R, t, 1].
    """
    query, key, value = qkv
    image = torch.arange(query.shape[0], device=query.device)[:, None, None, None]
    head = torch.arange(query.shape[1], device=query.device)[:, None, None]
    keys, values = (x[image, head, index] for x in (key, value))  # [B, N, R, topk, u, D]
    if weight is not None:
        factor = weight.to(query.dtype)[..., None, None]  # [B, 1 or N, R, topk, 1, 1]
        keys, values = keys * factor, values * factor  # [B, N, R, topk, u, D]
    hidden = ~takes_part[index].flatten(3)[..., None, :]  # [B, 1 or N, R, 1, topk u]
    scores = (query * scale) @ keys.flatten(3, 4).mT  # [B, N, R, t, topk u]
    scores = scores.to(torch.promote_types(query.dtype, torch.float32))
    scores = scores.masked_fill(hidden, float("-inf"))
    out = scores.softmax(-1).to(value.dtype) @ values.flatten(3, 4)  # [B, N, R, t, Dv]
    return out, scores.logsumexp(-1, keepdim=True)


def _joined(
    out: Tensor, lse: Tensor, cut: list[_Cut], return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Join what `_attend_regions` found to maps [B, H, W, N, Dv] and, if they are wanted, [B, H, W, N]."""
    if not return_lse:
        return _join_regions(out, cut)
    return _join_regions(out, cut), _join_regions(lse, cut).squeeze(-1)


def _join_regions(x: Tensor, cut: list[_Cut]) -> Tensor:
    """Undo `_regions`: [B, N, R, t, D] -> [B, H, W, N, D]."""
    rows, columns = cut
    x = x.transpose(1, 2).unflatten(1, (rows.number, columns.number))  # [B, rows, columns, N, t, D]
    return join_blocks(x, (rows.slots, columns.slots), (rows.length, columns.length))


def _whole(problem: RoutedProblem) -> Tensor | tuple[Tensor, Tensor]:
    """Attend in one go, in operations that do not depend on sizes."""
    axes = (problem.q_axes, problem.k_axes)
    q_cut, k_cut = ([_Cut(axis.length, *axis.layout()[:2]) for axis in part] for part in axes)
    takes_part = _tokens(k_cut, problem.q.device)
    takes_part = takes_part if problem.mask_border else torch.ones_like(takes_part)
    qkv = _regions(problem.q, q_cut), _regions(problem.k, k_cut), _regions(problem.v, k_cut)
    found = _attend_regions(qkv, problem.index, problem.weight, takes_part, problem.scale)
    return _joined(*found, q_cut, problem.return_lse)


def attend_bilevel(problem: BilevelProblem) -> Tensor | tuple[Tensor, Tensor]:
    """See `visattn.ops.bilevel_routing_attention`, in operations that do not depend on sizes.

    There are always as many regions as there can be, on small maps some of them empty; these are never taken.

    Raises:
        NotImplementedError: Pooled keys.
    """
    if problem.kv_pool != "none":
        raise NotImplementedError(
            f"bilevel_routing_attention has no form for every size with kv_pool {problem.kv_pool!r}: whether regions "
            "fill the map, and how many keys a pooled one has, depends on it; try kv_pool 'none' or a fixed size"
        )
    is_mask = problem.rule == "mask"
    windows = [axis.window for axis in problem.axes]
    numbers = [n if is_mask else 2 * n - 1 for n in problem.n_win]
    cut = [_Cut(*c) for c in zip(problem.size, numbers, windows, strict=True)]
    qkv = [_regions(x, cut) for x in (problem.q, problem.k, problem.v)]  # [B, N, R, t, D]
    there, dtype = _tokens(cut, problem.q.device), problem.dtype
    number = there.sum(-1, dtype=dtype)  # [R]
    empty, number = number == 0, number.clamp(min=1)[:, None, None]
    means = [x if problem.diff else x.detach() for x in qkv[:2]]
    means = [x.to(dtype).sum(3).transpose(1, 2) / number for x in means]  # [B, R, N, D]
    topk, scale = min(problem.topk, empty.shape[0]), problem.scale
    index, weight = choose(
        means, topk, scale, problem.per_head, problem.router, empty, counting=True
    )
    takes_part = there if is_mask else ~empty[:, None].expand_as(there)
    found = _attend_regions(qkv, index, weight if problem.soft else None, takes_part, scale)
    return _joined(*found, cut, problem.return_lse)


def attend(problem: RoutedProblem) -> Tensor | tuple[Tensor, Tensor]:
    """See `visattn.ops.routed_attention`."""
    q, k, v, index, weight = problem.q, problem.k, problem.v, problem.index, problem.weight
    q_axes, k_axes = problem.q_axes, problem.k_axes
    lengths = [axis.length for axis in (*q_axes, *k_axes)]
    sizes = *lengths, *problem.region_size, *problem.kv_region_size
    if problem.return_lse or is_symbolic(*sizes):
        return _whole(problem)
    if weight is None and lengths[2] * lengths[3] <= chunking.DENSE_KEYS:
        return _dense(problem)
    images, heads = index.shape[:2]
    if heads > 1:  # every head is an image of its own
        q, k, v = (x.movedim(3, 1).flatten(0, 1).unsqueeze(3) for x in (q, k, v))  # [B N, .., 1, D]
    weight = None if weight is None else weight.flatten(0, 1)  # [B, R, topk], or [B N, R, topk]
    how = q_axes, k_axes, problem.mask_border, problem.scale
    out = _Listed.apply(q, k, v, index.flatten(0, 1), weight, *how)  # [B or B N, H, W, N or 1, Dv]
    if heads > 1:
        return out.squeeze(3).unflatten(0, (images, heads)).movedim(1, 3).contiguous()
    return out  # [B, H, W, N, Dv]
