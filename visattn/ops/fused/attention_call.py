"""One call of the attention kernels: what they need besides its tensors, and which configs are worth a try."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from visattn.ops.fused.attention_arguments import Extra, Listed, Map, Mask, Meta, Sizes
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
    tile_unit,
)
from visattn.ops.fused.tuning import Config, run_tuned
from visattn.ops.geometry import TOGETHER, AnyAxis, ceil_div

_PROGRAMS = 264  # below so many, columns are split among more, 256 or more of them to each
_POSITION_TILES = Config(1, 4096, 8, 1)  # numbers that a program writes
_WIDE = 2**31  # numbers of an image from which offsets have 64 bits


def _block(channels: int) -> int:
    return max(16, power_of_2(channels))


def _configs(meta: Meta, columns: int, dtype: torch.dtype, sums: int = 1) -> list[Config]:
    """Candidates for tiles of so many columns in a kernel with so many sums; the first is the default."""
    held, is_wide = min(meta.ROWS, 64), dtype == torch.float32
    warps = 2 if held == 16 or (held == 32 and sums == 1) else 4
    if meta.TILES > 1:
        warps = 4
    # Few padded columns in few steps, as far as registers go: a backward pass needs more sums, and exact products of
    # float32 twice as many registers.
    width = padded_columns(columns)
    most = 32 if sums == 3 or is_wide else 64 if sums == 2 or meta.TILES > 1 or meta.D > 64 else 128
    least = 16 if width <= 64 else 32
    sizes = [n for n in (16, 32, 64, 128) if least <= n <= min(width, max(64, most))]
    sizes.sort(key=lambda n: (n > most, ceil_div(columns, n) * (n + 40)))
    # A single step has nothing to overlap with, and three sums leave no room for copies in flight. Copies pass by L1,
    # where tiles held together find the keys that they share.
    in_one = columns <= sizes[0]
    stages = (1, 2) if in_one else (1, 2, 3) if sums == 3 or meta.TILES > 1 else (3, 2, 5, 1)
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


@functools.cache
def _eye(dtype: torch.dtype, device: torch.device) -> Tensor:
    return tile_unit(dtype) * torch.eye(128, dtype=dtype, device=device)


def strides(x: Tensor, number: int) -> tuple[int, ...]:
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
        # The forward pass wrote them so, but slices of what `torch.vmap` stacked may lie otherwise.
        self.o = None if o is None else o.contiguous()
        self.lse = None if lse is None else lse.contiguous()
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
        tensors += (self.weight, self.kv_indices, self.key_mask)
        tensors += (self.do, self.dlse, self.o, self.lse)
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

    def map(self, x: Tensor) -> Map:
        return Map(x, *self._in_units(x.shape, x.stride()))

    @_once
    def _in_units(self, shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n // self.unit for n in _outer_strides(shape, stride, 3))

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
            mask = mask._replace(rel_pos=Map(self.rel_pos, *strides(self.rel_pos, 3)))
        if self.bias is not None:
            tiles = self._position_tiles(self.bias.detach(), keys_hold)
            mask = mask._replace(tiles=tiles, stride_n=strides(tiles, 1)[0], width=tiles.shape[3])
        if mask.tiles is not None:
            mask = mask._replace(eye=_eye(self.q.dtype, self.q.device))
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
        return mask._replace(tiles=tiles, stride_n=strides(tiles, 1)[0], width=tiles.shape[3])

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

        found, lowest = self.block_mask(keys_hold), hidden(self.q.dtype)
        factor = 1 / (self.scale * tile_unit(self.q.dtype))
        if self.is_full:
            bias = (bias * factor).clamp(min=lowest).to(self.q.dtype)
            return found.pad(bias.mT if keys_hold else bias, lowest)[:, None]
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
            factor,
            lowest,
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
        b, n = strides(self.kv_indices, 2)
        return Listed(self.kv_indices, self.weight, b, n, self.kv_indices.shape[3])

    def extra_keys(self) -> Extra | None:
        if self.extra_k is None or self.extra_v is None:
            return None
        b, t, n, e = (0,) * 4 if self.extra_bias is None else strides(self.extra_bias, 4)
        return Extra(self.map(self.extra_k), self.map(self.extra_v), self.extra_bias, b, t, n, e)

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
            if self.kv_indices is None:
                together = self.block_mask(keys_hold).together
            elif self.few and rows == 16 and self.sizes(keys_hold).tiles >= TOGETHER:
                together = TOGETHER
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
            ONE_STEP=False,  # until the config is known
            SPLIT=keys_hold is not None and self.splits(keys_hold) > 1,
            SEGMENT=segment,
            WEIGHTED=self.weight is not None,
            EXTRA=_block(min(self.extra, 64)) if self.extra else 0,
            CHECKED=checked,
            LOWEST=-1 if self.zero_keys else 0,
            HIDDEN=hidden(self.q.dtype) * tile_unit(self.q.dtype),
            TILE_UNIT=tile_unit(self.q.dtype),
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

        def run(config: Config) -> tuple[Tensor, ...]:
            meta = self._compiled(keys_hold, shape[1], sums, config)

            def go(programs: int | tuple[int, ...], *arguments: Any) -> None:
                arguments = (*arguments, self.scale, meta, config.block_m, config.block_n)
                launch(kernel, programs, config, arguments, self.known)

            return one(config, go)

        name, shape_class, candidates = self._choices(kernel.__name__, keys_hold, shape, sums)
        return run_tuned(name, shape_class, self.q.device, candidates, run)

    @_once
    def _compiled(self, keys_hold: bool | None, columns: int, sums: int, config: Config) -> Meta:
        """The constants of a kernel with a config."""
        meta = self.meta(keys_hold)
        # How many regions list a region of keys is known to the GPU alone.
        at_once = columns <= config.block_n and not (sums == 3 and meta.SEGMENT)
        return meta._replace(ONE_STEP=at_once)

    @_once
    def _choices(
        self, kernel: str, keys_hold: bool | None, shape: tuple[int, int], sums: int
    ) -> tuple[str, tuple[int | str, ...], list[Config]]:
        """Name, shape class and candidates of a kernel."""
        candidates = _configs(self.meta(keys_hold), shape[1], self.q.dtype, sums)
        return f"attention_{kernel.removesuffix('_kernel')}", self._shape_class(*shape), candidates


_One = Callable[[Config, Callable[..., None]], tuple[Tensor, ...]]
