"""Launches of the attention kernels: what a call needs besides its tensors, and which configs are worth a try."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from visattn.ops.fused.launch import launch, power_of_2
from visattn.ops.fused.support import MOST_BYTES, is_interpreting, precision
from visattn.ops.fused.tables import BlockMask, block_mask, decode, regions
from visattn.ops.fused.tuning import Config, run_tuned
from visattn.ops.geometry import ceil_div, padded_rows

# Programs that a reduction is cut into, if it has the work. No property of a GPU, so that sums have one order on all.
_SPLIT = 512
_WIDE = 2**31  # numbers of an image from which offsets have 64 bits
LOG2E = 1.4426950408889634  # the kernels' logits are in units in which exp2 makes the weights


def _block(channels: int) -> int:
    return max(16, power_of_2(channels))


def _configs(call: Call, rows: int, columns: int, sums: int = 1) -> list[Config]:
    """Candidates for tiles of so many rows and columns in a kernel with so many sums; the first is the default."""
    held, is_wide = min(padded_rows(rows), 64), call.q.dtype == torch.float32
    warps = 2 if held == 16 or (held == 32 and sums == 1) else 4
    # Few padded columns in few steps, as far as registers go: a backward pass needs twice as many, more sums and exact
    # products of float32 still more.
    most = 32 if sums == 3 or is_wide else 64
    sizes = [
        n for n in (16, 32, 64, 128) if n <= 64 or (sums == 1 and call.dim <= 64 and not is_wide)
    ]
    sizes.sort(key=lambda n: (n > most, ceil_div(columns, n) * (n + 40)))
    stages = (
        (1, 2) if columns <= sizes[0] else (2, 3, 1)
    )  # a single step has nothing to overlap with
    if _block(max(call.dim, call.value_dim)) * call.q.element_size() > MOST_BYTES // 2:
        sizes, stages = [16, 32], (1,)  # for the sake of shared memory
    several = (2 * warps, warps) if is_wide else (warps, 2 * warps)
    found = [Config(held, n, several[0], s) for n in sizes for s in stages]
    found += [Config(held, n, several[1], stages[0]) for n in sizes]
    if rows > 64:
        found += [Config(128, n, 8, 2) for n in sizes[:2]]
    return found


def _launch(
    kernel: Any, programs: int | tuple[int, int, int], config: Config, *args: Any, **constants: Any
) -> None:
    """Launch a kernel with its first parameters by position, and the rows and columns of a config."""
    arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **constants}
    launch(
        kernel,
        programs,
        config,
        {**arguments, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
    )


def _with_channels_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class Call:
    """One call: shapes, tables, and the arguments that its kernels share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        rel_pos: Tensor | None,
        extra_k: Tensor | None,
        extra_v: Tensor | None,
        extra_bias: Tensor | None,
        weight: Tensor | None,
        kv_indices: Tensor | None,
        key_mask: Tensor | None,
        axes: Sequence[int],
        zero_keys: bool,
        scale: float,
    ) -> None:
        self.q, self.k, self.v = (_with_channels_together(x) for x in (q, k, v))
        self.extra_k, self.extra_v = (
            None if x is None else _with_channels_together(x) for x in (extra_k, extra_v)
        )
        self.bias, self.extra_bias, self.scale = bias, extra_bias, scale
        self.rel_pos = None if rel_pos is None else rel_pos.contiguous()
        self.axes, self.zero_keys = decode(axes), zero_keys
        self.images, self.queries, self.heads, self.dim = q.shape
        self.keys, self.value_dim = k.shape[1], v.shape[-1]
        self.kv_indices = None if kv_indices is None else kv_indices.contiguous()
        self.weight = None if weight is None else weight.contiguous()
        self.key_mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        self.do: Tensor | None = None  # of the output, in the backward pass
        self._tiles: dict[bool, tuple[BlockMask, Tensor | None]] = {}
        self.extra = 0 if extra_k is None else extra_k.shape[1]
        self.shape_class = (
            str(q.dtype).removeprefix("torch."),
            *([precision()] if q.dtype == torch.float32 else []),
            self.dim,
            self.value_dim,
            f"bias{int(bias is not None)}",
            f"rel_pos{0 if rel_pos is None else rel_pos.shape[-1]}",
            f"extra{self.extra and _block(min(self.extra, 64))}",
            f"weight{int(weight is not None)}",
            f"list{int(kv_indices is not None)}",
            *([] if key_mask is None else ["key_mask"]),
        )

    def options(self) -> dict[str, Any]:
        return {
            "D": self.dim,
            "DV": self.value_dim,
            "BD": _block(self.dim),
            "BDV": _block(self.value_dim),
            "UNIT": self.unit,
            "WIDE": self.wide,
            "UPCAST": is_interpreting() and self.q.dtype == torch.bfloat16,
            "PRECISION": precision() if self.q.dtype == torch.float32 else "ieee",
        }

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.q.dtype, device=self.q.device)

    @functools.cached_property
    def wide(self) -> bool:
        """Whether places in an image need 64 bits, in one of the given tensors or of the contiguous results."""
        given = (self.q, self.k, self.v, self.do, self.extra_bias)
        spans = [x.stride(1) * x.shape[1] for x in given if x is not None]
        return (
            max(
                *spans,
                max(self.queries, self.keys)
                * self.heads
                * max(self.dim, self.value_dim, self.width),
            )
            >= _WIDE
        )

    @functools.cached_property
    def unit(self) -> int:
        """How many numbers are 16 bytes, if all rows of channels begin at such borders; else 1."""
        unit = 16 // self.q.element_size()
        found = (self.q, self.k, self.v, self.do, self.extra_k, self.extra_v)
        strides = [s for x in found if x is not None for s in x.stride()[:3]]
        whole = all(n % unit == 0 for n in (self.dim, self.value_dim, *strides))
        return unit if whole and all(x is None or x.data_ptr() % 16 == 0 for x in found) else 1

    @functools.cached_property
    def width(self) -> int:
        return 0 if self.rel_pos is None else self.rel_pos.shape[-1]

    @functools.cached_property
    def lowest(self) -> int:
        """The least token of a key that takes part."""
        return -1 if self.zero_keys else 0

    @functools.cached_property
    def checked(self) -> bool:
        """Whether keys are to be checked for taking part: position tiles hide places that no key has, not holes."""
        if self.kv_indices is not None or self.key_mask is not None:
            return True
        found, added = self.tiles(False)
        return added is None or (found.has_holes and not self.zero_keys)

    def tiles(self, keys_hold: bool) -> tuple[BlockMask, Tensor | None]:
        """The block mask of one direction and the numbers added to its logits."""
        if keys_hold not in self._tiles:
            self._tiles[keys_hold] = self._make_tiles(keys_hold)
        return self._tiles[keys_hold]

    def _make_tiles(self, keys_hold: bool) -> tuple[BlockMask, Tensor | None]:
        found = block_mask(self.axes, keys_hold, self.q.device, 0 if keys_hold else self.extra)
        if self.bias is None:
            return found, found.mask(self.q.dtype) if found.masked else None
        bias = (self.bias.detach() * LOG2E).to(self.q.dtype)
        if self.is_full(bias):
            return found, found.pad(bias.mT if keys_hold else bias)[:, None]
        return found, found.position_tiles(bias)

    def is_full(self, bias: Tensor) -> bool:
        """Whether a bias [N, queries, keys] has a number for each pair instead of an entry per displacement."""
        return len(self.axes) == 1 and bias.ndim == 3


def _strides(*tensors: Tensor | None, number: int = 3) -> list[int]:
    """Strides of all axes but the channels'; of an axis of length 1, 0."""
    found = []
    for x in tensors:
        if x is None:
            found += [0] * number
        else:
            found += [
                0 if n == 1 else s
                for n, s in zip(x.shape[:number], x.stride()[:number], strict=True)
            ]
    return found


def _tables(
    call: Call, keys_hold: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, int, int]:
    """rows, columns, kind, tiles and codes of one direction; M, U; for listed regions U is a region's."""
    if call.kv_indices is not None:
        q_table, k_table = (regions(a, call.q.device) for a in (call.axes[:2], call.axes[2:]))
        rows, columns = (k_table, q_table) if keys_hold else (q_table, k_table)
        return rows, columns, None, None, None, rows.shape[1], columns.shape[1]
    found, added = call.tiles(keys_hold)
    codes = None if call.rel_pos is None else found.codes
    return (
        found.rows,
        found.columns,
        found.kind,
        added,
        codes,
        found.rows.shape[1],
        found.columns.shape[1],
    )


def run_forward(call: Call) -> tuple[Tensor, Tensor]:
    from visattn.ops.fused.attention_kernels import queries_forward_kernel

    rows, columns, kind, tiles, codes, m, u = _tables(call, False)
    listed = call.kv_indices is not None
    topk = 0 if call.kv_indices is None else call.kv_indices.shape[3]
    extra = _block(min(call.extra, 64)) if call.extra else 0

    def run(config: Config) -> tuple[Tensor, ...]:
        out = call.empty(call.images, call.queries, call.heads, call.value_dim)
        lse = call.empty(call.images, call.queries, call.heads, dtype=torch.float32)
        blocks = ceil_div(m, config.block_m)
        _launch(
            queries_forward_kernel, (len(rows) * blocks, call.heads, call.images), config,
            call.q, call.k, call.v, out, lse,
            rows, columns, kind, tiles, call.rel_pos, codes, call.kv_indices, call.weight, call.key_mask,
            call.extra_k, call.extra_v, call.extra_bias,
            *_strides(call.q, call.k, call.v, call.extra_k, call.extra_v), *_strides(call.extra_bias, number=4),
            call.queries, call.keys, call.heads, len(rows), m, u, call.extra, _strides(tiles, number=1)[0],
            *_strides(call.kv_indices, number=2), topk, call.scale,
            REL_POS=call.width, SEGMENT=u if listed else 0, BIASED=tiles is not None,
            WEIGHTED=call.weight is not None, LOWEST=call.lowest, CHECKED=call.checked,
            HAS_KEY_MASK=call.key_mask is not None, EXTRA=extra,
            EXTRA_BIASED=call.extra_bias is not None, **call.options(), BLOCKS=blocks,
        )  # fmt: skip
        return out, lse

    total = topk * u if listed else u
    candidates = _configs(call, m, total)
    shape_class = (*call.shape_class, m, total)
    out, lse = run_tuned("attention_forward", shape_class, call.q.device, candidates, run)
    return out, lse


def _run_backward_queries(
    call: Call, do: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
) -> tuple[Tensor, ...]:
    """delta, and the gradients of q, of rel_pos and of weight."""
    from visattn.ops.fused.attention_kernels import queries_backward_kernel

    rows, columns, kind, tiles, codes, m, u = _tables(call, False)
    listed = call.kv_indices is not None
    topk = 0 if call.kv_indices is None else call.kv_indices.shape[3]
    extra = _block(min(call.extra, 64)) if call.extra else 0
    total = topk * u if listed else u

    def run(config: Config) -> tuple[Tensor, ...]:
        blocks = ceil_div(m, config.block_m)
        delta = torch.empty_like(lse)
        dq = call.empty(*call.q.shape)
        drel_pos = None if call.rel_pos is None else call.empty(*call.rel_pos.shape)
        dweight = None
        if call.weight is not None:
            shape = (call.images, call.heads, len(rows), blocks, total)
            dweight = call.empty(*shape, dtype=torch.float32)
        _launch(
            queries_backward_kernel, (len(rows) * blocks, call.heads, call.images), config,
            call.q, call.k, call.v, do, out, lse, dlse, delta, dq, drel_pos, dweight,
            rows, columns, kind, tiles, call.rel_pos, codes, call.kv_indices, call.weight, call.key_mask,
            call.extra_k, call.extra_v, call.extra_bias,
            *_strides(call.q, call.k, call.v, do, call.extra_k, call.extra_v), *_strides(call.extra_bias, number=4),
            call.queries, call.keys, call.heads, len(rows), m, u, call.extra, _strides(tiles, number=1)[0],
            *_strides(call.kv_indices, number=2), topk, call.scale,
            REL_POS=call.width, SEGMENT=u if listed else 0, BIASED=tiles is not None,
            WEIGHTED=call.weight is not None, LOWEST=call.lowest, CHECKED=call.checked,
            HAS_KEY_MASK=call.key_mask is not None, EXTRA=extra,
            EXTRA_BIASED=call.extra_bias is not None, HAS_LSE=dlse is not None, **call.options(), BLOCKS=blocks,
        )  # fmt: skip
        if call.weight is not None and dweight is not None:
            dweight = dweight.sum(3).unflatten(3, (topk, u)).sum(4)
            if call.weight.shape[1] == 1:
                dweight = dweight.sum(1, keepdim=True)
        return tuple(x for x in (delta, dq, drel_pos, dweight) if x is not None)

    candidates = _configs(call, m, total, sums=2)
    return run_tuned(
        "attention_backward_queries", (*call.shape_class, m, total), call.q.device, candidates, run
    )


def _q_indices(
    kv_indices: Tensor, weight: Tensor | None, number: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Turn kv_indices round: per key region the query regions that list it.

    Returns:
        q_indices int32 [B, heads or 1, query regions * topk] query regions in the order of the key regions they list,
        first int32 [B, heads or 1, number + 1] where those of each key region begin, and their factors.
    """
    topk, kv_indices = kv_indices.shape[3], kv_indices.flatten(2)
    ordered, order = kv_indices.sort(dim=-1, stable=True)
    edges = (
        torch.arange(number + 1, device=kv_indices.device)
        .expand(*kv_indices.shape[:2], -1)
        .contiguous()
    )
    first = torch.searchsorted(ordered, edges)
    weight = None if weight is None else weight.flatten(2).gather(2, order)
    return (order // topk).to(torch.int32), first.to(torch.int32), weight


def _run_backward_keys(call: Call, do: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    from visattn.ops.fused.attention_kernels import keys_backward_kernel

    rows, columns, kind, tiles, codes, m, u = _tables(call, True)
    q_indices, weight, first = None, None, None
    if call.kv_indices is not None:
        q_indices, first, weight = _q_indices(call.kv_indices, call.weight, len(rows))
    entries = 0 if q_indices is None else q_indices.shape[2]

    def run(config: Config) -> tuple[Tensor, ...]:
        dk, dv = call.empty(*call.k.shape), call.empty(*call.v.shape)
        blocks = ceil_div(m, config.block_m)
        _launch(
            keys_backward_kernel, (len(rows) * blocks, call.heads, call.images), config,
            call.q, call.k, call.v, do, lse, delta, dk, dv,
            rows, columns, kind, tiles, call.rel_pos, codes, q_indices, weight, call.key_mask, first,
            *_strides(call.q, call.k, call.v, do),
            call.queries, call.keys, call.heads, m, u, _strides(tiles, number=1)[0],
            *_strides(q_indices, first, number=2), call.scale,
            REL_POS=call.width, SEGMENT=0 if q_indices is None else u, BIASED=tiles is not None,
            WEIGHTED=weight is not None, HAS_KEY_MASK=call.key_mask is not None, **call.options(), BLOCKS=blocks,
        )  # fmt: skip
        return dk, dv

    total = u if q_indices is None else u * max(1, entries // len(rows))
    candidates = _configs(call, m, total, sums=3)
    shape_class = (*call.shape_class, m, total)
    dk, dv = run_tuned("attention_backward_keys", shape_class, call.q.device, candidates, run)
    return dk, dv


def _run_backward_tiles(call: Call, do: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient of bias."""
    from visattn.ops.fused.attention_kernels import tiles_backward_kernel

    found, tiles = call.tiles(False)
    m, u = found.rows.shape[1], found.columns.shape[1]

    def run(config: Config) -> tuple[Tensor, ...]:
        blocks = ceil_div(m, config.block_m) * ceil_div(u, config.block_n) * call.heads
        parts, numbers = found.parts(call.images, max(1, _SPLIT // blocks))
        partial = call.empty(len(parts), call.heads, m, u, dtype=torch.float32)
        _launch(
            tiles_backward_kernel, blocks * len(parts), config,
            call.q, call.k, call.v, do, lse, delta, partial,
            found.rows, found.columns, tiles, found.members, parts, call.key_mask,
            *_strides(call.q, call.k, call.v, do),
            call.images, call.queries, call.keys, call.heads, len(numbers), m, u, call.scale,
            LOWEST=call.lowest, CHECKED=call.checked, HAS_KEY_MASK=call.key_mask is not None, **call.options(),
        )  # fmt: skip
        return (torch.stack([part.sum(0) for part in partial.split(numbers)], dim=1),)

    candidates = _configs(call, m, u, sums=2)
    (summed,) = run_tuned(
        "attention_backward_tiles", (*call.shape_class, m, u), call.q.device, candidates, run
    )
    bias = cast(Tensor, call.bias)
    if call.is_full(bias):
        return summed[:, 0, :, : bias.shape[2]].to(bias.dtype)
    return found.position_gradient(summed).to(bias.dtype)


def _run_backward_extra(
    call: Call, do: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    from visattn.ops.fused.attention_kernels import extra_backward_kernel

    def run(config: Config) -> tuple[Tensor, ...]:
        blocks = ceil_div(call.extra, config.block_m) * call.images * call.heads
        splits = max(1, min(ceil_div(_SPLIT, blocks), ceil_div(call.queries, config.block_n)))
        parts = [
            call.empty(splits, call.images, call.extra, call.heads, n, dtype=torch.float32)
            for n in (call.dim, call.value_dim)
        ]
        _launch(
            extra_backward_kernel, blocks * splits, config,
            call.q, do, lse, delta, call.extra_k, call.extra_v, call.extra_bias, *parts,
            *_strides(call.q, do, call.extra_k, call.extra_v), *_strides(call.extra_bias, number=4),
            call.images, call.queries, call.heads, call.extra, splits, call.scale,
            EXTRA_BIASED=call.extra_bias is not None, **call.options(),
        )  # fmt: skip
        return tuple(x.sum(0).to(call.q.dtype) for x in parts)

    candidates = _configs(call, call.extra, call.queries, sums=3)
    shape_class = (*call.shape_class, call.queries, call.extra)
    dk, dv = run_tuned("attention_backward_extra", shape_class, call.q.device, candidates, run)
    return dk, dv


def _run_backward_extra_bias(call: Call, do: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    from visattn.ops.fused.attention_kernels import extra_bias_backward_kernel

    bias = cast(Tensor, call.extra_bias)
    shared = [a for a, n in enumerate(bias.shape) if n == 1]

    def run(config: Config) -> tuple[Tensor, ...]:
        blocks = (
            ceil_div(call.queries, config.block_m)
            * ceil_div(call.extra, config.block_n)
            * call.heads
        )
        groups = call.images
        if 0 in shared:
            groups = ceil_div(groups, ceil_div(groups, ceil_div(_SPLIT, blocks)))
        found = call.empty(groups, call.queries, call.heads, call.extra, dtype=torch.float32)
        _launch(
            extra_bias_backward_kernel, groups * blocks, config,
            call.q, do, lse, delta, call.extra_k, call.extra_v, call.extra_bias, found,
            *_strides(call.q, do, call.extra_k, call.extra_v), *_strides(call.extra_bias, number=4),
            call.images, groups, call.queries, call.heads, call.extra, call.scale, **call.options(),
        )  # fmt: skip
        return (found.sum(shared, keepdim=True) if shared else found,)

    candidates = _configs(call, call.queries, call.extra, sums=2)
    shape_class = (*call.shape_class, call.queries, call.extra)
    (found,) = run_tuned(
        "attention_backward_extra_bias", shape_class, call.q.device, candidates, run
    )
    return found.to(bias.dtype)


def run_backward(
    call: Call, do: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, wanted: dict[str, bool]
) -> dict[str, Tensor]:
    """Gradients by name, of q, rel_pos and weight in any case and of the others that are wanted."""
    call.do = do = _with_channels_together(do)
    dlse = None if dlse is None else dlse.contiguous()
    if call.key_mask is not None:  # weights exp(s - lse) of queries without any key are to be 0
        blind = lse == -math.inf
        lse = lse.masked_fill(blind, math.inf)
        dlse = None if dlse is None else dlse.masked_fill(blind, 0)
    found: dict[str, Tensor] = {}
    delta, found["q"], *others = _run_backward_queries(call, do, out, lse, dlse)
    for name in ("rel_pos", "weight"):
        if getattr(call, name) is not None:
            found[name] = others.pop(0).to(getattr(call, name).dtype)
    if wanted["k"] or wanted["v"]:
        found["k"], found["v"] = _run_backward_keys(call, do, lse, delta)
    if wanted["bias"]:
        found["bias"] = _run_backward_tiles(call, do, lse, delta)
    if wanted["extra_k"] or wanted["extra_v"]:
        found["extra_k"], found["extra_v"] = _run_backward_extra(call, do, lse, delta)
    if wanted["extra_bias"]:
        found["extra_bias"] = _run_backward_extra_bias(call, do, lse, delta)
    return found
