"""Neighborhood attention (NA): each query attends to the keys nearest to it. See README.md in this folder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from visattn.ops.checks import per_axis, spatial_axes
from visattn.ops.neighborhood.op import attend, attend_lse


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    bias: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    extra_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + bias) v over the `kernel_size` nearest keys of every query.

    Per axis, the window is centred on the query, shifted (never cut) at the border, so that every query has exactly
    `kernel_size` keys; an even window leans to the left. Differentiable in every tensor argument.

    Args:
        q: Queries [B, *spatial, N, D] with one, two or three spatial axes; N heads of D channels. Any strides.
        k: Keys [B, *spatial, N, D].
        v: Values [B, *spatial, N, Dv].
        kernel_size: Keys per axis, >= 1.
        dilation: Distance between neighbouring keys, in tokens. Tokens i and j see each other only if
            i = j (mod dilation); axes need not be divisible by it. `kernel_size * dilation` must not exceed the axis.
        stride: Generalized NA: this many consecutive queries share the window of their central (causal: last) one.
            `stride == kernel_size` is blocked (window) attention.
        is_causal: On a causal axis, keys after the query are hidden; the first queries have fewer keys.
        bias: Relative position table [N, 2 * kernel_size - 1 per axis]; entry K - 1 is displacement 0 (key - query,
            in units of the dilation). Only with stride 1 and no causal axis.
        extra_k: Keys [B, E, N, D] that every query sees besides its neighbours, in the same softmax.
        extra_v: Values [B, E, N, Dv] of the extra keys.
        extra_bias: Added to the logits of the extra keys; broadcastable to [B, *spatial, N, E].
        scale: Factor of q k^T. Default: D ** -0.5.
        return_lse: Also return the natural log of the sum of the exponentials of the logits.
        backend: "auto", "triton", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, *spatial, N, Dv] of v's dtype; with `return_lse` also [B, *spatial, N], float32 (float64 for float64).

    Raises:
        ValueError: Shapes or window arguments that do not fit.
        TypeError: q, k, v (and extra keys) of different dtypes, or not floating point.
        BackendError: The requested backend cannot run this call.

    Sources: arXiv:2204.07143 eq. 1-3 (NA), arXiv:2209.15001 eq. 2 (dilation), arXiv:2504.16922 (stride).
    """
    axes = spatial_axes(q)
    windows = (
        per_axis("kernel_size", kernel_size, int, axes),
        per_axis("dilation", dilation, int, axes),
        per_axis("stride", stride, int, axes),
        per_axis("is_causal", is_causal, bool, axes),
    )
    op = attend_lse if return_lse else attend
    return op(q, k, v, *windows, bias, extra_k, extra_v, extra_bias, scale, backend)
