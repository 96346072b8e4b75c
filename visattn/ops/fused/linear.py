"""The two products of linear attention on heads-last maps: a context k^T v per head, and queries times a context.

Each is what the other's derivatives are made of. Contexts are float32, sums over any number of positions stay in range
and no sum is added atomically.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visattn.ops.fused.launch import launch, power_of_2, strides
from visattn.ops.fused.support import is_interpreting, precision
from visattn.ops.fused.tuning import Config, run_tuned
from visattn.ops.geometry import ceil_div

_PROGRAMS = 2048  # of outer, which cuts the positions into parts until there are so many, or parts become short
_SHORTEST = 256  # positions of a part
# By bytes of an element: float32 is multiplied without tensor cores, unless tf32 is allowed, and takes many registers.
# (channels of either side of a context that a program holds at most, positions it streams per step, ...)
_OUTER = {
    2: [
        Config(*c)
        for c in ((64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 4), (32, 128, 4, 3), (128, 64, 8, 3))
    ],
    4: [Config(*c) for c in ((32, 64, 4, 2), (32, 32, 4, 3), (64, 32, 8, 2))],
}
# (queries that a program holds, channels of them it streams per step at most, ...)
_APPLY = {
    2: [
        Config(*c)
        for c in (
            (128, 64, 4, 2),
            (64, 64, 4, 2),
            (256, 64, 8, 2),
            (128, 32, 4, 3),
            (64, 128, 4, 2),
        )
    ],
    4: [Config(*c) for c in ((64, 32, 4, 2), (128, 32, 8, 2), (32, 32, 4, 2))],
}
_WIDEST = {2: 64, 4: 32}  # channels of a result of apply that a program holds at most


def _block(n: int, most: int) -> int:
    """Channels of a block; a matrix product takes 16 at least."""
    return max(16, min(power_of_2(n), most))


def _parts(b: int, m: int, n: int, blocks: int) -> tuple[int, int]:
    """How many parts the positions are cut into, and how many each has; from sizes only, so that sums repeat."""
    wanted = max(1, min(ceil_div(_PROGRAMS, max(1, b * n * blocks)), m // _SHORTEST))
    rows = ceil_div(m, wanted)
    return ceil_div(m, max(1, rows)), rows


def _outer_launch(
    k: Tensor, v: Tensor, config: Config
) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """The number of programs, the shape of the result [parts, B, N, D, E] and the kernel's arguments without it."""
    (b, m, n, d), e = k.shape, v.shape[-1]
    block_d, block_e = _block(d, config.block_m), _block(e, config.block_m)
    blocks = ceil_div(d, block_d) * ceil_div(e, block_e)
    parts, rows = _parts(b, m, n, blocks)
    arguments = {
        "k": k,
        "v": v,
        **strides(k, "k", "bmnd"),
        **strides(v, "v", "bmne"),
        "B": b,
        "M": m,
        "N": n,
        "rows": rows,
        "D": d,
        "E": e,
        "PRECISION": precision(),
        "UPCAST": is_interpreting(),
        "BLOCK_M": config.block_n,
        "BLOCK_D": block_d,
        "BLOCK_E": block_e,
    }
    return parts * b * n * blocks, (parts, b, n, d, e), arguments


def _apply_launch(
    q: Tensor, context: Tensor, config: Config
) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    (b, l, n, d), e = q.shape, context.shape[-1]  # noqa: E741
    block_l, block_e = _block(l, config.block_m), _block(e, _WIDEST[q.element_size()])
    arguments = {
        "q": q,
        "context": context,
        **strides(q, "q", "blnd"),
        **strides(context, "c", "bnde"),
        "L": l,
        "N": n,
        "D": d,
        "E": e,
        "PRECISION": precision(),
        "UPCAST": is_interpreting(),
        "BLOCK_L": block_l,
        "BLOCK_D": _block(d, config.block_n),
        "BLOCK_E": block_e,
    }
    return b * n * ceil_div(l, block_l) * ceil_div(e, block_e), (b, l, n, e), arguments


def _shape_class(x: Tensor, channels: int) -> tuple[int | str, ...]:
    return (str(x.dtype), power_of_2(x.shape[1]), x.shape[2], x.shape[3], channels, precision())


@torch.library.custom_op("visattn::linear_outer", mutates_args=())
def _outer(k: Tensor, v: Tensor) -> Tensor:
    from visattn.ops.fused.linear_kernels import outer_kernel

    def run(config: Config) -> tuple[Tensor]:
        programs, shape, arguments = _outer_launch(k, v, config)
        out = k.new_empty(shape, dtype=torch.float32)
        launch(outer_kernel, programs, config, {**arguments, "out": out})
        return (out[0] if shape[0] == 1 else out.sum(0),)

    with torch.cuda.device_of(k):
        return run_tuned(
            "linear_outer", _shape_class(k, v.shape[-1]), k.device, _OUTER[k.element_size()], run
        )[0]


@_outer.register_fake
def _(k: Tensor, v: Tensor) -> Tensor:
    b, _, n, d = k.shape
    return k.new_empty((b, n, d, v.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("visattn::linear_apply", mutates_args=())
def _apply(q: Tensor, context: Tensor) -> Tensor:
    from visattn.ops.fused.linear_kernels import apply_kernel

    def run(config: Config) -> tuple[Tensor]:
        programs, shape, arguments = _apply_launch(q, context, config)
        out = q.new_empty(shape)
        launch(apply_kernel, programs, config, {**arguments, "out": out})
        return (out,)

    with torch.cuda.device_of(q):
        return run_tuned(
            "linear_apply",
            _shape_class(q, context.shape[-1]),
            q.device,
            _APPLY[q.element_size()],
            run,
        )[0]


@_apply.register_fake
def _(q: Tensor, context: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:-1], context.shape[-1]))


@register_flop_formula([torch.ops.visattn.linear_outer, torch.ops.visattn.linear_apply])
def _flops(
    x_shape: tuple[int, ...], other_shape: tuple[int, ...], *args: Any, **kwargs: Any
) -> int:
    b, rows, n, d = x_shape
    return 2 * b * rows * n * d * other_shape[-1]


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.visattn.linear_outer(k, v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    # pyrefly: ignore[bad-override]: as many gradients as forward has results
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        k, v = ctx.saved_tensors
        dk = _Apply.apply(v, grad.mT) if ctx.needs_input_grad[0] else None
        dv = _Apply.apply(k, grad) if ctx.needs_input_grad[1] else None
        return dk, dv


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, context: Tensor) -> Tensor:
        return torch.ops.visattn.linear_apply(q, context)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

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
