"""Attentions whose cost grows linearly with the number of tokens. See README.md in this folder."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from visattn.ops import checks
from visattn.ops.autocast import to_autocast, without_autocast
from visattn.ops.checks import (
    check_dtypes,
    check_mask,
    check_tensors,
    default_scale,
    spatial_axes,
)
from visattn.ops.dispatch import AttentionProblem, Backends, Problem
from visattn.ops.fused import support
from visattn.ops.geometry import is_symbolic, plain
from visattn.ops.linear import eager, reference, triton
from visattn.ops.registration import traced_as_one


@dataclass(frozen=True, eq=False)
class LinearProblem(AttentionProblem):
    """q [B, *spatial, N, D], k [B, *other, N, D], v [B, *other, N, Dv]."""

    def __post_init__(self) -> None:
        q, k, v = self.q, self.k, self.v
        check_tensors(q=q, k=k, v=v)
        spatial_axes(k)
        if k.shape[0] != q.shape[0] or k.shape[-2:] != q.shape[-2:] or v.shape[:-1] != k.shape[:-1]:
            expected = "q [B, *spatial, N, D], k [B, *other, N, D] and v [B, *other, N, Dv]"
            raise ValueError(f"expected {expected}, got {checks.shapes(q=q, k=k, v=v)}")
        check_dtypes(q, k, v)

    @property
    def key_size(self) -> list[int]:
        """The spatial sizes of the keys."""
        return plain(self.k.shape[1:-2])

    @property
    def multiplications(self) -> tuple[int, int]:
        """Those of (q k^T) v and those of q (k^T v), per image and head."""
        queries, keys = math.prod(self.size), math.prod(self.key_size)
        d, dv = self.q.shape[-1], self.v.shape[-1]
        return queries * keys * (d + dv), (queries + keys) * d * dv

    @property
    def is_quadratic(self) -> bool:
        """Whether (q k^T) v takes fewer multiplications than q (k^T v); not asked of symbolic sizes."""
        if is_symbolic(*self.size, *self.key_size):
            return False
        quadratic, linear = self.multiplications
        return quadratic < linear

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v with one axis of positions: [B, L, N, D], [B, M, N, D], [B, M, N, Dv]."""
        return self.q.flatten(1, -3), self.k.flatten(1, -3), self.v.flatten(1, -3)

    def unflat(self, out: Tensor) -> Tensor:
        """[B, L, N, Dv] -> [B, *spatial, N, Dv] of v's dtype."""
        return out.to(self.v.dtype).unflatten(1, self.size)

    def flops(self) -> int:
        """Those of the two products in the cheaper order."""
        return 2 * self.q.shape[0] * self.q.shape[-2] * min(*self.multiplications)


@dataclass(frozen=True, eq=False)
class EfficientProblem(LinearProblem):
    """mask [B, *other], True where there is a token."""

    mask: Tensor | None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mask("mask", self.mask, self.k.shape[:-2])

    def hidden(self) -> tuple[Tensor | None, Tensor | None]:
        """Keys and queries that are no tokens, [B, M, 1, 1] each; the queries' only if they are on the keys' map."""
        if self.mask is None:
            return None, None
        hidden = ~self.mask.flatten(1)[..., None, None]  # [B, M, 1, 1]
        if len(self.size) != len(self.key_size):
            return hidden, None
        pairs = zip(self.size, self.key_size, strict=True)
        return hidden, hidden if all(statically_known_true(n == m) for n, m in pairs) else None


@dataclass(frozen=True, eq=False)
class InlineProblem(LinearProblem):
    """scale > 0."""

    scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise ValueError(f"expected scale > 0, got {self.scale}")


@dataclass(frozen=True, eq=False)
class FocusedProblem(LinearProblem):
    """focus_scale [N, D], factor > 0."""

    focus_scale: Tensor
    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tensors(focus_scale=self.focus_scale)
        checks.check_floating(focus_scale=self.focus_scale)
        checks.check_shape("focus_scale", self.focus_scale, self.q.shape[-2:], "([N, D])")
        if not self.factor > 0:
            raise ValueError(f"expected factor > 0, got {self.factor}")


@dataclass(frozen=True, eq=False)
class ReluProblem(LinearProblem):
    """temperature [N], floor > 0."""

    temperature: Tensor
    floor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tensors(temperature=self.temperature)
        checks.check_floating(temperature=self.temperature)
        checks.check_shape("temperature", self.temperature, self.q.shape[-2:-1], "([N])")
        if not self.floor > 0:
            raise ValueError(f"expected floor > 0, got {self.floor}")


@dataclass(frozen=True, eq=False)
class DynamicConvProblem(Problem):
    """x [B, H, W, C], kernels [B, C, K * K]."""

    x: Tensor
    kernels: Tensor

    def __post_init__(self) -> None:
        x, kernels = self.x, self.kernels
        check_tensors(x=x, kernels=kernels)
        taps = self.kernel_size**2 if kernels.ndim == 3 else 0
        if x.ndim != 4 or taps % 2 == 0 or kernels.shape != (x.shape[0], x.shape[-1], taps):
            expected = "x [B, H, W, C] and kernels [B, C, K * K] with an odd K"
            raise ValueError(
                f"expected {expected}, got {tuple(x.shape)} and {tuple(kernels.shape)}"
            )
        check_dtypes(x, kernels)

    @property
    def kernel_size(self) -> int:
        """K."""
        return math.isqrt(int(self.kernels.shape[-1]))

    def empty(self) -> Tensor:
        """The result [B, H, W, C]."""
        return self.x.new_empty(self.x.shape)

    def flops(self) -> int:
        """Those of all K * K taps, also where they meet the padding."""
        return 2 * math.prod(self.x.shape) * self.kernels.shape[-1]


_FORMS = (triton, eager, reference)
_how: Any = {"can_run": support.can_run_tensors, "automatic": triton.automatic}
_efficient = Backends(
    "efficient_attention", EfficientProblem, *(form.attend_efficient for form in _FORMS), **_how
)
_inline = Backends(
    "inline_attention", InlineProblem, *(form.attend_inline for form in _FORMS), **_how
)
_focused = Backends(
    "focused_linear_attention", FocusedProblem, *(form.attend_focused for form in _FORMS), **_how
)
_flow = Backends("flow_attention", LinearProblem, *(form.attend_flow for form in _FORMS), **_how)
_relu = Backends(
    "relu_linear_attention", ReluProblem, *(form.attend_relu for form in _FORMS), **_how
)
_how = {"can_run": support.can_run_tensors, "whole_on_cpu": True}
_dynamic_conv = Backends(
    "dynamic_depthwise_conv", DynamicConvProblem, *(form.convolve for form in _FORMS), **_how
)


@traced_as_one
def efficient_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """softmax_D(q) (softmax_M(k)^T v): queries normalised over their channels, keys over positions.

    Differentiable in q, k and v.

    Args:
        q: Queries [B, *spatial, N, D] with one, two or three spatial axes; N heads of D channels. Any strides.
        k: Keys [B, *other, N, D], of any number M of positions.
        v: Values [B, *other, N, Dv].
        mask: [B, *other] boolean, True where there is a token. The others take no part, whatever they hold; if q is
            on the same map, the output there is 0. A sample without any token gives 0.
        backend: "auto", "triton", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, *spatial, N, Dv] of v's dtype; under autocast of its dtype, to which q, k and v are cast.

    Raises:
        ValueError: Shapes that do not fit, or a mask that is not boolean.
        TypeError: q, k, v of different dtypes, or not floating point.
        BackendError: The requested backend cannot run this call.

    Source: arXiv:1812.01243, section 3.2, with softmax normalisation.
    """
    spatial_axes(q)
    problem = EfficientProblem(*to_autocast(q, k, v), mask)
    with without_autocast(q.device):
        return _efficient.choose(problem, backend)(problem)


@traced_as_one
def inline_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Injective linear attention: weights (scale * q k^T + 1 - mean_M(scale * q k^T)) / M, which sum to 1.

    They may be negative. Computed as mean(v) + scale / M * q ((k - mean(k))^T v). Differentiable in q, k and v.

    Args:
        q: Queries, as in `efficient_attention`.
        k: Keys.
        v: Values.
        scale: Factor of q k^T, > 0. Default: D ** -0.5.
        backend: As in `efficient_attention`.

    Returns:
        [B, *spatial, N, Dv] of v's dtype; under autocast of its dtype, to which q, k and v are cast.

    Raises:
        ValueError: Shapes that do not fit, or a scale that is not positive.
        TypeError: q, k, v of different dtypes, or not floating point.
        BackendError: The requested backend cannot run this call.

    Source: arXiv:2412.06590, equations 4 and 5.
    """
    spatial_axes(q)
    problem = InlineProblem(*to_autocast(q, k, v), default_scale(q.shape[-1], scale))
    with without_autocast(q.device):
        return _inline.choose(problem, backend)(problem)


@traced_as_one
def focused_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, focus_scale: Tensor, factor: float = 3.0, backend: str = "auto"
) -> Tensor:
    """f(q) (f(k)^T v) / M / (f(q) . mean_M(f(k)) + 1e-6), where f sharpens directions and keeps lengths.

    f(x) = |y| y^factor / |y^factor| with y = (relu(x) + 1e-6) / softplus(focus_scale); norms over all heads together.
    Differentiable in every tensor.

    Args:
        q: Queries, as in `efficient_attention`.
        k: Keys.
        v: Values.
        focus_scale: [N, D].
        factor: Exponent, > 0.
        backend: As in `efficient_attention`.

    Returns:
        [B, *spatial, N, Dv] of v's dtype; under autocast of its dtype, to which q, k and v are cast.

    Raises:
        ValueError: Shapes that do not fit, or a factor that is not positive.
        TypeError: q, k, v of different dtypes, or not floating point.
        BackendError: The requested backend cannot run this call.

    Source: arXiv:2308.00442, equations 6 and 7.
    """
    spatial_axes(q)
    problem = FocusedProblem(*to_autocast(q, k, v), focus_scale, float(factor))
    with without_autocast(q.device):
        return _focused.choose(problem, backend)(problem)


@traced_as_one
def relu_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    floor: float = 100.0,
    backend: str = "auto",
) -> Tensor:
    """temperature * relu(q) (relu(k)^T v) / max(relu(q) . sum_M(relu(k)), floor).

    Queries whose sum is below the floor are scaled by it, not normalised. Differentiable in every tensor.

    Args:
        q: Queries, as in `efficient_attention`.
        k: Keys.
        v: Values.
        temperature: [N].
        floor: Least denominator, > 0.
        backend: As in `efficient_attention`.

    Returns:
        [B, *spatial, N, Dv] of v's dtype; under autocast of its dtype, to which q, k and v are cast.

    Raises:
        ValueError: Shapes that do not fit, or a floor that is not positive.
        TypeError: q, k, v of different dtypes, or not floating point.
        BackendError: The requested backend cannot run this call.

    Source: arXiv:2501.16182, linear global attention.
    """
    spatial_axes(q)
    problem = ReluProblem(*to_autocast(q, k, v), temperature, float(floor))
    with without_autocast(q.device):
        return _relu.choose(problem, backend)(problem)


@traced_as_one
def flow_attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """a_i * (f(q_i) . sum_j c_j f(k_j) v_j^T) / (f(q_i) . sum_j f(k_j)) with f = sigmoid: a flow from keys to queries.

    Keys compete, c = M softmax_M(min(s, 1)), where s_j is what leaves j if every query takes in 1; queries are
    allocated, a = sigmoid(L / M * r), where r_i is what reaches i if every key gives out 1. There is no scale.
    Differentiable in q, k and v.

    Args:
        q: Queries, as in `efficient_attention`, L of them.
        k: Keys.
        v: Values.
        backend: As in `efficient_attention`.

    Returns:
        [B, *spatial, N, Dv] of v's dtype; under autocast of its dtype, to which q, k and v are cast.

    Raises:
        ValueError: Shapes that do not fit.
        TypeError: q, k, v of different dtypes, or not floating point.
        BackendError: The requested backend cannot run this call.

    Source: arXiv:2202.06258, equations 4 to 8, with 1e-6 added to what is summed, and to the sums, as officially for
    images.
    """
    spatial_axes(q)
    problem = LinearProblem(*to_autocast(q, k, v))
    with without_autocast(q.device):
        return _flow.choose(problem, backend)(problem)


def flow_weights(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """How `flow_attention` allocates queries and lets keys compete, for looking at.

    Args: as in `flow_attention`.

    Returns:
        Allocation [B, *spatial, N], in (0, 1), and competition [B, *other, N], 1 on average, in float32 or float64.

    Raises:
        ValueError, TypeError: as in `flow_attention`.
    """
    spatial_axes(q)
    problem = LinearProblem(*to_autocast(q, k, k))
    with without_autocast(q.device):
        query, key, _ = (x.to(problem.dtype).sigmoid() for x in problem.flat())
        _, allocation, competition = reference.flows(query, key)
    sizes = problem.size, problem.key_size
    parts = zip((allocation, competition), sizes, strict=True)
    allocation, competition = (x.squeeze(-1).unflatten(1, size) for x, size in parts)
    return allocation, competition


@traced_as_one
def dynamic_depthwise_conv(x: Tensor, kernels: Tensor, backend: str = "auto") -> Tensor:
    """Depthwise cross-correlation of every sample with kernels of its own, zero padding. Differentiable in both.

    Args:
        x: Map [B, H, W, C]. Any strides.
        kernels: [B, C, K * K], rows first; K odd.
        backend: As in `efficient_attention`.

    Returns:
        [B, H, W, C] of x's dtype; under autocast of its dtype, to which both are cast.

    Raises:
        ValueError: Shapes that do not fit.
        TypeError: Different dtypes, or not floating point.
        BackendError: The requested backend cannot run this call.
    """
    check_tensors(x=x, kernels=kernels)
    problem = DynamicConvProblem(*to_autocast(x, kernels))
    with without_autocast(x.device):
        return _dynamic_conv.choose(problem, backend)(problem)
