"""The groups of arguments of the attention kernels. What is None is not compiled into them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Map(NamedTuple):
    """A tensor [B, tokens, N, channels]; strides in units of `Meta.UNIT` numbers, of `rel_pos` in numbers."""

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
    eye: Tensor | None = (
        None  # [128, 128] `tile_unit` on the diagonal, by which tiles are added in a product
    )


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
    parts: Tensor  # int32 [parts, 4]: kind, first of its groups in members, start and stop among their images
    members: Tensor  # int32 [groups * TILES]


class Meta(NamedTuple):
    """What is compiled into the kernels of a call, besides its blocks."""

    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int
    LANES: int  # of positions
    ROWS: int  # of a tile
    TILES: int  # that a program holds, each with its own columns
    ONE_STEP: bool  # all columns are streamed at once
    SPLIT: bool  # programs go over a part of the columns
    SEGMENT: int  # tokens of a listed region, 0 without a list
    WEIGHTED: bool
    EXTRA: int  # extra keys at a time
    CHECKED: bool  # keys are to be checked for taking part
    LOWEST: int  # the least token of a key that does
    HIDDEN: float  # what a position tile adds to the logits of a pair that it hides
    TILE_UNIT: float  # of position tiles
    EYE: bool  # position tiles are added by a product
    UNIT: int  # numbers of which strides are multiples
    WIDE: bool  # offsets within an image have 64 bits
    UPCAST: bool
    PRECISION: str
