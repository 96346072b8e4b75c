"""Halo attention: the queries of a block attend to the block and its surroundings. See README.md in this folder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from visattn.ops.checks import per_axis
from visattn.ops.halo.op import attend


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
    backend: str = "auto",
) -> Tensor:
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
        backend: "auto", "triton", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, ceil(H / stride), ceil(W / stride), N, Dv] of v's dtype.

    Raises:
        ValueError: Shapes or window arguments that do not fit.
        TypeError: q, k, v of different dtypes, or not floating point.
        BackendError: The requested backend cannot run this call.

    Source: arXiv:2103.12731 section 2.2 (blocked local attention with halos) and eq. 2 (relative embeddings).
    """
    block, halo = per_axis("block_size", block_size, int, 2), per_axis("halo_size", halo_size, int, 2)
    step = per_axis("stride", stride, int, 2)
    return attend(q, k, v, block, halo, step, rel_h, rel_w, mask_border, scale, backend)
