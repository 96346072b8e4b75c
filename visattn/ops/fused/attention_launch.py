"""Launches of the attention kernels, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from visattn.ops.fused.attention_arguments import (
    KeyGrads,
    Listed,
    Map,
    Out,
    Parts,
    QueryGrads,
    Saved,
    Stats,
)
from visattn.ops.fused.attention_call import Call, strides
from visattn.ops.fused.tuning import Config
from visattn.ops.geometry import ceil_div

# Programs that a reduction is cut into, if it has the work. No property of a GPU, so that sums have one order on all.
_SPLIT = 512
_SPLIT_TILES = 2048  # of images, whose sums are long


@dataclass
class Grads:
    """Gradients of a call's tensors, None where none is wanted or there is no such tensor."""

    q: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    rel_pos: Tensor | None = None
    extra_k: Tensor | None = None
    extra_v: Tensor | None = None
    extra_bias: Tensor | None = None
    weight: Tensor | None = None


def _merge(call: Call, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps of parts of the keys [splits * B, ...] as of all of them."""
    o, lse = (x.unflatten(0, (-1, call.images)) for x in (o, lse))
    total = lse.logsumexp(0)
    share = (lse - total).exp().nan_to_num(0)  # of queries that see nothing
    return (share[..., None] * o).sum(0).to(call.q.dtype), total


def run_forward(call: Call) -> tuple[Tensor, Tensor]:
    from visattn.ops.fused.attention_kernels import forward_kernel

    mask, listed, extra, sizes = (
        call.mask(False),
        call.listed(),
        call.extra_keys(),
        call.sizes(False),
    )
    meta = call.meta(False)

    def one(config: Config, go: Callable[..., None]) -> tuple[Tensor, ...]:
        o = call.partial(False, call.images, call.queries, call.heads, call.value_dim)
        lse = call.empty(*o.shape[:3], dtype=torch.float32)
        maps = (call.map(call.q), call.map(call.k), call.map(call.v))
        go(call.grid(False, config), *maps, Out(call.map(o), lse), mask, listed, extra, sizes)
        return (o, lse) if sizes.splits == 1 else _merge(call, o, lse)

    o, lse = call.run(forward_kernel, False, (meta.ROWS, call.columns(mask)), 1, one)
    return o, lse


def _queries_backward(call: Call, do: Tensor, saved: Saved) -> tuple[Stats, Grads]:
    """Gradients of q, of rel_pos and of weight, and the numbers of queries that the other kernels need."""
    from visattn.ops.fused.attention_kernels import queries_backward_kernel

    mask, listed, extra = call.mask(False), call.listed(), call.extra_keys()
    meta, sizes, columns = call.meta(False), call.sizes(False), call.columns(mask)

    def one(config: Config, go: Callable[..., None]) -> tuple[Tensor, ...]:
        stats, dq = (
            Stats(torch.empty_like(saved.lse), torch.empty_like(saved.lse)),
            call.partial(False, *call.q.shape),
        )
        drel_pos = None if call.rel_pos is None else torch.zeros_like(call.rel_pos)
        dweight = None
        if call.weight is not None:
            shape = (call.images, call.heads, sizes.tiles, meta.ROWS // config.block_m, columns)
            dweight = call.empty(*shape, dtype=torch.float32)
        terms = None if drel_pos is None else Map(drel_pos, *strides(drel_pos, 3))
        grads = QueryGrads(call.map(dq), terms, dweight)
        maps = (call.map(call.q), call.map(call.k), call.map(call.v), call.map(do))
        go(call.grid(False, config), *maps, saved, stats, grads, mask, listed, extra, sizes)
        if dweight is not None:
            dweight = dweight.sum(3).unflatten(3, (-1, mask.columns_number)).sum(4)
        dq = call.joined(False, dq)
        return (*stats, dq, *(x for x in (drel_pos, dweight) if x is not None))

    lse, delta, dq, *more = call.run(queries_backward_kernel, False, (meta.ROWS, columns), 2, one)
    grads = Grads(dq)
    if call.rel_pos is not None:
        grads.rel_pos = more.pop(0)
    if call.weight is not None:
        dweight = more.pop(0)
        grads.weight = dweight.sum(1, keepdim=True) if call.weight.shape[1] == 1 else dweight
        grads.weight = grads.weight.to(call.weight.dtype)
    return Stats(lse, delta), grads


def _q_indices(call: Call, number: int) -> tuple[Listed, int]:
    """Turn kv_indices round: per key region the query regions that list it; and how many that is on average.

    The list holds query regions in the order of the key regions they list.
    """
    kv_indices = cast(Tensor, call.kv_indices)
    topk, kv_indices = kv_indices.shape[3], kv_indices.flatten(2)
    ordered, order = kv_indices.sort(dim=-1, stable=True)
    edges = (
        torch.arange(number + 1, device=kv_indices.device)
        .expand(*kv_indices.shape[:2], -1)
        .contiguous()
    )
    first = torch.searchsorted(ordered, edges).to(torch.int32)
    weight = None if call.weight is None else call.weight.flatten(2).gather(2, order)
    indices = (order // topk).to(torch.int32)
    (b, n), (first_b, first_n) = strides(indices, 2), strides(first, 2)
    listed = Listed(indices, weight, b, n, 0, first, first_b, first_n)
    return listed, max(1, indices.shape[2] // number)


def _keys_backward(call: Call, do: Tensor, stats: Stats) -> tuple[Tensor, ...]:
    """dk and dv."""
    from visattn.ops.fused.attention_kernels import keys_backward_kernel

    mask, listed, columns = call.mask(True), None, 0
    meta, columns = call.meta(True), mask.columns_number
    if call.kv_indices is not None:
        listed, regions_per_row = _q_indices(call, call.sizes(True).tiles)
        columns *= regions_per_row

    def one(config: Config, go: Callable[..., None]) -> tuple[Tensor, ...]:
        dk, dv = call.partial(True, *call.k.shape), call.partial(True, *call.v.shape)
        maps = (call.map(call.q), call.map(call.k), call.map(call.v), call.map(do))
        go(
            call.grid(True, config),
            *maps,
            stats,
            KeyGrads(call.map(dk), call.map(dv)),
            mask,
            listed,
            call.sizes(True),
        )
        return call.joined(True, dk), call.joined(True, dv)

    return call.run(keys_backward_kernel, True, (meta.ROWS, columns), 3, one)


def _tiles_backward(call: Call, do: Tensor, stats: Stats) -> Tensor:
    """The gradient of bias."""
    from visattn.ops.fused.attention_kernels import tiles_backward_kernel

    found, mask, bias = call.block_mask(False), call.mask(False), cast(Tensor, call.bias)
    meta = call.meta(False)

    def one(config: Config, go: Callable[..., None]) -> tuple[Tensor, ...]:
        blocks = (
            meta.ROWS // config.block_m * ceil_div(mask.columns_number, config.block_n) * call.heads
        )
        parts, numbers = found.parts(call.images, max(1, _SPLIT_TILES // blocks))
        partial = call.empty(len(parts), call.heads, meta.ROWS, mask.width, dtype=torch.float32)
        maps = (call.map(call.q), call.map(call.k), call.map(call.v), call.map(do))
        go(
            blocks * len(parts),
            *maps,
            stats,
            partial,
            Parts(parts, found.members),
            mask,
            call.sizes(False),
        )
        return (torch.stack([part.sum(0) for part in partial.split(numbers)], dim=1),)

    (summed,) = call.run(tiles_backward_kernel, False, (meta.ROWS, mask.columns_number), 2, one)
    if call.is_full:
        return summed[:, 0, : bias.shape[1], : bias.shape[2]].to(bias.dtype)
    return found.position_gradient(summed).to(bias.dtype)


def _extra_backward(call: Call, do: Tensor, stats: Stats) -> tuple[Tensor, ...]:
    """Gradients of the extra keys and values."""
    from visattn.ops.fused.attention_kernels import extra_backward_kernel

    extra, meta = call.extra_keys(), call.meta(None)

    def one(config: Config, go: Callable[..., None]) -> tuple[Tensor, ...]:
        blocks = ceil_div(call.extra, config.block_m) * call.images * call.heads
        splits = max(1, min(ceil_div(_SPLIT, blocks), ceil_div(call.queries, config.block_n)))
        dk, dv = (
            call.empty(splits * call.images, call.extra, call.heads, n, dtype=torch.float32)
            for n in (call.dim, call.value_dim)
        )
        grads = KeyGrads(call.map(dk), call.map(dv))
        go(
            blocks * splits,
            call.map(call.q),
            call.map(do),
            stats,
            grads,
            extra,
            call.sizes(None),
            splits,
        )
        return tuple(x.unflatten(0, (splits, -1)).sum(0).to(call.q.dtype) for x in (dk, dv))

    return call.run(extra_backward_kernel, None, (meta.ROWS, call.queries), 3, one)


def _extra_bias_backward(call: Call, do: Tensor, stats: Stats) -> Tensor:
    """The gradient of the extra keys' bias."""
    from visattn.ops.fused.attention_kernels import extra_bias_backward_kernel

    extra, meta, bias = call.extra_keys(), call.meta(None), cast(Tensor, call.extra_bias)
    shared = [a for a, n in enumerate(bias.shape) if n == 1]

    def one(config: Config, go: Callable[..., None]) -> tuple[Tensor, ...]:
        blocks = (
            ceil_div(call.queries, config.block_m)
            * ceil_div(call.extra, config.block_n)
            * call.heads
        )
        groups = call.images
        if 0 in shared:
            groups = ceil_div(groups, ceil_div(groups, ceil_div(_SPLIT, blocks)))
        dbias = call.empty(groups, call.queries, call.heads, call.extra, dtype=torch.float32)
        go(
            groups * blocks,
            call.map(call.q),
            call.map(do),
            stats,
            dbias,
            extra,
            call.sizes(None),
            groups,
        )
        return (dbias.sum(shared, keepdim=True) if shared else dbias,)

    (dbias,) = call.run(extra_bias_backward_kernel, None, (meta.ROWS, call.extra), 3, one)
    return dbias.to(bias.dtype)


def run_backward(call: Call, wanted: dict[str, bool]) -> Grads:
    """Gradients of q, rel_pos and weight in any case and of the others that are wanted."""
    do, o, lse = (cast(Tensor, x) for x in (call.do, call.o, call.lse))
    stats, grads = _queries_backward(call, do, Saved(call.map(o), lse, call.dlse))
    if wanted["k"] or wanted["v"]:
        grads.k, grads.v = _keys_backward(call, do, stats)
    if wanted["bias"]:
        grads.bias = _tiles_backward(call, do, stats)
    if wanted["extra_k"] or wanted["extra_v"]:
        grads.extra_k, grads.extra_v = _extra_backward(call, do, stats)
    if wanted["extra_bias"]:
        grads.extra_bias = _extra_bias_backward(call, do, stats)
    return grads
