"""Window attention: the map is cut into windows that do not overlap. See README.md in this folder.

Which tokens see each other: `geometry.Partition`, read by `reference`, `eager._hidden` and (Triton) `Partition.spans`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

from torch import Tensor

from visattn.ops.autocast import to_autocast, without_autocast
from visattn.ops.checks import check_qkv, check_table, default_scale, per_axis, spatial_axes
from visattn.ops.dispatch import AttentionProblem, Backends
from visattn.ops.geometry import Partition
from visattn.ops.registration import traced_as_one
from visattn.ops.window import eager, reference, triton


@dataclass(frozen=True, eq=False)
class WindowProblem(AttentionProblem):
    """q, k [B, *spatial, N, D] and v [B, *spatial, N, Dv], windows per axis, bias [N, 2 * window_size - 1 per axis]."""

    window_size: Sequence[int]
    shift: Sequence[int]
    grid: bool
    bias: Tensor | None
    scale: float
    return_lse: bool

    def __post_init__(self) -> None:
        check_qkv(self.q, self.k, self.v)
        for w, s in zip(self.window_size, self.shift, strict=True):
            if w < 1 or not 0 <= s < w or (self.grid and s):
                got = f"window_size {list(self.window_size)}, shift {list(self.shift)}"
                raise ValueError(
                    f"expected window_size >= 1 and 0 <= shift < window_size on every axis, no shift of a grid, got "
                    f"{got}, grid {self.grid}"
                )
        check_table(self.q, self.bias, self.window_size)

    @property
    def axes(self) -> tuple[Partition, ...]:
        """How each axis of the map is cut."""
        sizes = zip(self.size, self.window_size, self.shift, strict=True)
        return tuple(Partition(n, w, s, self.grid) for n, w, s in sizes)

    def flops(self) -> int:
        """Those of the pairs that see each other."""
        (batch, *_, heads, d), dv = self.q.shape, self.v.shape[-1]
        return 2 * batch * heads * math.prod(axis.pairs() for axis in self.axes) * (d + dv)


_backends = Backends(
    "window_attention", WindowProblem, triton.attend, eager.attend, reference.attend
)


@overload
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    grid: bool = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def window_attention(
    *args: Any, return_lse: Literal[True], **kwargs: Any
) -> tuple[Tensor, Tensor]: ...
@traced_as_one
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    grid: bool = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
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
        return_lse: Also return the natural log of the sum of the exponentials of the logits.
        backend: "auto", "triton", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, *spatial, N, Dv] of v's dtype; under autocast of its dtype, to which q, k and v are cast.
        With `return_lse` also [B, *spatial, N], float32 (float64 for float64).

    Raises:
        ValueError: Shapes or window arguments that do not fit.
        TypeError: q, k, v of different dtypes, or tensors that are not floating point.
        BackendError: The requested backend cannot run this call.

    Sources: arXiv:2103.14030 eq. 4 and section 3.2 (windows, shift, bias), arXiv:2204.01697 section 3.2 (grid).
    """
    axes = spatial_axes(q)
    window = per_axis("window_size", window_size, int, axes)
    offset = per_axis("shift", shift, int, axes)
    q, k, v = to_autocast(q, k, v)
    scale = default_scale(q.shape[-1], scale)
    problem = WindowProblem(q, k, v, window, offset, grid, bias, scale, return_lse)
    with without_autocast(q.device):
        return _backends.choose(problem, backend)(problem)
