"""Window attention: the map is cut into windows that do not overlap. See README.md in this folder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from visattn.ops.checks import per_axis, spatial_axes
from visattn.ops.window.op import attend


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    grid: bool = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale * q k^T + bias) v among the tokens of each window.

    Maps of any size: where windows do not fit, those at the border have fewer tokens. Differentiable in every tensor.

    Args:
        q: Queries [B, *spatial, N, D] with one, two or three spatial axes; N heads of D channels. Any strides.
        k: Keys [B, *spatial, N, D].
        v: Values [B, *spatial, N, Dv].
        window_size: Tokens of a window per axis, >= 1. May exceed the map.
        shift: Offset of the tiling: the first window of an axis has only `shift` tokens (0: all of them). On maps that
            the windows divide this is Swin's cyclic shift with its mask.
        grid: MaxViT's grid attention: a window is `window_size` tokens spread evenly over the map, at a distance of
            `ceil(size / window_size)`. Without a shift.
        bias: Relative position table [N, 2 * window_size - 1 per axis]; entry `window_size - 1` is displacement 0 (key
            - query, in ranks inside the window).
        scale: Factor of q k^T. Default: D ** -0.5.
        backend: "auto", "triton", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, *spatial, N, Dv] of v's dtype.

    Raises:
        ValueError: Shapes or window arguments that do not fit.
        TypeError: q, k, v of different dtypes, or not floating point.
        BackendError: The requested backend cannot run this call.

    Sources: arXiv:2103.14030 eq. 4 and section 3.2 (windows, shift, bias), arXiv:2204.01697 section 3.2 (grid).
    """
    axes = spatial_axes(q)
    window, offset = per_axis("window_size", window_size, int, axes), per_axis("shift", shift, int, axes)
    return attend(q, k, v, window, offset, grid, bias, scale, backend)
