"""Dynamic depthwise convolutions of channels-last maps: weights made of the input for windows of K_h x K_w taps.

One primitive serves all uses: S(x, w)[p] = sum_j w[p, j] x[start(p) + j], with weights per position and head, or per
sample and channel. Its derivatives are its transpose S'(x, w)[p], the sum over all (q, j) with start(q) + j = p of
w[q, j] x[q], and the weights' gradient G(g, x)[p, j] = sum_c g[p, c] x[start(p) + j, c]; theirs are these three again.
A window is centred on its position. At the border it reaches outside of the map, where x is zero, or it is clamped:
shifted into the map, as that of neighborhood attention. Nothing is added atomically.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visattn.ops.fused.launch import launch, map_of, named, power_of_2
from visattn.ops.fused.tuning import Config, run_tuned
from visattn.ops.geometry import ceil_div

_TOGETHER = 32  # taps that are stored at once
# (numbers of a tile about, its channels at most, warps)
_TILES = ((2048, 64, 4), (4096, 64, 4), (1024, 64, 4), (2048, 32, 4), (4096, 128, 8))
_STEPS = 4  # tiles of positions that a program of the kernels' gradient adds up


class Meta(NamedTuple):
    """What is compiled into a kernel."""

    C: int
    KH: int
    KW: int
    PER_CHANNEL: bool  # weights per sample and channel, not per position and head
    CLAMPED: bool
    BLOCK_P: int  # positions
    BLOCK_C: int
    TRANSPOSED: bool = False
    STEPS: int = 1  # blocks of positions
    TAPS: int = 0  # that are stored at once, padded
    BY_ROW: bool = False  # those of a row of the window


def _candidates(x: Tensor, taps: int, whole: bool) -> list[Config]:
    """Tiles of block_m positions by block_n channels, with `whole` all channels of a head."""
    positions, channels = power_of_2(x.shape[1] * x.shape[2]), power_of_2(x.shape[4])
    found = {}
    for size, most, warps in _TILES:
        block_c = channels if whole else min(channels, most)
        size //= 4 if taps > _TOGETHER else 1  # loops over many taps leave few registers for a tile
        found[Config(max(1, min(positions, size // block_c, 256)), block_c, warps, 1)] = None
    return list(found)


def _run(
    name: str, x: Tensor, taps: int, whole: bool, form: Sequence[Any], one: Callable[[Config], Tensor]
) -> Tensor:  # fmt: skip
    """What `one` returns for the best config that is known of a kernel."""
    positions, candidates = power_of_2(x.shape[1] * x.shape[2]), _candidates(x, taps, whole)
    form = (str(x.dtype), positions, *x.shape[3:], taps, *map(str, form))
    with torch.cuda.device_of(x):
        return run_tuned(name, form, x.device, candidates, lambda config: (one(config),))[0]


def _programs(x: Tensor, meta: Meta) -> int:
    b, h, w, n, c = x.shape
    return b * n * ceil_div(c, meta.BLOCK_C) * ceil_div(h * w, meta.BLOCK_P * meta.STEPS)


@torch.library.custom_op("visattn::depthwise", mutates_args=())
def _depthwise(
    x: Tensor, weights: Tensor, transposed: bool, kernel_size: Sequence[int], clamped: bool
) -> Tensor:
    from visattn.ops.fused.depthwise_kernels import depthwise_kernel

    (_, h, w, n, c), per_channel, taps = x.shape, weights.ndim == 4, weights.shape[-1]
    form = weights.dtype, weights.ndim, transposed, clamped
    if per_channel:
        weights = weights.mT.contiguous().mT[:, None, None]  # neighbouring channels side by side
    else:
        weights = weights.unsqueeze(4)
    # weights: [B, 1, 1, N, C, taps] or [B, H, W, N, 1, taps]

    def one(config: Config) -> Tensor:
        out = x.new_empty(x.shape)
        (kh, kw), block_p, block_c = kernel_size, config.block_m, config.block_n
        meta = Meta(c, kh, kw, per_channel, clamped, block_p, block_c, transposed)
        maps = map_of(x), map_of(weights[..., 0]), weights.stride(-1), map_of(out)
        arguments = named(depthwise_kernel, *maps, h, w, n, meta)
        launch(depthwise_kernel, _programs(x, meta), config, arguments)
        return out

    return _run("depthwise", x, taps, False, form, one)


@_depthwise.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("visattn::depthwise_weights", mutates_args=())
def _depthwise_weights(
    grad: Tensor, x: Tensor,
    kernel_size: Sequence[int], clamped: bool, per_channel: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    from visattn.ops.fused.depthwise_kernels import depthwise_weights_kernel

    (b, h, w, n, c), taps = x.shape, math.prod(kernel_size)
    steps, by_row = _STEPS if per_channel else 1, taps > _TOGETHER

    def one(config: Config) -> Tensor:
        if per_channel:
            parts = ceil_div(h * w, config.block_m * steps)
            out = x.new_empty((b, parts, n, c, taps), dtype=torch.float32)
        else:
            out = x.new_empty((b, h, w, n, taps), dtype=dtype)
        stored = power_of_2(kernel_size[1] if by_row else taps)
        (kh, kw), block_p, block_c = kernel_size, config.block_m, config.block_n
        meta = Meta(c, kh, kw, per_channel, clamped, block_p, block_c, False, steps, stored, by_row)
        maps = map_of(grad), map_of(x), out
        arguments = named(depthwise_weights_kernel, *maps, h, w, n, meta)
        launch(depthwise_weights_kernel, _programs(x, meta), config, arguments)
        return out.sum(1).to(dtype) if per_channel else out

    form = grad.dtype, clamped, per_channel, dtype
    return _run("depthwise_weights", x, taps, not per_channel, form, one)


@_depthwise_weights.register_fake
def _(
    grad: Tensor, x: Tensor,
    kernel_size: Sequence[int], clamped: bool, per_channel: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
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
        grad: Tensor, x: Tensor,
        kernel_size: Sequence[int], clamped: bool, per_channel: bool, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
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
