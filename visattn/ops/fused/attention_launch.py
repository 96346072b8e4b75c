"""Launches of the attention kernels: what a call needs besides its tensors, and which configs are worth a try."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from visattn.ops.fused.launch import launch, power_of_2
from visattn.ops.fused.support import MOST_BYTES, is_interpreting, precision
from visattn.ops.fused.tables import (
    BlockMask,
    block_mask,
    decode,
    hidden,
    lane_terms,
    padded_columns,
    regions,
)
from visattn.ops.fused.tuning import Config, run_tuned
from visattn.ops.geometry import TOGETHER, AnyAxis, ceil_div

# Programs that a reduction is cut into, if it has the work. No property of a GPU, so that sums have one order on all.
_SPLIT = 512
_SPLIT_TILES = 2048  # of images, whose sums are long
_PROGRAMS = 264  # below so many, columns are split among more, 256 or more of them to each
_POSITION_TILES = Config(1, 4096, 8, 1)  # numbers that a program writes
_WIDE = 2**31  # numbers of an image from which offsets have 64 bits


# The groups of arguments of the kernels. What is None is not compiled into them.


class Map(NamedTuple):
    """A tensor [B, tokens, N, channels]; strides in numbers."""

    ptr: Tensor
    stride_b: int
    stride_t: int
    stride_n: int


class Mask(NamedTuple):
    """The block mask of a direction and what it adds to logits; see `BlockMask`."""

    rows: Tensor  # int32 [T, ROWS]
    columns: Tensor  # int32 [T, columns_number]
    columns_number: int
    kind: Tensor | None = None  # int32 [T]
    tiles: Tensor | None = None  # [1 or N, kinds, ROWS, width]
    stride_n: int = 0
    width: int = 0
    hidden: Tensor | None = None  # [kinds, ROWS, LANES]
    spread: Tensor | None = None  # [width, LANES]
    rel_pos: Map | None = None  # a query's terms, of rows and of columns
    terms: Tensor | None = None  # int16 [queries, LANES], which of them each lane is
    codes: Tensor | None = None  # int32 of the side that holds the keys
    key_mask: Tensor | None = None  # uint8 [B, keys]


class Listed(NamedTuple):
    """Regions that each region meets; keys' regions, or in the keys' direction queries'."""

    indices: Tensor  # [B, N or 1, entries]
    weight: Tensor | None
    stride_b: int
    stride_n: int
    topk: int = 0
    first: Tensor | None = (
        None  # int32 [B, N or 1, regions + 1], where the entries of each region begin
    )
    first_b: int = 0
    first_n: int = 0


class Extra(NamedTuple):
    """Keys that all queries see."""

    k: Map
    v: Map
    bias: Tensor | None
    stride_b: int
    stride_t: int
    stride_n: int
    stride_e: int


class Sizes(NamedTuple):
    images: int
    queries: int
    keys: int
    heads: int
    extra: int
    tiles: int  # of the direction, of lists
    splits: int  # parts of the columns, of a program each


class Out(NamedTuple):
    o: Map
    lse: Tensor  # [B, queries, N]


class Saved(NamedTuple):
    o: Map
    lse: Tensor
    dlse: Tensor | None


class Stats(NamedTuple):
    lse: Tensor  # [B, queries, N], times log2(e)
    delta: Tensor


class QueryGrads(NamedTuple):
    dq: Map
    drel_pos: Map | None
    dweight: Tensor | None  # [B, N, tiles, blocks of a tile, columns]


class KeyGrads(NamedTuple):
    dk: Map
    dv: Map


class Parts(NamedTuple):
    parts: Tensor  # int32 [parts, 4]: kind, first of its tiles in members, start and stop among their images
    members: Tensor  # int32 [T]


class Meta(NamedTuple):
    """What is compiled into the kernels of a call, besides its blocks."""

    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int
    LANES: int  # of positions
    ROWS: int  # of a tile
    TILES: int  # that a program holds, each with its own columns
    SPLIT: bool  # programs go over a part of the columns
    SEGMENT: int  # tokens of a listed region, 0 without a list
    WEIGHTED: bool
    EXTRA: int  # extra keys at a time
    CHECKED: bool  # keys are to be checked for taking part
    LOWEST: int  # the least token of a key that does
    HIDDEN: float  # what hides a pair in a position tile
    EYE: bool  # position tiles are added by a product
    UNIT: int  # numbers of which strides are multiples
    WIDE: bool  # offsets within an image have 64 bits
    UPCAST: bool
    PRECISION: str


def _block(channels: int) -> int:
    return max(16, power_of_2(channels))


def _configs(meta: Meta, columns: int, dtype: torch.dtype, sums: int = 1) -> list[Config]:
    """Candidates for tiles of so many columns in a kernel with so many sums; the first is the default."""
    held, is_wide = min(meta.ROWS, 64), dtype == torch.float32
    warps = 2 if held == 16 or (held == 32 and sums == 1) else 4
    if meta.TILES > 1:
        warps = 4
    # Few padded columns in few steps, as far as registers go: a backward pass needs twice as many, more sums and exact
    # products of float32 still more.
    most = 32 if sums == 3 or is_wide else 64
    width = padded_columns(columns)
    sizes = [
        n
        for n in (16, 32, 64, 128)
        if n <= min(64, width) or (sums == 1 and meta.D <= 64 and not is_wide)
    ]
    sizes = [n for n in sizes if n <= width]
    sizes.sort(key=lambda n: (n > most, ceil_div(columns, n) * (n + 40)))
    # With one stage a tile is loaded in the layout of a plain load, and its softmax computed there too; with more it is
    # copied. Three sums leave no room for copies in flight. Copies pass by L1, where tiles held together find the keys
    # that they share.
    stages = (
        (1, 2, 3)
        if sums == 3 or meta.TILES > 1
        else (2, 1)
        if columns <= sizes[0]
        else (3, 2, 5, 1)
    )
    if max(meta.BLOCK_D, meta.BLOCK_DV) * dtype.itemsize > MOST_BYTES // 2:
        sizes, stages = [n for n in (16, 32) if n <= width], (1,)  # for the sake of shared memory
    found = [Config(held, n, 2 * warps if is_wide else warps, s) for n in sizes for s in stages]
    if is_wide or held * meta.TILES < 64:
        found += [Config(held, n, warps if is_wide else 2 * warps, stages[0]) for n in sizes]
    if meta.ROWS % 128 == 0:
        found += [Config(128, n, 8, 2) for n in sizes[:2]]
    return found


def _with_channels_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _map(x: Tensor) -> Map:
    return Map(x, *_outer_strides(x.shape, x.stride(), 3))


def _strides(x: Tensor, number: int) -> tuple[int, ...]:
    return _outer_strides(x.shape, x.stride(), number)


@functools.lru_cache(maxsize=4096)
def _outer_strides(shape: tuple[int, ...], stride: tuple[int, ...], number: int) -> tuple[int, ...]:
    """Those of the first axes; of axes of length 1, 0."""
    return tuple(0 if n == 1 else s for n, s in zip(shape[:number], stride, strict=False))


@functools.lru_cache(maxsize=4096)
def _known(*form: Any) -> dict[Any, Any]:
    """What `_once` keeps for the calls of one form, and the kernels that are ready to be launched for them."""
    return {}


def _once(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method of `Call` run once for all calls of a form: it may neither keep nor read a tensor of its call."""

    @functools.wraps(method)
    def find(self: Call, *args: Any) -> Any:
        key = method, *args
        if key not in self.known:
            self.known[key] = method(self, *args)
        return self.known[key]

    return find


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


class Call:
    """One call: shapes, tables, and the arguments that its kernels share.

    Calls have one form if their tensors are alike in all but numbers (shapes, strides, dtypes, whether they begin at
    16-byte borders) and the rest of their arguments is equal. Everything that follows from the form is found once.
    """

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
        do: Tensor | None = None,
        dlse: Tensor | None = None,
        o: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> None:
        self.q, self.k, self.v = map(_with_channels_together, (q, k, v))
        self.extra_k = None if extra_k is None else _with_channels_together(extra_k)
        self.extra_v = None if extra_v is None else _with_channels_together(extra_v)
        self.bias, self.extra_bias, self.scale = bias, extra_bias, scale
        self.rel_pos = None if rel_pos is None else rel_pos.contiguous()
        self._code, self.zero_keys = tuple(axes), zero_keys
        self.images, self.queries, self.heads, self.dim = q.shape
        self.keys, self.value_dim = k.shape[1], v.shape[-1]
        self.kv_indices = None if kv_indices is None else kv_indices.contiguous()
        self.weight = None if weight is None else weight.contiguous()
        self.key_mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        self.do = None if do is None else _with_channels_together(do)
        self.dlse = None if dlse is None else dlse.contiguous()
        self.o, self.lse = o, lse
        self.extra = 0 if extra_k is None else extra_k.shape[1]
        self._masks: dict[bool, Mask] = {}
        tensors = (
            self.q,
            self.k,
            self.v,
            bias,
            self.rel_pos,
            self.extra_k,
            self.extra_v,
            extra_bias,
        )
        tensors += (self.weight, self.kv_indices, self.key_mask, self.do, self.dlse, o, lse)
        forms = [
            x if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0)
            for x in tensors
        ]
        numbers = precision() if q.dtype == torch.float32 else None
        self.known = _known(*forms, self._code, zero_keys, q.device, numbers)

    @property
    @_once
    def axes(self) -> tuple[AnyAxis, ...]:
        return decode(self._code)

    def _shape_class(self, *shape: int) -> tuple[int | str, ...]:
        """Of a kernel for tiles of a shape."""
        return (
            str(self.q.dtype).removeprefix("torch."),
            *([precision()] if self.q.dtype == torch.float32 else []),
            self.dim,
            self.value_dim,
            f"bias{int(self.bias is not None)}",
            f"rel_pos{0 if self.rel_pos is None else self.rel_pos.shape[-1]}",
            f"extra{self.extra and _block(min(self.extra, 64))}",
            f"weight{int(self.weight is not None)}",
            f"list{int(self.kv_indices is not None)}",
            *([] if self.key_mask is None else ["key_mask"]),
            *shape,
        )

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.q.dtype, device=self.q.device)

    @property
    @_once
    def wide(self) -> bool:
        """Whether places in an image need 64 bits, in one of the given tensors or of the contiguous results."""
        given = (self.q, self.k, self.v, self.do, self.extra_bias)
        terms = 0 if self.rel_pos is None else self.rel_pos.shape[-1]
        results = max(self.queries, self.keys) * self.heads * max(self.dim, self.value_dim, terms)
        return max(results, *(x.stride(1) * x.shape[1] for x in given if x is not None)) >= _WIDE

    @property
    @_once
    def unit(self) -> int:
        """How many numbers are 16 bytes, if all rows of channels begin at such borders; else 1."""
        unit = 16 // self.q.element_size()
        found = [
            x
            for x in (self.q, self.k, self.v, self.do, self.extra_k, self.extra_v)
            if x is not None
        ]
        numbers = (self.dim, self.value_dim, *(s for x in found for s in x.stride()[:3]))
        whole = all(n % unit == 0 for n in numbers) and all(x.data_ptr() % 16 == 0 for x in found)
        return unit if whole else 1

    def mask(self, keys_hold: bool) -> Mask:
        """The block mask of one direction and what it adds to logits."""
        if keys_hold not in self._masks:
            self._masks[keys_hold] = self._make_mask(keys_hold)
        return self._masks[keys_hold]

    def _make_mask(self, keys_hold: bool) -> Mask:
        mask = self._fixed_mask(keys_hold)
        if self.key_mask is not None:
            mask = mask._replace(key_mask=self.key_mask)
        if self.rel_pos is not None:
            mask = mask._replace(rel_pos=_map(self.rel_pos))
        if self.bias is not None:
            tiles = self._position_tiles(self.bias.detach(), keys_hold)
            mask = mask._replace(tiles=tiles, stride_n=_strides(tiles, 1)[0], width=tiles.shape[3])
        return mask

    @_once
    def _fixed_mask(self, keys_hold: bool) -> Mask:
        """Without the tensors of the call."""
        if self.kv_indices is not None:
            of_queries, of_keys = (
                regions(a, self.q.device) for a in (self.axes[:2], self.axes[2:])
            )
            rows, columns = (
                (of_keys[0], of_queries[1]) if keys_hold else (of_queries[0], of_keys[1])
            )
            return Mask(rows, columns, columns.shape[1])
        found = self.block_mask(keys_hold)
        mask = Mask(found.rows, found.columns, found.columns.shape[1], found.kind)
        if self.rel_pos is not None:
            terms = lane_terms(self.axes, self.q.device)
            mask = mask._replace(codes=found.codes, terms=terms)
        if self.bias is not None or not found.masked:
            return mask
        if self.rel_pos is None and self.q.element_size() == 2:
            lanes = found.lanes(self.q.dtype)
            if lanes is not None:
                return mask._replace(hidden=lanes[0], spread=lanes[1])
        tiles = found.mask(self.q.dtype)
        return mask._replace(tiles=tiles, stride_n=_strides(tiles, 1)[0], width=tiles.shape[3])

    @_once
    def block_mask(self, keys_hold: bool) -> BlockMask:
        extra = 0 if keys_hold else self.extra
        return block_mask(self.axes, keys_hold, self.q.device, extra, self.few)

    @property
    def few(self) -> bool:
        """Whether tiles of few rows are held together: what they read is not much, and they meet nothing else."""
        return max(self.dim, self.value_dim) <= 64 and not self.extra and self.rel_pos is None

    def _position_tiles(self, bias: Tensor, keys_hold: bool) -> Tensor:
        from visattn.ops.fused.attention_kernels import position_tiles_kernel

        found = self.block_mask(keys_hold)
        if self.is_full:
            bias = (bias / self.scale).to(self.q.dtype)
            return found.pad(bias.mT if keys_hold else bias, hidden(bias.dtype))[:, None]
        lookup, config = found.lookup, _POSITION_TILES
        tiles = self.empty(self.heads, *lookup.shape)
        table, entries, number = (
            bias.flatten(1).contiguous(),
            lookup.number,
            tiles.numel() // self.heads,
        )
        values = (
            table,
            lookup.index,
            tiles,
            entries,
            number,
            1 / self.scale,
            hidden(tiles.dtype),
            config.block_n,
        )
        programs = (ceil_div(number, config.block_n), self.heads, 1)
        prepared = self.known.setdefault(keys_hold, {})
        launch(position_tiles_kernel, programs, config, values, prepared)
        return tiles

    @property
    @_once
    def is_full(self) -> bool:
        """Whether the bias [N, queries, keys] has a number for each pair instead of an entry per displacement."""
        return self.bias is not None and len(self.axes) == 1 and self.bias.ndim == 3

    def listed(self) -> Listed | None:
        if self.kv_indices is None:
            return None
        b, n = _strides(self.kv_indices, 2)
        return Listed(self.kv_indices, self.weight, b, n, self.kv_indices.shape[3])

    def extra_keys(self) -> Extra | None:
        if self.extra_k is None or self.extra_v is None:
            return None
        b, t, n, e = (0,) * 4 if self.extra_bias is None else _strides(self.extra_bias, 4)
        return Extra(_map(self.extra_k), _map(self.extra_v), self.extra_bias, b, t, n, e)

    @_once
    def sizes(self, keys_hold: bool | None) -> Sizes:
        tiles = 0
        if keys_hold is not None and self.kv_indices is not None:
            tiles = len(regions(self.axes[2:] if keys_hold else self.axes[:2], self.q.device)[1])
        splits = 1 if keys_hold is None else self.splits(keys_hold)
        return Sizes(self.images, self.queries, self.keys, self.heads, self.extra, tiles, splits)

    @_once
    def splits(self, keys_hold: bool) -> int:
        """Into how many parts the columns of a direction are cut, for there to be work for a GPU."""
        if self.kv_indices is not None or self.rel_pos is not None or self.extra:
            return 1
        tiles, rows = self.block_mask(keys_hold).rows.shape
        programs = tiles * ceil_div(rows, 64) * self.heads * self.images
        columns = self.block_mask(keys_hold).columns.shape[1]
        return max(1, min(ceil_div(_PROGRAMS, programs), columns // 256))

    def partial(self, keys_hold: bool, *shape: int) -> Tensor:
        """For results [B, ...] of a direction: as many of them as there are splits."""
        splits = self.splits(keys_hold)
        return self.empty(
            splits * shape[0], *shape[1:], dtype=None if splits == 1 else torch.float32
        )

    def joined(self, keys_hold: bool, x: Tensor) -> Tensor:
        """The sum of the splits' results."""
        splits = self.splits(keys_hold)
        return x if splits == 1 else x.unflatten(0, (splits, -1)).sum(0).to(self.q.dtype)

    @_once
    def grid(self, keys_hold: bool, config: Config) -> tuple[int, int, int]:
        meta = self.meta(keys_hold)
        tiles = self.sizes(keys_hold).tiles or len(self.mask(keys_hold).rows)
        blocks = meta.ROWS // config.block_m
        images = self.images * self.splits(keys_hold)
        return ceil_div(tiles, meta.TILES) * blocks, self.heads, images

    def columns(self, mask: Mask) -> int:
        """That a tile of queries meets."""
        return mask.columns_number * (1 if self.kv_indices is None else self.kv_indices.shape[3])

    @_once
    def meta(self, keys_hold: bool | None) -> Meta:
        """The constants of a kernel with the tiles of a direction, or of one without tiles."""
        mask = None if keys_hold is None else self.mask(keys_hold)
        lanes = rows = segment = 0
        half = self.q.element_size() == 2
        checked = False
        together = 1
        if mask is not None:
            rows, has_tiles = mask.rows.shape[1], mask.tiles is not None or mask.hidden is not None
            together = TOGETHER if self.few and rows == 16 else 1
            if mask.hidden is not None:
                lanes = mask.hidden.shape[2]
            elif mask.terms is not None:
                lanes = mask.terms.shape[1]
            if self.kv_indices is not None:
                segment = mask.columns_number
            # Tiles hide places that no key has, but not those outside the map, nor what a key mask hides.
            checked = not has_tiles or self.key_mask is not None
            checked = checked or (self.block_mask(False).has_holes and not self.zero_keys)
        return Meta(
            D=self.dim,
            DV=self.value_dim,
            BLOCK_D=_block(self.dim),
            BLOCK_DV=_block(self.value_dim),
            LANES=lanes,
            ROWS=rows or _block(min(self.extra, 64)),
            TILES=together,
            SPLIT=keys_hold is not None and self.splits(keys_hold) > 1,
            SEGMENT=segment,
            WEIGHTED=self.weight is not None,
            EXTRA=_block(min(self.extra, 64)) if self.extra else 0,
            CHECKED=checked,
            LOWEST=-1 if self.zero_keys else 0,
            HIDDEN=hidden(self.q.dtype),
            EYE=mask is not None
            and mask.tiles is not None
            and half
            and self.rel_pos is None
            and together == 1,
            UNIT=self.unit,
            WIDE=self.wide,
            UPCAST=is_interpreting() and self.q.dtype == torch.bfloat16,
            PRECISION=precision() if self.q.dtype == torch.float32 else "ieee",
        )

    def run(
        self, kernel: Any, keys_hold: bool | None, shape: tuple[int, int], sums: int, one: _One
    ) -> tuple[Tensor, ...]:
        """What `one` returns for the best config that is known of a kernel for tiles of a shape.

        `one(config, go)` allocates what the kernel writes and calls `go(programs, ...)` with the kernel's arguments up
        to those that are the same for all.
        """
        meta = self.meta(keys_hold)

        def run(config: Config) -> tuple[Tensor, ...]:
            def go(programs: int | tuple[int, ...], *arguments: Any) -> None:
                arguments = (*arguments, self.scale, meta, config.block_m, config.block_n)
                launch(kernel, programs, config, arguments, self.known)

            return one(config, go)

        name, shape_class, candidates = self._choices(kernel.__name__, keys_hold, shape, sums)
        return run_tuned(name, shape_class, self.q.device, candidates, run)

    @_once
    def _choices(
        self, kernel: str, keys_hold: bool | None, shape: tuple[int, int], sums: int
    ) -> tuple[str, tuple[int | str, ...], list[Config]]:
        """Name, shape class and candidates of a kernel."""
        candidates = _configs(self.meta(keys_hold), shape[1], self.q.dtype, sums)
        return f"attention_{kernel.removesuffix('_kernel')}", self._shape_class(*shape), candidates


_One = Callable[[Config, Callable[..., None]], tuple[Tensor, ...]]


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
        maps = (_map(call.q), _map(call.k), _map(call.v))
        go(call.grid(False, config), *maps, Out(_map(o), lse), mask, listed, extra, sizes)
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
        grads = QueryGrads(_map(dq), None if drel_pos is None else _map(drel_pos), dweight)
        maps = (_map(call.q), _map(call.k), _map(call.v), _map(do))
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
    (b, n), (first_b, first_n) = _strides(indices, 2), _strides(first, 2)
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
        maps = (_map(call.q), _map(call.k), _map(call.v), _map(do))
        go(
            call.grid(True, config),
            *maps,
            stats,
            KeyGrads(_map(dk), _map(dv)),
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
        maps = (_map(call.q), _map(call.k), _map(call.v), _map(do))
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
        grads = KeyGrads(_map(dk), _map(dv))
        go(blocks * splits, _map(call.q), _map(do), stats, grads, extra, call.sizes(None), splits)
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
        go(groups * blocks, _map(call.q), _map(do), stats, dbias, extra, call.sizes(None), groups)
        return (dbias.sum(shared, keepdim=True) if shared else dbias,)

    (dbias,) = call.run(extra_bias_backward_kernel, None, (meta.ROWS, call.extra), 2, one)
    return dbias.to(bias.dtype)


def run_backward(call: Call, wanted: dict[str, bool]) -> Grads:
    """Gradients of q, rel_pos and weight in any case and of the others that are wanted."""
    do, o, lse = (cast(Tensor, x) for x in (call.do, call.o, call.lse))
    stats, grads = _queries_backward(call, do, Saved(_map(o), lse, call.dlse))
    if wanted["k"] or wanted["v"]:
        grads.k, grads.v = _keys_backward(call, do, stats)
    if wanted["bias"]:
        grads.bias = _tiles_backward(call, do, stats)
    if wanted["extra_k"] or wanted["extra_v"]:
        grads.extra_k, grads.extra_v = _extra_backward(call, do, stats)
    if wanted["extra_bias"]:
        grads.extra_bias = _extra_bias_backward(call, do, stats)
    return grads
