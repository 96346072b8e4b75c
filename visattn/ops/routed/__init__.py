"""Routed attention: the queries of a region attend to a list of key regions. See README.md in this folder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from visattn.ops import checks
from visattn.ops.autocast import to_autocast, without_autocast
from visattn.ops.checks import check_floating, check_tensors, default_scale, per_axis
from visattn.ops.dispatch import AttentionProblem, Backends
from visattn.ops.geometry import Partition, ceil_div, is_symbolic, plain, sym_max
from visattn.ops.registration import traced_as_one
from visattn.ops.routed import eager, reference, triton
from visattn.ops.routed.routing import Axes, Router, choose, pool_regions, region_means


def _axes(name: str, x: Tensor, size: Sequence[int]) -> Axes:
    """Cut both axes of a map [B, H, W, ...] into regions."""
    if len(size) != 2 or any(not is_symbolic(n) and n < 1 for n in size):
        raise ValueError(f"expected {name} of two ints from 1, got {list(size)}")
    rows, columns = (Partition(n, s) for n, s in zip(plain(x.shape[1:3]), size, strict=True))
    return rows, columns


def _count(axes: Axes) -> int:
    """Count the regions of a map."""
    return axes[0].layout()[0] * axes[1].layout()[0]


def _check_maps(q: Tensor, k: Tensor) -> None:
    """Check for maps of queries and keys of one batch, number of heads and width."""
    check_tensors(q=q, k=k)
    if q.ndim != 5 or k.ndim != 5 or q.shape[0] != k.shape[0] or q.shape[3:] != k.shape[3:]:
        expected = "q [B, H, W, N, D] and k [B, Hk, Wk, N, D]"
        raise ValueError(f"expected {expected}, got {checks.shapes(q=q, k=k)}")


def _check_values(q: Tensor, k: Tensor, v: Tensor, size: str) -> None:
    """Check for values on the keys' map, whose axes the message calls `size`, and for one dtype."""
    if v.shape[:-1] != k.shape[:-1]:
        expected = f"v [B, {size}, N, Dv]"
        raise ValueError(f"expected {expected}, got {tuple(v.shape)} for k {tuple(k.shape)}")
    checks.check_dtypes(q, k, v)


def _has_values(x: Tensor) -> bool:
    """Tell whether they can be looked at without waiting for a device: not in graphs, nor in transforms."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
        return False
    in_transform = torch._C._functorch.peek_interpreter_stack() is not None
    return x.device.type == "cpu" and not in_transform and not _get_current_dispatch_mode_stack()


def _attention_flops(q: Tensor, v: Tensor, keys: int) -> int:
    """Count the FLOPs for so many keys per query."""
    return 2 * math.prod(q.shape[:4]) * keys * (q.shape[4] + v.shape[4])


@dataclass(frozen=True, eq=False)
class RoutedProblem(AttentionProblem):
    """q [B, H, W, N, D], k [B, Hk, Wk, N, D], v [B, Hk, Wk, N, Dv]; index, weight [B, 1 or N, query regions, topk]."""

    index: Tensor
    region_size: Sequence[int]
    kv_region_size: Sequence[int]
    weight: Tensor | None
    mask_border: bool
    scale: float
    return_lse: bool

    def __post_init__(self) -> None:
        q, k, v, index, weight = self.q, self.k, self.v, self.index, self.weight
        _check_maps(q, k)
        check_tensors(v=v, index=index)
        check_floating(weight=weight)
        _check_values(q, k, v, "Hk, Wk")
        batch, heads, regions, keys = *q.shape[::3], _count(self.q_axes), _count(self.k_axes)
        got = tuple(index.shape)
        # A symbolic number of lists is taken as it comes.
        lists = got[2:3] if is_symbolic(*got[2:], regions) else (regions,)
        if index.ndim != 4 or got[:3] not in [(batch, n, *lists) for n in (1, heads)]:
            expected = (batch, f"1 or {heads}", regions, "topk")
            raise ValueError(f"expected index {expected} (a list per query region), got {got}")
        if not got[3] or index.dtype != torch.int64:
            expected = "index of at least one int64 region"
            raise ValueError(f"expected {expected}, got {got[3]} of {index.dtype}")
        if weight is not None and weight.shape != index.shape:
            raise ValueError(f"expected weight like index {got}, got {tuple(weight.shape)}")
        if _has_values(index) and index.numel():
            low, high = (int(n) for n in index.aminmax())
            if low < 0 or high >= keys:
                expected = f"index of key regions from 0 to {keys - 1}"
                raise ValueError(f"expected {expected}, got {low} to {high}")

    @property
    def q_axes(self) -> Axes:
        """How each axis of the queries' map is cut."""
        return _axes("region_size", self.q, self.region_size)

    @property
    def k_axes(self) -> Axes:
        """How each axis of the keys' map is cut."""
        return _axes("kv_region_size", self.k, self.kv_region_size)

    def flops(self) -> int:
        """Those of full regions."""
        sizes = zip(self.k.shape[1:3], self.kv_region_size, strict=True)
        tokens = math.prod(min(n, s) for n, s in sizes)
        return _attention_flops(self.q, self.v, self.index.shape[-1] * tokens)


_routed = Backends("routed_attention", RoutedProblem, triton.attend, eager.attend, reference.attend)


def _region_sizes(spatial: Sequence[int], n_win: Sequence[int], rule: str) -> list[int]:
    """Find the tokens of a region per axis, for a wished number of regions."""
    if rule not in ("mask", "zero") or len(n_win) != 2 or any(n < 1 for n in n_win):
        expected = "n_win of two ints from 1 and rule 'mask' or 'zero'"
        raise ValueError(f"expected {expected}, got {list(n_win)} and {rule!r}")
    if rule == "mask":
        return [ceil_div(n, w) for n, w in zip(spatial, n_win, strict=True)]
    return [sym_max(1, n // w) for n, w in zip(spatial, n_win, strict=True)]


@dataclass(frozen=True, eq=False)
class BilevelProblem(AttentionProblem):
    """q, k [B, H, W, N, D], v [B, H, W, N, Dv], and a router's weight [N * D, N * D] and bias [N * D]."""

    n_win: Sequence[int]
    topk: int
    rule: str
    per_head: bool
    soft: bool
    diff: bool
    router_weight: Tensor | None
    router_bias: Tensor | None
    kv_pool: str
    kv_size: int
    scale: float
    return_lse: bool

    def __post_init__(self) -> None:
        q, k, v = self.q, self.k, self.v
        _check_maps(q, k)
        check_floating(v=v, router_weight=self.router_weight, router_bias=self.router_bias)
        if k.shape != q.shape or self.topk < 1:
            got = f"{checks.shapes(q=q, k=k)}, topk {self.topk}"
            raise ValueError(f"expected k like q and topk >= 1, got {got}")
        _check_values(q, k, v, "H, W")
        _region_sizes(self.size, self.n_win, self.rule)

    @property
    def axes(self) -> Axes:
        """How each axis of the map is cut."""
        return _axes("region_size", self.q, _region_sizes(self.size, self.n_win, self.rule))

    @property
    def router(self) -> Router:
        """Weight and bias of the router."""
        return self.router_weight, self.router_bias

    def routed(self) -> RoutedProblem:
        """Routed attention to the regions that were found best."""
        q, k, v, axes, k_axes, scale = self.q, self.k, self.v, self.axes, self.axes, self.scale
        means = region_means((q, k), (axes, axes), self.diff)
        index, weight = choose(means, self.topk, scale, self.per_head, self.router)
        if self.kv_pool != "none":
            k, k_axes = pool_regions(k, axes, self.kv_pool, self.kv_size)
            v, _ = pool_regions(v, axes, self.kv_pool, self.kv_size)
        sizes = [axis.window for axis in axes], [axis.window for axis in k_axes]
        factors = weight if self.soft else None
        how = factors, self.rule == "mask", scale, self.return_lse
        return RoutedProblem(q, k, v, index, *sizes, *how)

    def flops(self) -> int:
        """Those of attention with full regions; routing is left out."""
        size, topk = [axis.window for axis in self.axes], min(self.topk, _count(self.axes))
        if self.kv_pool.startswith("ada_"):
            size = [self.kv_size] * 2
        elif self.kv_pool != "none":
            size = [s // self.kv_size for s in size]
        return _attention_flops(self.q, self.v, topk * math.prod(size))


_bilevel = Backends(
    "bilevel_routing_attention",
    BilevelProblem,
    triton=lambda problem: triton.attend(problem.routed()),
    eager=lambda problem: eager.attend(problem.routed()),
    reference=lambda problem: reference.attend(problem.routed()),
    decomposition=eager.attend_bilevel,
)


@overload
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    region_size: int | Sequence[int],
    kv_region_size: int | Sequence[int] | None = None,
    weight: Tensor | None = None,
    mask_border: bool = True,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def routed_attention(
    *args: Any, return_lse: Literal[True], **kwargs: Any
) -> tuple[Tensor, Tensor]: ...
@traced_as_one
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    region_size: int | Sequence[int],
    kv_region_size: int | Sequence[int] | None = None,
    weight: Tensor | None = None,
    mask_border: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v over the keys of the regions listed for a query's region.

    Both maps are cut into regions from the top left, the last ones possibly partial; regions are counted row by row.
    Differentiable in every floating tensor.

    Args:
        q: Queries [B, H, W, N, D]; N heads of D channels. Any strides.
        k: Keys [B, Hk, Wk, N, D].
        v: Values [B, Hk, Wk, N, Dv].
        index: Key regions [B, 1 or N, query regions, topk] of each query region, int64; one list for all heads or one
            per head. A region that is listed twice counts twice. What is no region is refused on a CPU; elsewhere, and
            in graphs, indices are not looked at.
        region_size: Queries of a region per axis.
        kv_region_size: Keys of a region per axis; default `region_size`.
        weight: Factors like `index` of the keys and values of each listed region. None: no factors.
        mask_border: What a partial key region lacks takes no part (True), or takes part with k = v = 0 (False).
        scale: Factor of q k^T. Default: D ** -0.5.
        return_lse: Also return the natural log of the sum of the exponentials of the logits.
        backend: "auto", "triton", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, H, W, N, Dv] of v's dtype; under autocast of its dtype, to which q, k and v are cast.
        With `return_lse` also [B, H, W, N], float32 (float64 for float64).

    Raises:
        ValueError: Shapes, sizes or indices that do not fit.
        TypeError: q, k, v of different dtypes, or tensors that are not floating point.
        BackendError: The requested backend cannot run this call.

    Source: arXiv:2303.08810 section 3.2 (token-to-token attention).
    """
    size = per_axis("region_size", region_size, int, 2)
    kv_size = size if kv_region_size is None else per_axis("kv_region_size", kv_region_size, int, 2)
    check_tensors(q=q, k=k, v=v)
    q, k, v = to_autocast(q, k, v)
    how = weight, bool(mask_border), default_scale(q.shape[-1], scale), return_lse
    problem = RoutedProblem(q, k, v, index, size, kv_size, *how)
    with without_autocast(q.device):
        return _routed.choose(problem, backend)(problem)


@traced_as_one
def region_routing(
    q: Tensor,
    k: Tensor,
    topk: int,
    region_size: int | Sequence[int] | None = None,
    kv_region_size: int | Sequence[int] | None = None,
    n_win: int | Sequence[int] | None = None,
    rule: str = "mask",
    scale: float | None = None,
    per_head: bool = False,
    diff: bool = False,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The key regions that are most like each query region: top-k of the products of the regions' mean q and k.

    Means leave out what a partial region lacks. Of regions that tie, the first is taken.

    Args:
        q: Queries [B, H, W, N, D].
        k: Keys [B, Hk, Wk, N, D].
        topk: Regions to take; at most the number of key regions. With `n_win` all of them are taken if there are fewer.
        region_size: Queries of a region per axis; or give `n_win`.
        kv_region_size: Keys of a region per axis; default `region_size`.
        n_win: Regions per axis instead of their size, cut as `rule` says (see `bilevel_routing_attention`).
        rule: "mask" or "zero", for `n_win`.
        scale: Factor of the products. Default: (N * D) ** -0.5.
        per_head: Choose for every head by its own channels.
        diff: Let gradients of the weights reach q and k (and the router).
        router_weight: [N * D, N * D] of a linear layer on the means of q and of k.
        router_bias: [N * D].

    Returns:
        index [B, 1 or N, query regions, topk], int64, best first, and the softmax over these topk products, of at least
        float32.

    Raises:
        ValueError: Shapes or sizes that do not fit, or `topk` below 1 or beyond the number of key regions.
        NotImplementedError: `n_win` in a program of `torch.export` for every size.

    Source: arXiv:2303.08810 eq. 3-5.
    """
    _check_maps(q, k)
    if (region_size is None) == (n_win is None):
        raise ValueError(f"expected one of region_size and n_win, got {region_size} and {n_win}")
    if region_size is None:
        if torch.compiler.is_exporting() and is_symbolic(*q.shape[1:3]):
            raise NotImplementedError(
                "region_routing has no form for every size with n_win: how many regions there are depends on it; try "
                "region_size or a fixed size"
            )
        size = _region_sizes(q.shape[1:3], per_axis("n_win", n_win, int, 2), rule)
    else:
        size = per_axis("region_size", region_size, int, 2)
    kv_size = size if kv_region_size is None else per_axis("kv_region_size", kv_region_size, int, 2)
    q_axes, k_axes = _axes("region_size", q, size), _axes("kv_region_size", k, kv_size)
    regions = _count(k_axes)
    if topk < 1 or (n_win is None and topk > regions):
        raise ValueError(f"expected topk from 1 to the number of key regions {regions}, got {topk}")
    scale = default_scale(q.shape[3] * q.shape[4], scale)
    means = region_means((q, k), (q_axes, k_axes), diff)
    return choose(means, topk, scale, per_head, (router_weight, router_bias))


@overload
def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n_win: int | Sequence[int],
    topk: int,
    rule: str = "mask",
    per_head: bool = False,
    soft: bool = False,
    diff: bool = False,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
    kv_pool: str = "none",
    kv_size: int = 1,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def bilevel_routing_attention(
    *args: Any, return_lse: Literal[True], **kwargs: Any
) -> tuple[Tensor, Tensor]: ...
@traced_as_one
def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n_win: int | Sequence[int],
    topk: int,
    rule: str = "mask",
    per_head: bool = False,
    soft: bool = False,
    diff: bool = False,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
    kv_pool: str = "none",
    kv_size: int = 1,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """BiFormer's attention: `region_routing` of the map with itself, then `routed_attention`.

    Args:
        q: Queries [B, H, W, N, D].
        k: Keys [B, H, W, N, D].
        v: Values [B, H, W, N, Dv].
        n_win: Regions per axis that are wished for.
        topk: Regions that a query region attends to; all of them if there are fewer.
        rule: "mask": regions of ceil(size / n_win) tokens, places outside the map take no part. "zero": regions of
            max(1, size // n_win) tokens (there may be more than `n_win`), and places outside the map take part with
            k = v = 0, as in the official operator on channels-first maps.
        per_head: Route every head by its own channels.
        soft: Multiply the keys and values of a listed region by its routing weight.
        diff: Let gradients flow through the routing weights (has an effect with `soft`).
        router_weight: [N * D, N * D] of a linear layer on the regions' means.
        router_bias: [N * D].
        kv_pool: "none"; "avg", "max": pool keys and values `kv_size` x `kv_size` inside each region, after routing;
            "ada_avg", "ada_max": to `kv_size` x `kv_size` per region. Needs regions that fill the map.
        kv_size: See `kv_pool`.
        scale: Factor of the products of tokens and of regions. Default: (N * D) ** -0.5, which is the released models'
            choice (not D ** -0.5).
        return_lse: Also return the natural log of the sum of the exponentials of the logits.
        backend: As in `routed_attention`.

    Returns:
        [B, H, W, N, Dv] of v's dtype; under autocast of its dtype, to which q, k and v are cast.
        With `return_lse` also [B, H, W, N], float32 (float64 for float64).

    Raises:
        ValueError: Shapes or sizes that do not fit.
        TypeError: q, k, v of different dtypes, or tensors that are not floating point.
        BackendError: The requested backend cannot run this call.

    Source: arXiv:2303.08810 section 3.2; rayleizhu/BiFormer (MIT).
    """
    _check_maps(q, k)
    check_tensors(v=v)
    q, k, v = to_autocast(q, k, v)
    scale = default_scale(q.shape[3] * q.shape[4], scale)
    windows, router = per_axis("n_win", n_win, int, 2), (router_weight, router_bias)
    topk, kv_size = checks.one_int("topk", topk), checks.one_int("kv_size", kv_size)
    how = (windows, topk, rule, per_head, soft, diff, *router, kv_pool, kv_size, scale, return_lse)
    problem = BilevelProblem(q, k, v, *how)
    with without_autocast(q.device):
        return _bilevel.choose(problem, backend)(problem)
