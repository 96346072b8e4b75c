"""Halo attention: the queries of a block attend to the block and its surroundings. See README.md in this folder.

Gradients of the relative tables: `eager._Relative.gradients`; for Triton autograd through their product with q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

from torch import Tensor

from visattn.ops import checks
from visattn.ops.autocast import to_autocast, without_autocast
from visattn.ops.checks import check_tensors, default_scale, per_axis
from visattn.ops.dispatch import AttentionProblem, Backends
from visattn.ops.geometry import Halo, is_symbolic, plain
from visattn.ops.halo import eager, reference, triton
from visattn.ops.registration import traced_as_one


@dataclass(frozen=True, eq=False)
class HaloProblem(AttentionProblem):
    """q [B, H', W', N, D], k [B, H, W, N, D], v [B, H, W, N, Dv]; blocks per axis; tables [2 * window - 1, D]."""

    block_size: Sequence[int]
    halo_size: Sequence[int]
    stride: Sequence[int]
    rel_h: Tensor | None
    rel_w: Tensor | None
    mask_border: bool
    scale: float
    return_lse: bool

    def __post_init__(self) -> None:
        q, k, v = self.q, self.k, self.v
        if q.ndim != 5 or k.ndim != 5 or v.shape[:-1] != k.shape[:-1] or k.shape[3:] != q.shape[3:]:
            expected = "q [B, H', W', N, D], k [B, H, W, N, D] and v [B, H, W, N, Dv]"
            raise ValueError(f"expected {expected}, got {checks.shapes(q=q, k=k, v=v)}")
        checks.check_dtypes(q, k, v)
        block, halo, stride = list(self.block_size), list(self.halo_size), list(self.stride)
        for b, h, s in zip(block, halo, stride, strict=True):
            if b < 1 or h < 0 or s < 1 or b % s:
                raise ValueError(
                    f"expected block_size >= 1, halo_size >= 0 and a stride that divides block_size on both axes, got "
                    f"block_size {block}, halo_size {halo}, stride {stride}"
                )
        axes = self.axes
        expected, got = (k.shape[0], *(axis.queries for axis in axes)), (q.shape[0], *self.size)
        if not is_symbolic(*expected, *got) and got != expected:
            origin = f"the keys' map over stride {stride}, rounded up"
            raise ValueError(f"expected q with [B, H', W'] = {expected} ({origin}), got {got}")
        for name, table, axis in zip(("rel_h", "rel_w"), self.tables, axes, strict=True):
            checks.check_floating(**{name: table})
            shape = 2 * axis.window - 1, q.shape[-1]
            checks.check_shape(name, table, shape, "([2 * (block + 2 * halo) - 1, D])")

    @property
    def tables(self) -> tuple[Tensor | None, Tensor | None]:
        """The relative embeddings of each axis."""
        return self.rel_h, self.rel_w

    @property
    def axes(self) -> tuple[Halo, Halo]:
        """How each axis of the keys' map is cut."""
        sizes = plain(self.k.shape[1:3]), self.block_size, self.halo_size, self.stride
        rows, columns = (Halo(*axis) for axis in zip(*sizes, strict=True))
        return rows, columns

    def clipped(self) -> HaloProblem:
        """The same problem with blocks and halos no larger than the map can fill, if keys outside it take no part."""
        axes = self.axes
        a, b = cut = axes[0].clipped(), axes[1].clipped()
        if not self.mask_border or cut == axes:
            return self
        tables: list[Tensor | None] = []
        for table, axis, c in zip(self.tables, axes, cut, strict=True):
            first = axis.block - c.block + 3 * (axis.halo - c.halo)
            tables.append(None if table is None else table[first : first + 2 * c.window - 1])
        sizes, (rel_h, rel_w) = ([a.block, b.block], [a.halo, b.halo], self.stride), tables
        how = rel_h, rel_w, self.mask_border, self.scale, self.return_lse
        return HaloProblem(self.q, self.k, self.v, *sizes, *how)

    def flops(self) -> int:
        """Those of the pairs that take part, and of the decomposed relative position."""
        (b, h, w, n, d), dv = self.q.shape, self.v.shape[-1]
        rows, columns = (axis.pairs(self.mask_border) for axis in self.axes)
        tables = zip(self.axes, self.tables, strict=True)
        slots = sum(axis.window for axis, table in tables if table is not None)
        return 2 * b * n * (rows * columns * (d + dv) + h * w * slots * d)


_backends = Backends("halo_attention", HaloProblem, triton.attend, eager.attend, reference.attend)


@overload
def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int | Sequence[int],
    halo_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    rel_h: Tensor | None = None,
    rel_w: Tensor | None = None,
    mask_border: bool = True,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def halo_attention(
    *args: Any, return_lse: Literal[True], **kwargs: Any
) -> tuple[Tensor, Tensor]: ...
@traced_as_one
def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int | Sequence[int],
    halo_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    rel_h: Tensor | None = None,
    rel_w: Tensor | None = None,
    mask_border: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + q (r_h + r_w)^T) v over the window of a query's block.

    The map is cut into blocks of `block_size` keys from the top left, the last ones possibly partial. All queries of a
    block see the same window: the block and `halo_size` keys around it. Differentiable in every tensor.

    Args:
        q: Queries [B, ceil(H / stride), ceil(W / stride), N, D]; N heads of D channels. Any strides.
        k: Keys [B, H, W, N, D].
        v: Values [B, H, W, N, Dv].
        block_size: Keys of a block per axis; its `block_size / stride` queries share a window.
        halo_size: Keys around the block, per axis and side.
        stride: Keys per query, a divisor of `block_size`.
        rel_h: Relative embeddings of rows [2 * window - 1, D] for a window of block_size + 2 * halo_size keys, shared
            by the heads. Entry: slot in the window - rank of the query in its block + window - 1. Not scaled by
            `scale`. None: no such term.
        rel_w: The same for columns.
        mask_border: True: keys outside the map take no part (the paper). False: they take part with k = v = 0, so that
            their logit is the relative term (timm's trained weights).
        scale: Factor of q k^T. Default: D ** -0.5.
        return_lse: Also return the natural log of the sum of the exponentials of the logits.
        backend: "auto", "triton", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, ceil(H / stride), ceil(W / stride), N, Dv] of v's dtype; under autocast of its dtype, to which q, k and v
        are cast.
        With `return_lse` also [B, ceil(H / stride), ceil(W / stride), N], float32 (float64 for float64).

    Raises:
        ValueError: Shapes or window arguments that do not fit.
        TypeError: q, k, v of different dtypes, or tensors that are not floating point.
        BackendError: The requested backend cannot run this call.

    Source: arXiv:2103.12731 section 2.2 (blocked local attention with halos) and eq. 2 (relative embeddings).
    """
    check_tensors(q=q, k=k, v=v)
    block = per_axis("block_size", block_size, int, 2)
    halo, step = per_axis("halo_size", halo_size, int, 2), per_axis("stride", stride, int, 2)
    scale = default_scale(q.shape[-1], scale)
    q, k, v = to_autocast(q, k, v)
    how = rel_h, rel_w, bool(mask_border), scale, return_lse
    problem = HaloProblem(q, k, v, block, halo, step, *how)
    with without_autocast(q.device):
        return _backends.choose(problem, backend)(problem)
