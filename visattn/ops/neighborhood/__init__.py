"""Neighborhood attention (NA): each query attends to the keys nearest to it. See README.md in this folder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

from torch import Tensor

from visattn.ops import checks
from visattn.ops.autocast import to_autocast, without_autocast
from visattn.ops.checks import default_scale, per_axis, spatial_axes
from visattn.ops.dispatch import AttentionProblem, Backends
from visattn.ops.geometry import Axis
from visattn.ops.neighborhood import eager, reference, triton
from visattn.ops.registration import traced_as_one


@dataclass(frozen=True, eq=False)
class NeighborhoodProblem(AttentionProblem):
    """q, k [B, *spatial, N, D], v [B, *spatial, N, Dv]; windows, per axis; bias [N, 2 * kernel_size - 1 per axis].

    Extra keys [B, E, N, D] and values [B, E, N, Dv], and their bias, broadcastable to [B, *spatial, N, E]. key_mask
    [B, *spatial], True where a key is visible.
    """

    kernel_size: Sequence[int]
    dilation: Sequence[int]
    stride: Sequence[int]
    is_causal: Sequence[bool]
    bias: Tensor | None
    extra_k: Tensor | None
    extra_v: Tensor | None
    extra_bias: Tensor | None
    key_mask: Tensor | None
    scale: float
    return_lse: bool

    def __post_init__(self) -> None:
        checks.check_qkv(self.q, self.k, self.v)
        kernel, dilation, size = self.kernel_size, self.dilation, self.size
        for k, d, n in zip(kernel, dilation, size, strict=True):
            if isinstance(n, int) and k * d > n:
                raise ValueError(
                    f"expected kernel_size * dilation <= size on every axis, got kernel_size {kernel}, dilation "
                    f"{dilation} on a map of {tuple(size)}; try visattn.ops.pad_to_at_least before projecting q, k, v"
                )
        if not (self.extra_k is self.extra_v is self.extra_bias is None):
            self._check_extra()
        if self.bias is not None and any(self.is_causal):
            got = list(self.is_causal)
            raise ValueError(f"expected no causal axis with a bias, got is_causal {got}")
        checks.check_table(self.q, self.bias, self.kernel_size)
        if self.key_mask is not None:
            checks.check_mask("key_mask", self.key_mask, self.q.shape[:-2])

    def _check_extra(self) -> None:
        q, extra_k, extra_v, extra_bias = self.q, self.extra_k, self.extra_v, self.extra_bias
        checks.check_floating(extra_k=extra_k, extra_v=extra_v, extra_bias=extra_bias)
        if (extra_k is None) != (extra_v is None):
            raise ValueError("expected extra_k and extra_v together, got only one of them")
        checks.check_dtypes(q, extra_k, extra_v)
        if extra_k is not None and extra_v is not None:
            head = q.shape[0], extra_k.shape[1], q.shape[-2]
            shapes = (*head, q.shape[-1]), (*head, self.v.shape[-1])
            got = tuple(extra_k.shape), tuple(extra_v.shape)
            if got != shapes:
                expected = f"extra_k {shapes[0]} and extra_v {shapes[1]} ([B, E, N, D])"
                raise ValueError(f"expected {expected}, got {got[0]} and {got[1]}")
        if extra_bias is not None:
            if extra_k is None:
                got = "extra_bias alone"
                raise ValueError(f"expected extra_k and extra_v with extra_bias, got {got}")
            target, got = (*q.shape[:-1], extra_k.shape[1]), tuple(extra_bias.shape)
            fits = all(n in (1, m) for n, m in zip(reversed(got), reversed(target), strict=False))
            if len(got) > len(target) or not fits:
                expected = f"extra_bias broadcastable to {target} ([B, *spatial, N, E])"
                raise ValueError(f"expected {expected}, got {got}")

    @property
    def axes(self) -> tuple[Axis, ...]:
        """How windows lie on each axis."""
        windows = self.kernel_size, self.dilation, self.stride, self.is_causal
        return tuple(Axis(*axis) for axis in zip(self.size, *windows, strict=True))

    @property
    def visible_kv(self) -> tuple[Tensor, Tensor]:
        """k and v, zero where `key_mask` hides them: what they hold there, NaN too, meets no other number."""
        if self.key_mask is None:
            return self.k, self.v
        hidden = ~self.key_mask[..., None, None]  # [B, *spatial, 1, 1]
        return self.k.masked_fill(hidden, 0), self.v.masked_fill(hidden, 0)

    def flops(self) -> int:
        """Those of the keys in a query's window and of the extra ones, causal axes and hidden keys in full."""
        keys = math.prod(self.kernel_size) + (0 if self.extra_k is None else self.extra_k.shape[1])
        return 2 * math.prod(self.q.shape[:-1]) * keys * (self.q.shape[-1] + self.v.shape[-1])


def windows_per_axis(
    axes: int,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
    stride: int | Sequence[int],
    is_causal: bool | Sequence[bool],
) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[bool]]:
    """Give each argument of a window one value for each of `axes` axes, in the order that problems have them in.

    Raises:
        ValueError: Values of another kind or number, or such as no map can have.
    """
    kernel, dilation, stride = (
        per_axis(name, value, int, axes)
        for name, value in (
            ("kernel_size", kernel_size),
            ("dilation", dilation),
            ("stride", stride),
        )
    )
    if any(
        k < 1 or d < 1 or not 1 <= s <= k for k, d, s in zip(kernel, dilation, stride, strict=True)
    ):
        raise ValueError(
            f"expected kernel_size >= 1, dilation >= 1 and 1 <= stride <= kernel_size on every axis, got "
            f"kernel_size {kernel}, dilation {dilation}, stride {stride}"
        )
    return kernel, dilation, stride, per_axis("is_causal", is_causal, bool, axes)


_backends = Backends(
    "neighborhood_attention", NeighborhoodProblem, triton.attend, eager.attend, reference.attend
)


@overload
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
    key_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def neighborhood_attention(
    *args: Any, return_lse: Literal[True], **kwargs: Any
) -> tuple[Tensor, Tensor]: ...
@traced_as_one
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
    key_mask: Tensor | None = None,
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
            in units of the dilation). Only without a causal axis.
        extra_k: Keys [B, E, N, D] that every query sees besides its neighbours, in the same softmax.
        extra_v: Values [B, E, N, Dv] of the extra keys.
        extra_bias: Added to the logits of the extra keys; broadcastable to [B, *spatial, N, E].
        key_mask: [B, *spatial] boolean, for padded batches: True where a key is visible, as in PyTorch's
            `scaled_dot_product_attention`. The others take no part, whatever they hold. Windows stay where they are; a
            query without any visible key gives 0, a log-sum-exp of -inf and no gradient. Extra keys are always visible.
        scale: Factor of q k^T. Default: D ** -0.5.
        return_lse: Also return the natural log of the sum of the exponentials of the logits.
        backend: "auto", "triton", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, *spatial, N, Dv] of v's dtype; under autocast of its dtype, to which q, k, v and the extra keys are cast.
        With `return_lse` also [B, *spatial, N], float32 (float64 for float64).

    Raises:
        ValueError: Shapes or window arguments that do not fit, or a key_mask that is not boolean.
        TypeError: q, k, v (and extra keys) of different dtypes, or tensors that are not floating point.
        BackendError: The requested backend cannot run this call.

    Sources: arXiv:2204.07143 eq. 1-3 (NA), arXiv:2209.15001 eq. 2 (dilation), arXiv:2504.16922 (stride).
    """
    windows = windows_per_axis(spatial_axes(q), kernel_size, dilation, stride, is_causal)
    q, k, v, extra_k, extra_v = to_autocast(q, k, v, extra_k, extra_v)
    extra, how = (extra_k, extra_v, extra_bias), (default_scale(q.shape[-1], scale), return_lse)
    problem = NeighborhoodProblem(q, k, v, *windows, bias, *extra, key_mask, *how)
    with without_autocast(q.device):
        return _backends.choose(problem, backend)(problem)
