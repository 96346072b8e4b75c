"""The two products of linear attention on heads-last maps: a context k^T v per head, and queries times a context.

Each is what the other's derivatives are made of. Contexts are float32, sums over any number of positions stay in range
and no sum is added atomically.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visattn.ops.fused.launch import launch, map_of, named, power_of_2
from visattn.ops.fused.support import is_interpreting, precision
from visattn.ops.fused.tuning import Config, run_tuned
from visattn.ops.geometry import ceil_div

_PROGRAMS = 2048  # of outer, which cuts the positions into parts until there are so many, or parts become short
_SHORTEST = 256  # positions of a part
_WIDEST = {2: 64, 4: 32}  # channels of a result of apply that a program holds at most


def _configs(*configs: tuple[int, int, int, int]) -> list[Config]:
    return [Config(*config) for config in configs]


# By bytes of a number: float32 is multiplied without tensor cores, unless tf32 is allowed, and takes many registers.
# (channels of either side of a context that a program holds at most, positions it streams per step, ...)
_OUTER = {
    2: _configs((64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 4), (32, 128, 4, 3), (128, 64, 8, 3)),
    4: _configs((32, 64, 4, 2), (32, 32, 4, 3), (64, 32, 8, 2)),
}
# (queries that a program holds, channels of them it streams per step at most, ...)
_APPLY = {
    2: _configs((128, 64, 4, 2), (64, 64, 4, 2), (256, 64, 8, 2), (128, 32, 4, 3), (64, 128, 4, 2)),
    4: _configs((64, 32, 4, 2), (128, 32, 8, 2), (32, 32, 4, 2)),
}


class Meta(NamedTuple):
    """What is compiled into a kernel."""

    D: int
    E: int
    BLOCK_M: int  # positions
    BLOCK_D: int
    BLOCK_E: int
    PRECISION: str
    UPCAST: bool


def _block(n: int, most: int) -> int:
    """Channels of a block; a matrix product takes 16 at least."""
    return max(16, min(power_of_2(n), most))


def _parts(b: int, m: int, n: int, blocks: int) -> tuple[int, int]:
    """How many parts the positions are cut into, and how many each has; from sizes only, so that sums repeat."""
    wanted = max(1, min(ceil_div(_PROGRAMS, max(1, b * n * blocks)), m // _SHORTEST))
    rows = ceil_div(m, wanted)
    return ceil_div(m, max(1, rows)), rows


def _run(name: str, configs: list[Config], x: Tensor, channels: int, one: _One) -> Tensor:
    """What `one` returns for the best config that is known of a kernel."""
    form = (str(x.dtype), power_of_2(x.shape[1]), *x.shape[2:], channels, precision())
    with torch.cuda.device_of(x):
        return run_tuned(name, form, x.device, configs, lambda config: (one(config),))[0]


_One = Callable[[Config], Tensor]


@torch.library.custom_op("visattn::linear_outer", mutates_args=())
def _outer(k: Tensor, v: Tensor) -> Tensor:
    from visattn.ops.fused.linear_kernels import outer_kernel

    (b, m, n, d), e = k.shape, v.shape[-1]

    def one(config: Config) -> Tensor:
        block_d, block_e = _block(d, config.block_m), _block(e, config.block_m)
        blocks = ceil_div(d, block_d) * ceil_div(e, block_e)
        parts, rows = _parts(b, m, n, blocks)
        out = k.new_empty((parts, b, n, d, e), dtype=torch.float32)
        meta = Meta(d, e, config.block_n, block_d, block_e, precision(), is_interpreting())
        maps = map_of(k), map_of(v), map_of(out.flatten(0, 1).transpose(1, 2))
        arguments = named(outer_kernel, *maps, b, m, n, rows, meta)
        launch(outer_kernel, parts * b * n * blocks, config, arguments)
        return out[0] if parts == 1 else out.sum(0)

    return _run("linear_outer", _OUTER[k.element_size()], k, e, one)


@_outer.register_fake
def _(k: Tensor, v: Tensor) -> Tensor:
    b, _, n, d = k.shape
    return k.new_empty((b, n, d, v.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("visattn::linear_apply", mutates_args=())
def _apply(q: Tensor, context: Tensor) -> Tensor:
    from visattn.ops.fused.linear_kernels import apply_kernel

    (b, l, n, d), e = q.shape, context.shape[-1]  # noqa: E741

    def one(config: Config) -> Tensor:
        block_m, block_e = _block(l, config.block_m), _block(e, _WIDEST[q.element_size()])
        out, block_d = q.new_empty((b, l, n, e)), _block(d, config.block_n)
        meta = Meta(d, e, block_m, block_d, block_e, precision(), is_interpreting())
        maps = map_of(q), map_of(context.transpose(1, 2)), map_of(out)
        programs = b * n * ceil_div(l, block_m) * ceil_div(e, block_e)
        launch(apply_kernel, programs, config, named(apply_kernel, *maps, l, n, meta))
        return out

    return _run("linear_apply", _APPLY[q.element_size()], q, e, one)


@_apply.register_fake
def _(q: Tensor, context: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:-1], context.shape[-1]))


@register_flop_formula([torch.ops.visattn.linear_outer, torch.ops.visattn.linear_apply])
def _flops(
    x_shape: tuple[int, ...], other_shape: tuple[int, ...], *args: Any, **kwargs: Any
) -> int:
    b, rows, n, d = x_shape
    return 2 * b * rows * n * d * other_shape[-1]


class _Product(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


class _Outer(_Product):
    @staticmethod
    def forward(k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.visattn.linear_outer(k, v)

    @staticmethod
    # pyrefly: ignore[bad-override]: as many gradients as forward has results
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        k, v = ctx.saved_tensors
        dk = _Apply.apply(v, grad.mT) if ctx.needs_input_grad[0] else None
        dv = _Apply.apply(k, grad) if ctx.needs_input_grad[1] else None
        return dk, dv


class _Apply(_Product):
    @staticmethod
    def forward(q: Tensor, context: Tensor) -> Tensor:
        return torch.ops.visattn.linear_apply(q, context)

    @staticmethod
    # pyrefly: ignore[bad-override]: as many gradients as forward has results
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, context = ctx.saved_tensors
        dq = _Apply.apply(grad, context.mT) if ctx.needs_input_grad[0] else None
        dcontext = _Outer.apply(q, grad).to(context.dtype) if ctx.needs_input_grad[1] else None
        return dq, dcontext


def outer(k: Tensor, v: Tensor) -> Tensor:
    """The sum over positions of k^T v, for every head. Differentiable in both, any number of times.

    Args:
        k: [B, M, N, D]. Any strides.
        v: [B, M, N, E], of k's dtype.

    Returns:
        [B, N, D, E], float32.

    Raises:
        ValueError: Shapes that do not fit.
        TypeError: Different dtypes.
    """
    if k.ndim != 4 or v.ndim != 4 or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"expected k [B, M, N, D] and v [B, M, N, E], got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.dtype != v.dtype:
        raise TypeError(f"expected k and v of one dtype, got {k.dtype} and {v.dtype}")
    return _Outer.apply(k, v)


def apply(q: Tensor, context: Tensor) -> Tensor:
    """q times its head's context. Differentiable in both, any number of times.

    Args:
        q: [B, L, N, D]. Any strides.
        context: [B, N, D, E], of any floating dtype; it is rounded to q's, whose range it must not leave. Any strides.

    Returns:
        [B, L, N, E] of q's dtype.

    Raises:
        ValueError: Shapes that do not fit.
    """
    if q.ndim != 4 or context.shape[:-1] != (q.shape[0], *q.shape[2:]):
        raise ValueError(
            f"expected q [B, L, N, D] and context [B, N, D, E], got {tuple(q.shape)}, {tuple(context.shape)}"
        )
    return _Apply.apply(q, context)
