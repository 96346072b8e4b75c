"""Dynamic depthwise convolutions of channels-last maps: weights made of the input for windows of K_h x K_w taps.

One primitive serves all uses: S(x, w)[p] = sum_j w[p, j] x[start(p) + j], with weights per position and head, or per
sample and channel. Its derivatives are its transpose S'(x, w)[p], the sum over all (q, j) with start(q) + j = p of
w[q, j] x[q], and the weights' gradient G(g, x)[p, j] = sum_c g[p, c] x[start(p) + j, c]; theirs are these three again.
A window is centred on its position. At the border it reaches outside of the map, where x is zero, or it is clamped:
shifted into the map, as that of neighborhood attention. Nothing is added atomically.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visattn.ops.fused.launch import launch, power_of_2, strides
from visattn.ops.fused.tuning import Config, run_tuned
from visattn.ops.geometry import ceil_div

_TOGETHER = 32  # taps that are stored at once
_STEPS = 4  # tiles of positions that a program of the kernels' gradient adds up


def _config(elements: int, positions: int, block_c: int, num_warps: int) -> Config:
    """A tile of about so many elements: block_m positions by block_n channels."""
    return Config(
        max(1, min(power_of_2(positions), elements // block_c, 256)), block_c, num_warps, 1
    )


def _candidates(x: Tensor, taps: int, whole: bool) -> list[Config]:
    """With `whole`, a tile holds all channels of a head. Loops over many taps leave few registers for a tile."""
    positions, channels = x.shape[1] * x.shape[2], power_of_2(x.shape[4])
    sizes = ((2048, 64, 4), (4096, 64, 4), (1024, 64, 4), (2048, 32, 4), (4096, 128, 8))
    share = 4 if taps > _TOGETHER else 1
    found = [
        _config(n // share, positions, channels if whole else min(channels, c), warps)
        for n, c, warps in sizes
    ]
    return list(dict.fromkeys(found))


def _shape_class(x: Tensor, weights: Tensor, *others: Any) -> tuple[int | str, ...]:
    positions = power_of_2(x.shape[1] * x.shape[2])
    return (
        str(x.dtype),
        str(weights.dtype),
        positions,
        x.shape[3],
        x.shape[4],
        weights.shape[-1],
        *map(str, others),
    )


def _depthwise_launch(
    x: Tensor,
    weights: Tensor,
    out: Tensor,
    transposed: bool,
    kernel_size: Sequence[int],
    clamped: bool,
    config: Config,
) -> tuple[int, dict]:
    """The number of programs and the kernel's arguments."""
    b, h, w, n, c = x.shape
    per_channel = weights.ndim == 4
    if per_channel:
        weights = weights.mT.contiguous().mT  # neighbouring channels side by side
    # Weights [B, N, C, K * K] have no strides over positions, weights [B, H, W, N, K * K] none over channels.
    w_b, *middle, w_j = weights.stride()
    w_h, w_w, w_n, w_c = (0, 0, *middle) if per_channel else (*middle, 0)
    arguments = {
        "x": x,
        "weights": weights,
        "out": out,
        **strides(x, "x", "bhwnc"),
        "w_b": w_b,
        "w_h": w_h,
        "w_w": w_w,
        "w_n": w_n,
        "w_c": w_c,
        "w_j": w_j,
        "H": h,
        "W": w,
        "N": n,
        "C": c,
        "KH": kernel_size[0],
        "KW": kernel_size[1],
        "PER_CHANNEL": per_channel,
        "TRANSPOSED": transposed,
        "CLAMPED": clamped,
        "BLOCK_P": config.block_m,
        "BLOCK_C": config.block_n,
    }
    return b * n * ceil_div(c, config.block_n) * ceil_div(h * w, config.block_m), arguments


def _weights_launch(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    kernel_size: Sequence[int],
    clamped: bool,
    per_channel: bool,
    config: Config,
) -> tuple[int, dict]:
    b, h, w, n, c = x.shape
    steps, by_row = _STEPS if per_channel else 1, out.shape[-1] > _TOGETHER
    arguments = {
        "grad": grad,
        "x": x,
        "out": out,
        **strides(grad, "g", "bhwnc"),
        **strides(x, "x", "bhwnc"),
        "H": h,
        "W": w,
        "N": n,
        "C": c,
        "KH": kernel_size[0],
        "KW": kernel_size[1],
        "TAPS": power_of_2(kernel_size[1] if by_row else out.shape[-1]),
        "STEPS": steps,
        "PER_CHANNEL": per_channel,
        "CLAMPED": clamped,
        "BY_ROW": by_row,
        "BLOCK_P": config.block_m,
        "BLOCK_C": config.block_n,
    }
    return b * n * ceil_div(c, config.block_n) * ceil_div(h * w, config.block_m * steps), arguments


@torch.library.custom_op("visattn::depthwise", mutates_args=())
def _depthwise(
    x: Tensor, weights: Tensor, transposed: bool, kernel_size: Sequence[int], clamped: bool
) -> Tensor:
    from visattn.ops.fused.depthwise_kernels import depthwise_kernel

    def run(config: Config) -> tuple[Tensor]:
        out = x.new_empty(x.shape)
        programs, arguments = _depthwise_launch(
            x, weights, out, transposed, kernel_size, clamped, config
        )
        launch(depthwise_kernel, programs, config, arguments)
        return (out,)

    key = _shape_class(x, weights, weights.ndim, transposed, clamped)
    with torch.cuda.device_of(x):
        return run_tuned(
            "depthwise", key, x.device, _candidates(x, weights.shape[-1], whole=False), run
        )[0]


@_depthwise.register_fake
def _(
    x: Tensor, weights: Tensor, transposed: bool, kernel_size: Sequence[int], clamped: bool
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("visattn::depthwise_weights", mutates_args=())
def _depthwise_weights(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    clamped: bool,
    per_channel: bool,
    dtype: torch.dtype,
) -> Tensor:
    from visattn.ops.fused.depthwise_kernels import depthwise_weights_kernel

    (b, h, w, n, c), taps = x.shape, math.prod(kernel_size)

    def run(config: Config) -> tuple[Tensor]:
        if per_channel:
            parts = ceil_div(h * w, config.block_m * _STEPS)
            out = x.new_empty((b, parts, n, c, taps), dtype=torch.float32)
        else:
            out = x.new_empty((b, h, w, n, taps), dtype=dtype)
        programs, arguments = _weights_launch(
            grad, x, out, kernel_size, clamped, per_channel, config
        )
        launch(depthwise_weights_kernel, programs, config, arguments)
        return (out.sum(1).to(dtype) if per_channel else out,)

    key = _shape_class(x, grad, taps, clamped, per_channel, dtype)
    with torch.cuda.device_of(x):
        return run_tuned(
            "depthwise_weights", key, x.device, _candidates(x, taps, whole=not per_channel), run
        )[0]


@_depthwise_weights.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    clamped: bool,
    per_channel: bool,
    dtype: torch.dtype,
) -> Tensor:
    (b, h, w, n, c), taps = x.shape, math.prod(kernel_size)
    return x.new_empty((b, n, c, taps) if per_channel else (b, h, w, n, taps), dtype=dtype)


class _Depthwise(torch.autograd.Function):
    """S, or its transpose; a window is its kernel size and whether it is clamped."""

    @staticmethod
    def forward(
        x: Tensor, weights: Tensor, transposed: bool, kernel_size: Sequence[int], clamped: bool
    ) -> Tensor:
        return torch.ops.visattn.depthwise(x, weights, transposed, kernel_size, clamped)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.transposed, *ctx.window = inputs[2:]

    @staticmethod
    # pyrefly: ignore[bad-override]: as many gradients as forward has results
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _Depthwise.apply(grad, weights, not ctx.transposed, *ctx.window)
        if ctx.needs_input_grad[1]:
            pair = (x, grad) if ctx.transposed else (grad, x)
            dw = _DepthwiseWeights.apply(*pair, *ctx.window, weights.ndim == 4, weights.dtype)
        return dx, dw, None, None, None


class _DepthwiseWeights(torch.autograd.Function):
    """G."""

    @staticmethod
    def forward(
        grad: Tensor,
        x: Tensor,
        kernel_size: Sequence[int],
        clamped: bool,
        per_channel: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        return torch.ops.visattn.depthwise_weights(
            grad, x, kernel_size, clamped, per_channel, dtype
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.window = inputs[2:4]

    @staticmethod
    # pyrefly: ignore[bad-override]: as many gradients as forward has results
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        (grad, x), window = ctx.saved_tensors, ctx.window
        dgrad = _Depthwise.apply(x, weights, False, *window) if ctx.needs_input_grad[0] else None
        dx = _Depthwise.apply(grad, weights, True, *window) if ctx.needs_input_grad[1] else None
        return dgrad, dx, None, None, None, None


def _square(taps: int) -> list[int]:
    """The kernel size of so many weights."""
    size = math.isqrt(taps)
    if size * size != taps or size % 2 == 0:
        raise ValueError(f"expected K * K weights of a neighbourhood with an odd K, got {taps}")
    return [size, size]


def mix_windows(v: Tensor, weights: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """out[p] = sum_j weights[p, j] v[start(p) + j] in windows that are clamped at the border.

    Differentiable in both, any number of times.

    Args:
        v: [B, H, W, N, Dv]. Any strides.
        weights: [B, H, W, N, K_h * K_w], of v's dtype or float32. Any strides.
        kernel_size: (K_h, K_w), no larger than the map.

    Returns:
        [B, H, W, N, Dv] of v's dtype.
    """
    return _Depthwise.apply(v, weights, False, list(kernel_size), True)


def mix_neighbours(v: Tensor, weights: Tensor) -> Tensor:
    """out[p] = sum_j weights[p, j] v[p + d_j]: every position and head has its own weights.

    Differentiable in both, any number of times. Neighbours lie row by row; outside the map they are zero.

    Args:
        v: [B, H, W, N, Dv]. Any strides.
        weights: [B, H, W, N, K * K], K odd, of v's dtype or float32. Any strides.

    Returns:
        [B, H, W, N, Dv] of v's dtype.

    Raises:
        ValueError: Shapes that do not fit.
    """
    if v.ndim != 5 or weights.ndim != 5 or weights.shape[:4] != v.shape[:4]:
        raise ValueError(
            f"expected v [B, H, W, N, Dv] and weights [B, H, W, N, K * K], got {tuple(v.shape)} and "
            f"{tuple(weights.shape)}"
        )
    return _Depthwise.apply(v, weights, False, _square(weights.shape[-1]), False)


def dynamic_conv(x: Tensor, kernels: Tensor) -> Tensor:
    """Depthwise cross-correlation of every sample with kernels of its own, zero padding.

    Differentiable in both, any number of times.

    Args:
        x: [B, H, W, C]. Any strides.
        kernels: [B, C, K * K], rows first, K odd. Any strides.

    Returns:
        [B, H, W, C] of x's dtype.

    Raises:
        ValueError: Shapes that do not fit.
    """
    if x.ndim != 4 or kernels.ndim != 3 or kernels.shape[:2] != (x.shape[0], x.shape[3]):
        raise ValueError(
            f"expected x [B, H, W, C] and kernels [B, C, K * K], got {tuple(x.shape)} and {tuple(kernels.shape)}"
        )
    window = _square(kernels.shape[-1]), False
    return _Depthwise.apply(x.unsqueeze(3), kernels.unsqueeze(1), False, *window).squeeze(3)
