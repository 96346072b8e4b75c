"""Attentions whose cost grows linearly with the number of tokens. See README.md in this folder."""

from __future__ import annotations

from torch import Tensor

from visattn.ops.linear.op import dynamic_conv, efficient, focused, inline


def efficient_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, backend: str = "auto") -> Tensor:
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
        [B, *spatial, N, Dv] of v's dtype.

    Raises:
        ValueError: Shapes that do not fit, or a mask that is not boolean.
        TypeError: q, k, v of different dtypes, or not floating point.
        BackendError: The requested backend cannot run this call.

    Source: arXiv:1812.01243, section 3.2, with softmax normalisation.
    """
    return efficient(q, k, v, mask, backend)


def inline_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, backend: str = "auto") -> Tensor:
    """Injective linear attention: weights (scale * q k^T + 1 - mean_M(scale * q k^T)) / M, which sum to 1.

    They may be negative. Computed as mean(v) + scale / M * q ((k - mean(k))^T v). Differentiable in q, k and v.

    Args:
        q: Queries [B, *spatial, N, D] with one, two or three spatial axes; N heads of D channels. Any strides.
        k: Keys [B, *other, N, D], of any number M of positions.
        v: Values [B, *other, N, Dv].
        scale: Factor of q k^T, > 0. Default: D ** -0.5.
        backend: "auto", "triton", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, *spatial, N, Dv] of v's dtype.

    Raises:
        ValueError: Shapes that do not fit, or a scale or factor that is not positive.
        TypeError: q, k, v of different dtypes, or not floating point.
        BackendError: The requested backend cannot run this call.

    Source: arXiv:2412.06590, equations 4 and 5.
    """
    return inline(q, k, v, scale, backend)


def focused_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, focus_scale: Tensor, factor: float = 3.0, backend: str = "auto"
) -> Tensor:
    """f(q) (f(k)^T v) / M / (f(q) . mean_M(f(k)) + 1e-6), where f sharpens directions and keeps lengths.

    f(x) = |y| y^factor / |y^factor| with y = (relu(x) + 1e-6) / softplus(focus_scale); norms over all heads together.
    Differentiable in every tensor.

    Args:
        q: Queries [B, *spatial, N, D] with one, two or three spatial axes; N heads of D channels. Any strides.
        k: Keys [B, *other, N, D], of any number M of positions.
        v: Values [B, *other, N, Dv].
        focus_scale: [N, D].
        factor: Exponent, > 0.
        backend: "auto", "triton", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, *spatial, N, Dv] of v's dtype.

    Raises:
        ValueError: Shapes that do not fit, or a scale or factor that is not positive.
        TypeError: q, k, v of different dtypes, or not floating point.
        BackendError: The requested backend cannot run this call.

    Source: arXiv:2308.00442, equations 6 and 7.
    """
    return focused(q, k, v, focus_scale, factor, backend)


def dynamic_depthwise_conv(x: Tensor, kernels: Tensor, backend: str = "auto") -> Tensor:
    """Depthwise cross-correlation of every sample with kernels of its own, zero padding. Differentiable in both.

    Args:
        x: Map [B, H, W, C]. Any strides.
        kernels: [B, C, K * K], rows first; K odd.
        backend: "auto", "triton", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, H, W, C].

    Raises:
        ValueError: Shapes that do not fit.
        TypeError: Different dtypes, or not floating point.
        BackendError: The requested backend cannot run this call.
    """
    return dynamic_conv(x, kernels, backend)
