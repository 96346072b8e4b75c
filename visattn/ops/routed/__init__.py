"""Routed attention: the queries of a region attend to a list of key regions. See README.md in this folder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from visattn.ops.checks import per_axis
from visattn.ops.routed.op import attend, attend_bilevel, check_maps, count_regions, region_axes, region_sizes
from visattn.ops.routed.routing import route


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
    backend: str = "auto",
) -> Tensor:
    """softmax(scale * q k^T) v over the keys of the regions listed for a query's region.

    Both maps are cut into regions from the top left, the last ones possibly partial; regions are counted row by row.
    Differentiable in every floating tensor.

    Args:
        q: Queries [B, H, W, N, D]; N heads of D channels. Any strides.
        k: Keys [B, Hk, Wk, N, D].
        v: Values [B, Hk, Wk, N, Dv].
        index: Key regions [B, 1 or N, query regions, topk] of each query region, int64; one list for all heads or one
            per head. A region that is listed twice counts twice.
        region_size: Queries of a region per axis.
        kv_region_size: Keys of a region per axis; default `region_size`.
        weight: Factors like `index` of the keys and values of each listed region. None: no factors.
        mask_border: What a partial key region lacks takes no part (True), or takes part with k = v = 0 (False).
        scale: Factor of q k^T. Default: D ** -0.5.
        backend: "auto", "triton", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, H, W, N, Dv] of v's dtype.

    Raises:
        ValueError: Shapes or sizes that do not fit.
        TypeError: q, k, v of different dtypes, or not floating point.
        BackendError: The requested backend cannot run this call.

    Source: arXiv:2303.08810 section 3.2 (token-to-token attention).
    """
    size = per_axis("region_size", region_size, int, 2)
    kv_size = size if kv_region_size is None else per_axis("kv_region_size", kv_region_size, int, 2)
    return attend(q, k, v, index, size, kv_size, weight, mask_border, scale, backend)


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

    Source: arXiv:2303.08810 eq. 3-5.
    """
    check_maps(q, k)
    if (region_size is None) == (n_win is None):
        raise ValueError(f"expected one of region_size and n_win, got {region_size} and {n_win}")
    if region_size is None:
        size = region_sizes(q.shape[1:3], per_axis("n_win", n_win, int, 2), rule)
    else:
        size = per_axis("region_size", region_size, int, 2)
    kv_size = size if kv_region_size is None else per_axis("kv_region_size", kv_region_size, int, 2)
    q_axes = region_axes("region_size", q.shape[1:3], size)
    k_axes = region_axes("kv_region_size", k.shape[1:3], kv_size)
    regions = count_regions(k_axes)
    if topk < 1 or (n_win is None and topk > regions):
        raise ValueError(f"expected topk from 1 to the number of key regions {regions}, got {topk}")
    scale = (q.shape[3] * q.shape[4]) ** -0.5 if scale is None else scale
    return route(q, k, q_axes, k_axes, topk, scale, per_head, diff, router_weight, router_bias)


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
    backend: str = "auto",
) -> Tensor:
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
        backend: As in `routed_attention`.

    Returns:
        [B, H, W, N, Dv] of v's dtype.

    Raises:
        ValueError: Shapes or sizes that do not fit.
        TypeError: q, k, v of different dtypes, or not floating point.
        BackendError: The requested backend cannot run this call.

    Source: arXiv:2303.08810 section 3.2; rayleizhu/BiFormer (MIT).
    """
    args = (rule, per_head, soft, diff, router_weight, router_bias, kv_pool, kv_size, scale, backend)
    return attend_bilevel(q, k, v, per_axis("n_win", n_win, int, 2), topk, *args)
