"""Halo attention as batched attention of blocks against their windows, a few blocks at a time.

The relative term of a query is a number per window row plus a number per window column, so it is kept as these
`rows + columns` numbers and spread over the window by a product with ones and zeros when the logits are made. Nothing
of the size of the logits outlives a chunk: the backward pass makes them again, and the only things kept for it are the
inputs. Windows are strided views of the padded map, copied once; their gradients are added up block by block.

With symbolic sizes, for log-sum-exps, and for windows that mostly hold zeros outside the map, there is a form without
chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops import chunking
from visattn.ops.cut import cut_blocks, join_blocks
from visattn.ops.geometry import Halo, ceil_div, is_symbolic

if TYPE_CHECKING:
    from visattn.ops.halo import HaloProblem


def _cut_queries(q: Tensor, axes: tuple[Halo, Halo]) -> Tensor:
    """Cut [B, H', W', N, D] -> [T, N, t, D]: the t queries of each of the T = B * rows * columns blocks."""
    a, b = axes
    ta, tb = a.queries_per_block, b.queries_per_block
    q = F.pad(q, (0, 0, 0, 0, 0, b.blocks * tb - b.queries, 0, a.blocks * ta - a.queries))
    # [B, rows, t_h, columns, t_w, N, D]
    q = q.unflatten(2, (b.blocks, tb)).unflatten(1, (a.blocks, ta))
    return q.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)  # [T, N, t, D]


def _join_queries(x: Tensor, axes: tuple[Halo, Halo], images: int) -> Tensor:
    """Undo `_cut_queries`: [T, N, t, D] -> [B, H', W', N, D]."""
    a, b = axes
    x = x.unflatten(2, (a.queries_per_block, b.queries_per_block))  # [T, N, t_h, t_w, D]
    x = x.unflatten(0, (images, a.blocks, b.blocks)).permute(0, 1, 4, 2, 5, 3, 6)
    x = x.flatten(3, 4).flatten(1, 2)  # [B, rows t_h, columns t_w, N, D]
    return x[:, : a.queries, : b.queries].contiguous()  # [B, H', W', N, D]


def _windows(x: Tensor, axes: tuple[Halo, Halo]) -> Tensor:
    """Copy [B, H, W, N, D] -> [T, N, slots of a window, D], zero outside the map."""
    pads = [0, 0, 0, 0]
    for axis in reversed(axes):
        pads += [axis.halo, axis.blocks * axis.block + axis.halo - axis.length]
    x = F.pad(x, pads)
    for a, axis in enumerate(axes, start=1):
        x = x.unfold(a, axis.window, axis.block)  # [B, rows, columns, N, D, w_h, w_w] in the end
    return x.permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5).flatten(0, 2)  # [T, N, w_h w_w, D]


def _add_windows(x: Tensor, axes: tuple[Halo, Halo], images: int) -> Tensor:
    """Transpose `_windows`, [T, N, slots, D] -> [B, H, W, N, D]: the sum over all slots that hold a key."""
    a, b = axes
    x = x.unflatten(2, (a.window, b.window))  # [T, N, w_h, w_w, D]
    x = x.unflatten(0, (images, a.blocks, b.blocks))  # [B, rows, columns, N, w_h, w_w, D]
    (pa, na), (pb, nb) = ((ceil_div(axis.window, axis.block), axis.blocks) for axis in axes)
    total = x.new_zeros(x.shape[0], na + pa - 1, a.block, nb + pb - 1, b.block, *x.shape[3::3])
    for i in range(pa):
        for j in range(pb):
            part = x[..., i * a.block : (i + 1) * a.block, j * b.block : (j + 1) * b.block, :]
            part = part.permute(0, 1, 4, 2, 5, 3, 6)  # [B, rows, <= b_h, columns, <= b_w, N, D]
            total[:, i : i + na, : part.shape[2], j : j + nb, : part.shape[4]] += part
    total = total.flatten(3, 4).flatten(1, 2)  # [B, all rows, all columns, N, D]
    total = total[:, a.halo : a.halo + a.length, b.halo : b.halo + b.length]
    return total.contiguous()  # [B, H, W, N, D]


class _Relative:
    """What the logits of a query hold besides q k^T: a term per row and one per column of the window."""

    def __init__(
        self, q: Tensor, axes: tuple[Halo, Halo], tables: Sequence[Tensor | None], mask_border: bool
    ) -> None:
        self.axes, self.outside = axes, None
        self.windows = wh, ww = [axis.window for axis in axes]
        self.queries = [axis.queries_per_block for axis in axes]
        self.tables = [
            q.new_zeros(2 * w - 1, q.shape[-1]) if t is None else t.to(q.dtype)
            for t, w in zip(tables, self.windows, strict=True)
        ]
        if mask_border:
            # Finite, as it is multiplied by zeros below; twice it is still finite.
            far = torch.finfo(q.dtype).min / 4
            index = [axis.key_index(q.device) for axis in axes]
            outside = [(i < 0) | (i >= axis.length) for i, axis in zip(index, axes, strict=True)]
            self.outside = [torch.zeros_like(o, dtype=q.dtype).masked_fill(o, far) for o in outside]
        rows, columns = (torch.eye(w, dtype=q.dtype, device=q.device) for w in self.windows)
        rows = rows[:, :, None].expand(-1, -1, ww).flatten(1)  # [w_h, w_h w_w]
        columns = columns[:, None].expand(-1, wh, -1).flatten(1)  # [w_w, w_h w_w]
        self.spread = torch.cat([rows, columns])  # [w_h + w_w, w_h w_w] of ones and zeros

    def _places(self, number: int, heads: int) -> list[tuple[list[int], list[int], int]]:
        """Give size, strides and offset of terms [T, N, t_h, t_w, w] as views of queries x table [T, N, t, 2w - 1].

        The entry of a slot is slot - rank + w - 1: the step from rank to rank is one less than that of the products.
        """
        (th, tw), places = self.queries, []
        for w, of_row, of_column in zip(self.windows, (1, 0), (0, 1), strict=True):
            e = 2 * w - 1  # entries
            strides = [heads * th * tw * e, th * tw * e, tw * e - of_row, e - of_column, 1]
            places.append(([number, heads, th, tw, w], strides, w - 1))
        return places

    def terms(self, q: Tensor) -> list[Tensor]:
        """Make rows [T, N, t_h, t_w, w_h] and columns [T, N, t_h, t_w, w_w] for the queries [T, N, t, D]."""
        places = zip(self.tables, self._places(*q.shape[:2]), strict=True)
        rows, columns = ((q @ table.mT).as_strided(*place) for table, place in places)
        if self.outside is not None:
            tile, (a, b) = torch.arange(q.shape[0], device=q.device), self.axes
            row, column = tile // b.blocks % a.blocks, tile % b.blocks
            rows = rows + self.outside[0][row][:, None, None, None]
            columns = columns + self.outside[1][column][:, None, None, None]
        return [rows, columns]

    def widen(self, q: Tensor, scale: float) -> Tensor:
        """Widen queries [T, N, t, D] -> [T, N, t, D + w_h + w_w]: scaled, and their terms."""
        scaled = (q * scale).unflatten(2, self.queries)  # [T, N, t_h, t_w, D]
        return torch.cat([scaled, *self.terms(q)], dim=-1).flatten(2, 3)  # [T, N, t, D + w_h + w_w]

    def gradients(self, q: Tensor, grad_terms: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Find the gradients of the queries [T, N, t, D] and of both tables, from those of `widen`'s terms."""
        grad_terms = grad_terms.unflatten(2, self.queries)  # [T, N, t_h, t_w, w_h + w_w]
        parts = grad_terms.split(self.windows, dim=-1)
        grad_q: Any = 0
        grad_tables: list[Tensor] = []
        places = self._places(*q.shape[:2])
        for a, (table, part, place) in enumerate(zip(self.tables, parts, places, strict=True)):
            if torch.is_grad_enabled():  # a backward pass that is differentiated itself, or batched
                rank = torch.arange(part.shape[2 + a], device=q.device)[:, None]
                entry = torch.arange(self.windows[a], device=q.device) - rank + self.windows[a] - 1
                entry = (entry if a else entry[:, None]).expand(part.shape)  # [T, N, t_h, t_w, w]
                products = part.new_zeros(*part.shape[:-1], len(table)).scatter(-1, entry, part)
                products = products.flatten(2, 3)  # [T, N, t, 2w - 1]
            else:
                products = q.new_zeros(*q.shape[:-1], len(table))
                products.as_strided(*place).copy_(part)
            grad_q = products @ table + grad_q
            grad_tables.append(products.flatten(0, 2).mT @ q.flatten(0, 2))  # [2w - 1, D]
        return grad_q, grad_tables


def _chunks(q: Tensor, slots: int) -> list[slice]:
    """Slice the blocks of queries [T, N, t, D]; one slice where their number is not known."""
    if is_symbolic(q.shape[0]) or torch.jit.is_tracing():
        return [slice(None)]
    number = max(1, q.shape[0])
    logits = chunking.CHUNK if q.device.type == "cpu" else chunking.ACCELERATOR
    step = logits // max(1, q[:1, ..., 0].numel() * slots)
    return chunking.slices(number, max(1, step, ceil_div(number, chunking.MOST)))


def _forward(*inputs: Any) -> Tensor:
    """Attend with q, k, v, the tables rel_h and rel_w, both axes, whether to mask the border, and the scale."""
    q, k, v, rel_h, rel_w, axes, mask_border, scale = inputs
    query, key, value = _cut_queries(q, axes), _windows(k, axes), _windows(v, axes)
    terms = spread = None
    if rel_h is not None or rel_w is not None or mask_border:
        relative = _Relative(q, axes, (rel_h, rel_w), mask_border)
        terms = torch.cat(relative.terms(query), dim=-1).flatten(2, 3)  # [T, N, t, w_h + w_w]
        spread = relative.spread
    found = []
    for tiles in _chunks(query, key.shape[-2]):
        added = None if terms is None or spread is None else terms[tiles] @ spread
        qkv = query[tiles], key[tiles], value[tiles]
        found.append(F.scaled_dot_product_attention(*qkv, attn_mask=added, scale=scale))
    return _join_queries(torch.cat(found), axes, q.shape[0])


def _chunk_gradients(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the gradients of queries, keys and values for softmax(query [key, spread^T]^T) value.

    Queries [T, N, t, D + w_h + w_w] are widened by their terms, keys here by the ones and zeros that spread them: one
    product is the logits, and one gives the gradients of queries and terms.
    """
    dim, dtype = key.shape[-1], torch.promote_types(query.dtype, torch.float32)
    # [T, N, slots, D + w_h + w_w]
    wide = torch.cat([key, spread.mT.expand(*key.shape[:2], -1, -1)], dim=-1)
    weights = (query @ wide.mT).to(dtype).softmax(dim=-1)
    # The derivative of softmax: weights * (grad - sum of weights * grad).
    grad = (grad_out @ value.mT).to(dtype)
    grad = torch.ops.aten._softmax_backward_data(grad, weights, -1, dtype).to(query.dtype)
    return grad @ wide, grad.mT @ query[..., :dim], weights.to(query.dtype).mT @ grad_out


class _HaloAttention(chunking.Recomputed):
    """`_forward`, keeping only its inputs for the backward pass."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _forward(*inputs)

    @staticmethod
    # pyrefly: ignore[bad-override]: as many gradients as forward has results
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, *tables), (axes, mask_border, scale) = ctx.saved_tensors, ctx.how
        query, grad = _cut_queries(q, axes), _cut_queries(grad_out, axes)
        key, value = _windows(k, axes), _windows(v, axes)
        relative, (images, *_, dim) = _Relative(q, axes, tables, mask_border), q.shape
        wide = relative.widen(query, scale)
        found = [
            _chunk_gradients(wide[tiles], key[tiles], value[tiles], grad[tiles], relative.spread)
            for tiles in _chunks(query, key.shape[-2])
        ]
        grad_query, grad_key, grad_value = (torch.cat(x) for x in zip(*found, strict=True))
        grad_relative, grad_tables = relative.gradients(query, grad_query[..., dim:])
        grad_query = grad_query[..., :dim] * scale + grad_relative
        pairs = zip(tables, grad_tables, strict=True)
        return (
            _join_queries(grad_query, axes, images),
            _add_windows(grad_key, axes, images),
            _add_windows(grad_value, axes, images),
            *(None if table is None else grad.to(table.dtype) for table, grad in pairs),
            *(None,) * 3,
        )


def _terms(query: Tensor, table: Tensor | None, axis: Halo, cut: Halo) -> Tensor:
    """Make [..., t, w] for queries [..., t, D] of an axis, w slots of the window cut to `cut`.

    The slots that were cut off hold no key and are never inside the map: the last one left takes them all on.
    """
    rank = torch.arange(cut.queries_per_block, device=query.device)[:, None]
    if table is None:
        terms = query.new_zeros(()).expand(*query.shape[:-1], axis.window)  # [..., t, window]
    else:
        entry = torch.arange(axis.window, device=query.device) - rank + axis.window - 1
        places = entry + rank * (2 * axis.window - 1)  # [t, window]
        product = (query @ table.to(query.dtype).mT).flatten(-2)  # [..., t (2 window - 1)]
        terms = product.index_select(-1, places.flatten())  # [..., t window]
        terms = terms.unflatten(-1, places.shape)  # [..., t, window]
    if cut == axis:
        return terms
    first = axis.halo - cut.halo
    last = first + cut.window - 1
    others = torch.cat([terms[..., :first], terms[..., last:]], dim=-1).logsumexp(-1, keepdim=True)
    return torch.cat([terms[..., first:last], others], dim=-1)  # [..., t, w]


def _whole(problem: HaloProblem, cut: tuple[Halo, ...]) -> Tensor | tuple[Tensor, Tensor]:
    """Attend in one go, in operations that do not depend on sizes; with windows cut to `cut`."""
    axes, device, dtype = problem.axes, problem.q.device, problem.dtype
    tile, index = [c.queries_per_block for c in cut], []
    for c, t in zip(cut, tile, strict=True):
        first = torch.arange(c.blocks, device=device)[:, None] * t
        index.append(first + torch.arange(t, device=device))  # [blocks, t]
    slots = [c.key_index(device) for c in cut]
    query = cut_blocks(problem.q, index)  # [B, rows, columns, N, t, D]
    key, value = cut_blocks(problem.k, slots), cut_blocks(problem.v, slots)  # [.., N, U, D]

    scores = (query * problem.scale @ key.mT).to(dtype)  # [B, rows, columns, N, t, U]
    scores = scores.unflatten(-1, [c.window for c in cut])  # [..., t, w_h, w_w]
    scores = scores.unflatten(-3, tile)  # [..., t_h, t_w, w_h, w_w]
    if problem.rel_h is not None or problem.rel_w is not None or cut != axes:
        query = query.unflatten(-2, tile).to(dtype)  # [B, rows, columns, N, t_h, t_w, D]
        row = _terms(query.transpose(-3, -2), problem.rel_h, axes[0], cut[0]).transpose(-3, -2)
        column = _terms(query, problem.rel_w, axes[1], cut[1])  # [..., t_h, t_w, w_w]
        scores = scores + row[..., :, None] + column[..., None, :]  # [..., t_h, t_w, w_h, w_w]
    if problem.mask_border:
        outside = [(s < 0) | (s >= axis.length) for s, axis in zip(slots, axes, strict=True)]
        outside = outside[0][:, None, :, None] | outside[1][:, None, :]  # [rows, columns, w_h, w_w]
        scores = scores.masked_fill(outside[:, :, None, None, None], float("-inf"))
    scores = scores.flatten(-2).flatten(-3, -2)  # [B, rows, columns, N, t, U]
    size = [axis.queries for axis in axes]
    out = join_blocks(scores.softmax(-1).to(value.dtype) @ value, tile, size)
    if not problem.return_lse:
        return out
    return out, join_blocks(scores.logsumexp(-1, keepdim=True), tile, size).squeeze(-1)


def attend(problem: HaloProblem) -> Tensor | tuple[Tensor, Tensor]:
    """See `visattn.ops.halo_attention`."""
    axes = problem.axes
    if is_symbolic(*problem.size, *(axis.length for axis in axes)):
        return _whole(problem, axes)
    if not problem.mask_border:
        cut = tuple(axis.clipped(spare=1) for axis in axes)
        if any(2 * c.window < axis.window for c, axis in zip(cut, axes, strict=True)):
            return _whole(problem, cut)
    problem = problem.clipped()
    if problem.return_lse:
        return _whole(problem, problem.axes)
    tensors = (problem.q, problem.k, problem.v, *problem.tables)
    run = _HaloAttention.apply if problem.trains() else _forward
    return run(*tensors, problem.axes, problem.mask_border, problem.scale)
