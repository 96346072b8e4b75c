"""Halo attention as batched attention of blocks against their windows, a few blocks at a time.

The relative term of a query is a number per window row plus a number per window column, so it is kept as these
`rows + columns` numbers and spread over the window by a product with ones and zeros when the logits are made. Nothing
of the size of the logits outlives a chunk: the backward pass makes them again, and the only things kept for it are the
inputs. Windows are strided views of the padded map, copied once; their gradients are added up block by block.

With symbolic sizes, and for windows that mostly hold zeros outside the map, there is a form without chunks.
"""

from __future__ import annotations

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
    q = q.unflatten(2, (b.blocks, tb)).unflatten(
        1, (a.blocks, ta)
    )  # [B, rows, t_h, columns, t_w, N, D]
    return q.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)  # [T, N, t, D]


def _join_queries(x: Tensor, axes: tuple[Halo, Halo], images: int) -> Tensor:
    """Undo `_cut_queries`: [T, N, t, D] -> [B, H', W', N, D]."""
    a, b = axes
    x = x.unflatten(2, (a.queries_per_block, b.queries_per_block)).unflatten(
        0, (images, a.blocks, b.blocks)
    )
    x = (
        x.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)
    )  # [B, rows t_h, columns t_w, N, D]
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
    x = x.unflatten(2, (a.window, b.window)).unflatten(0, (images, a.blocks, b.blocks))
    (pa, pb), (na, nb) = (
        (ceil_div(axis.window, axis.block) for axis in axes),
        (axis.blocks for axis in axes),
    )
    total = x.new_zeros(x.shape[0], na + pa - 1, a.block, nb + pb - 1, b.block, *x.shape[3::3])
    for i in range(pa):
        for j in range(pb):
            part = x[..., i * a.block : (i + 1) * a.block, j * b.block : (j + 1) * b.block, :]
            part = part.permute(
                0, 1, 4, 2, 5, 3, 6
            )  # [B, rows, b_h or less, columns, b_w or less, N, D]
            total[:, i : i + na, : part.shape[2], j : j + nb, : part.shape[4]] += part
    total = total.flatten(3, 4).flatten(1, 2)
    return total[
        :, a.halo : a.halo + a.length, b.halo : b.halo + b.length
    ].contiguous()  # [B, H, W, N, D]


class _Relative:
    """What the logits of a query hold besides q k^T: a term per row and one per column of the window."""

    def __init__(
        self,
        q: Tensor,
        axes: tuple[Halo, Halo],
        rel_h: Tensor | None,
        rel_w: Tensor | None,
        mask_border: bool,
    ) -> None:
        self.axes = axes
        self.windows = [axis.window for axis in axes]
        tables = zip((rel_h, rel_w), self.windows, strict=True)
        self.tables = [
            q.new_zeros(2 * w - 1, q.shape[-1]) if t is None else t.to(q.dtype) for t, w in tables
        ]
        self.outside = None
        if mask_border:
            # Finite, as it is multiplied by zeros below; twice it is still finite.
            far = torch.finfo(q.dtype).min / 4
            index = [axis.key_index(q.device) for axis in axes]
            outside = [(i < 0) | (i >= axis.length) for i, axis in zip(index, axes, strict=True)]
            self.outside = [torch.zeros_like(o, dtype=q.dtype).masked_fill(o, far) for o in outside]
        rows, columns = (torch.eye(w, dtype=q.dtype, device=q.device) for w in self.windows)
        wh, ww = self.windows
        rows, columns = (
            rows[:, :, None].expand(-1, -1, ww),
            columns[:, None].expand(-1, wh, -1),
        )  # [w, w_h, w_w]
        self.spread = torch.cat(
            [rows.flatten(1), columns.flatten(1)]
        )  # [w_h + w_w, w_h * w_w] of ones and zeros

    def _places(self, number: int, heads: int) -> list[tuple[list[int], list[int], int]]:
        """Give size, strides and offset of terms [T, N, t_h, t_w, w] as views of queries x table [T, N, t, 2w - 1].

        The entry of a slot is slot - rank + w - 1: the step from rank to rank is one less than that of the products.
        """
        (th, tw), (wh, ww) = (a.queries_per_block for a in self.axes), self.windows
        eh, ew = 2 * wh - 1, 2 * ww - 1
        return [
            (
                [number, heads, th, tw, wh],
                [heads * th * tw * eh, th * tw * eh, tw * eh - 1, eh, 1],
                wh - 1,
            ),
            (
                [number, heads, th, tw, ww],
                [heads * th * tw * ew, th * tw * ew, tw * ew, ew - 1, 1],
                ww - 1,
            ),
        ]

    def terms(self, q: Tensor) -> list[Tensor]:
        """Make rows [T, N, t_h, t_w, w_h] and columns [T, N, t_h, t_w, w_w] for the queries [T, N, t, D]."""
        places = self._places(*q.shape[:2])
        rows, columns = (
            (q @ t.mT).as_strided(*p) for t, p in zip(self.tables, places, strict=True)
        )
        if self.outside is not None:
            tile = torch.arange(q.shape[0], device=q.device)
            row, column = (
                tile // self.axes[1].blocks % self.axes[0].blocks,
                tile % self.axes[1].blocks,
            )
            rows = rows + self.outside[0][row][:, None, None, None]
            columns = columns + self.outside[1][column][:, None, None, None]
        return [rows, columns]

    def widen(self, q: Tensor, scale: float) -> Tensor:
        """Widen queries [T, N, t, D] -> [T, N, t, D + w_h + w_w]: scaled, and their terms."""
        scaled = (q * scale).unflatten(
            2, [a.queries_per_block for a in self.axes]
        )  # [T, N, t_h, t_w, D]
        return torch.cat([scaled, *self.terms(q)], dim=-1).flatten(2, 3)  # [T, N, t, D + w_h + w_w]

    def gradients(self, q: Tensor, grad_terms: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Find the gradients of the queries [T, N, t, D] and of both tables, from those of `widen`'s terms."""
        parts = grad_terms.unflatten(2, [a.queries_per_block for a in self.axes]).split(
            self.windows, dim=-1
        )
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
    least = ceil_div(number, chunking.MOST)
    return chunking.slices(number, max(1, logits // max(1, q[:1, ..., 0].numel() * slots), least))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    axes: tuple[Halo, Halo],
    mask_border: bool,
    scale: float,
) -> Tensor:
    plain = rel_h is None and rel_w is None and not mask_border
    relative = None if plain else _Relative(q, axes, rel_h, rel_w, mask_border)
    query, key, value = _cut_queries(q, axes), _windows(k, axes), _windows(v, axes)
    terms = (
        None if relative is None else torch.cat(relative.terms(query), dim=-1).flatten(2, 3)
    )  # [T, N, t, w_h + w_w]
    found = []
    for tiles in _chunks(query, key.shape[-2]):
        added = None if relative is None or terms is None else terms[tiles] @ relative.spread
        part, keys, values = query[tiles], key[tiles], value[tiles]
        found.append(
            F.scaled_dot_product_attention(part, keys, values, attn_mask=added, scale=scale)
        )
    return _join_queries(torch.cat(found), axes, q.shape[0])


def _chunk_gradients(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the gradients of queries, keys and values for softmax(query [key, spread^T]^T) value.

    Queries [T, N, t, D + w_h + w_w] are widened by their terms, keys here by the ones and zeros that spread them: one
    product is the logits, and one gives the gradients of queries and terms.
    """
    dim, dtype = key.shape[-1], torch.promote_types(query.dtype, torch.float32)
    wide = torch.cat([key, spread.mT.expand(*key.shape[:2], -1, -1)], dim=-1)
    weights = (query @ wide.mT).to(dtype).softmax(dim=-1)
    # The derivative of softmax: weights * (grad - sum of weights * grad).
    grad = (grad_out @ value.mT).to(dtype)
    grad = torch.ops.aten._softmax_backward_data(grad, weights, -1, dtype).to(query.dtype)
    return grad @ wide, grad.mT @ query[..., :dim], weights.to(query.dtype).mT @ grad_out


class _HaloAttention(torch.autograd.Function):
    """`_forward`, keeping only its inputs for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.how = inputs[5:]

    @staticmethod
    # pyrefly: ignore[bad-override]: as many gradients as forward has results
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, rel_h, rel_w = ctx.saved_tensors
        axes, mask_border, scale = ctx.how
        query, grad = _cut_queries(q, axes), _cut_queries(grad_out, axes)
        key, value = _windows(k, axes), _windows(v, axes)
        relative, dim = _Relative(q, axes, rel_h, rel_w, mask_border), q.shape[-1]
        wide = relative.widen(query, scale)
        found = [
            _chunk_gradients(wide[tiles], key[tiles], value[tiles], grad[tiles], relative.spread)
            for tiles in _chunks(query, key.shape[-2])
        ]
        grad_query, grad_key, grad_value = (torch.cat(x) for x in zip(*found, strict=True))
        grad_relative, grad_tables = relative.gradients(query, grad_query[..., dim:])
        grads = (
            _join_queries(grad_query[..., :dim] * scale + grad_relative, axes, q.shape[0]),
            _add_windows(grad_key, axes, q.shape[0]),
            _add_windows(grad_value, axes, q.shape[0]),
        )
        grad_tables = [
            None if t is None else g.to(t.dtype)
            for t, g in zip((rel_h, rel_w), grad_tables, strict=True)
        ]
        return (*grads, *grad_tables, None, None, None)


def _terms(query: Tensor, table: Tensor | None, axis: Halo, cut: Halo) -> Tensor:
    """Make [..., t, w] for queries [..., t, D] of an axis, w slots of the window cut to `cut`.

    The slots that were cut off hold no key and are never inside the map: the last one left takes them all on.
    """
    rank = torch.arange(cut.queries_per_block, device=query.device)[:, None]
    if table is None:
        terms = query.new_zeros(()).expand(*query.shape[:-1], axis.window)  # [..., t, window]
    else:
        entry = (
            torch.arange(axis.window, device=query.device) - rank + axis.window - 1
        )  # [t, window]
        places = entry + rank * (2 * axis.window - 1)
        product = (query @ table.to(query.dtype).mT).flatten(-2)  # [..., t (2 window - 1)]
        terms = product.index_select(-1, places.flatten()).unflatten(
            -1, entry.shape
        )  # [..., t, window]
    if cut == axis:
        return terms
    first = axis.halo - cut.halo
    last = first + cut.window - 1
    others = torch.cat([terms[..., :first], terms[..., last:]], dim=-1).logsumexp(-1, keepdim=True)
    return torch.cat([terms[..., first:last], others], dim=-1)  # [..., t, w]


def _whole(problem: HaloProblem, cut: tuple[Halo, ...]) -> Tensor:
    """Attend in one go, in operations that do not depend on sizes; with windows cut to `cut`."""
    axes, device, (ta, tb) = problem.axes, problem.q.device, (c.queries_per_block for c in cut)
    rank = [torch.arange(c.blocks, device=device)[:, None] * c.queries_per_block for c in cut]
    index = [
        r + torch.arange(c.queries_per_block, device=device) for r, c in zip(rank, cut, strict=True)
    ]
    slots = [c.key_index(device) for c in cut]
    query, key, value = (
        cut_blocks(problem.q, index),
        cut_blocks(problem.k, slots),
        cut_blocks(problem.v, slots),
    )

    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = (query * problem.scale @ key.mT).to(dtype)  # [B, rows, columns, N, t, U]
    scores = scores.unflatten(-1, [c.window for c in cut]).unflatten(
        -3, (ta, tb)
    )  # [..., t_h, t_w, w_h, w_w]
    if problem.rel_h is not None or problem.rel_w is not None or cut != axes:
        tile = query.unflatten(-2, (ta, tb)).to(dtype)  # [B, rows, columns, N, t_h, t_w, D]
        row = _terms(tile.transpose(-3, -2), problem.rel_h, axes[0], cut[0]).transpose(-3, -2)
        column = _terms(tile, problem.rel_w, axes[1], cut[1])
        scores = scores + row[..., :, None] + column[..., None, :]  # [..., t_h, t_w, w_h, w_w]
    if problem.mask_border:
        outside = [(s < 0) | (s >= axis.length) for s, axis in zip(slots, axes, strict=True)]
        outside = outside[0][:, None, :, None] | outside[1][:, None, :]  # [rows, columns, w_h, w_w]
        scores = scores.masked_fill(outside[:, :, None, None, None], float("-inf"))
    weights = (
        scores.flatten(-2).softmax(-1).flatten(-3, -2).to(value.dtype)
    )  # [B, rows, columns, N, t, U]
    return join_blocks(weights @ value, (ta, tb), [axis.queries for axis in axes])


def attend(problem: HaloProblem) -> Tensor:
    """See `visattn.ops.halo_attention`."""
    axes = problem.axes
    if is_symbolic(*problem.size, *(axis.length for axis in axes)):
        return _whole(problem, axes)
    if not problem.mask_border:
        cut = tuple(axis.clipped(spare=1) for axis in axes)
        if any(2 * c.window < axis.window for c, axis in zip(cut, axes, strict=True)):
            return _whole(problem, cut)
    problem = problem.clipped()
    q, k, v, rel_h, rel_w = problem.q, problem.k, problem.v, problem.rel_h, problem.rel_w
    trains = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, v, rel_h, rel_w)
    )
    run = _HaloAttention.apply if trains else _forward
    return run(q, k, v, rel_h, rel_w, problem.axes, problem.mask_border, problem.scale)
