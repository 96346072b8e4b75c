"""Padding and cropping of channels-last maps, as ops that trace, script and export.

All but one work at the bottom and right and are one operation, `fit`: give a map [B, *spatial, C] a new spatial size.
The other, `pad_same`, pads both sides for a strided window. With known sizes they are slices or pads. While a graph
with symbolic sizes is traced they are one opaque node, so that the graph does not come to depend on whether anything
was padded or cropped at the traced size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.registration import composite, opaque, sizes_are_known


def _fit(x: Tensor, size: list[int]) -> Tensor:
    if any(isinstance(n, torch.SymInt) for n in (*x.shape, *size)):
        return torch.ops.visattn.fit_opaque(x, size)
    pads = [0, 0]
    for axis, n in reversed(list(enumerate(size, start=1))):
        if n < x.shape[axis]:
            x = x.narrow(axis, 0, n)
        pads += [0, n - x.shape[axis]]
    return F.pad(x, pads) if any(pads) else x


def _pad_to_at_least(x: Tensor, size: list[int]) -> Tensor:
    return _fit(x, [torch.sym_max(n, s) for n, s in zip(x.shape[1:-1], size, strict=True)])


def _pad_to_multiple(x: Tensor, multiple: list[int]) -> Tensor:
    return _fit(x, [(n + m - 1) // m * m for n, m in zip(x.shape[1:-1], multiple, strict=True)])


@torch.library.custom_op("visattn::fit_opaque", mutates_args=(), schema="(Tensor x, SymInt[] size) -> Tensor")
def _fit_opaque(x: Tensor, size: Any) -> Tensor:
    return _fit(x, size).clone(memory_format=torch.contiguous_format)


@_fit_opaque.register_fake
def _(x: Tensor, size: Any) -> Tensor:
    return x.new_empty((x.shape[0], *size, x.shape[-1]))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
    ctx.size = inputs[0].shape[1:-1]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.visattn.fit_opaque(grad, ctx.size), None


_fit_opaque.register_autograd(_differentiate, setup_context=_setup_context)


def _same(n: int, kernel: int, stride: int) -> int:
    """Length that gives a window of `kernel` every `stride` ceil(n / stride) places."""
    return (n - 1) // stride * stride + kernel


def _run_pad_same(x: Tensor, kernel: list[int], stride: list[int]) -> Tensor:
    pads = [0, 0]
    for n, k, s in zip(reversed(x.shape[1:-1]), reversed(kernel), reversed(stride), strict=True):
        total = _same(n, k, s) - n
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def _fake_pad_same(x: Tensor, kernel: list[int], stride: list[int]) -> tuple[Tensor]:
    size = [_same(n, k, s) for n, k, s in zip(x.shape[1:-1], kernel, stride, strict=True)]
    return (x.new_empty((x.shape[0], *size, x.shape[-1])),)


_pad_same_opaque = opaque(
    "pad_same",
    "Tensor x, SymInt[] kernel, SymInt[] stride",
    1,
    lambda *args: (_run_pad_same(*args),),
    _fake_pad_same,
)


def _pad_same(x: Tensor, kernel: list[int], stride: list[int]) -> Tensor:
    if any(k < s for k, s in zip(kernel, stride, strict=True)):
        raise ValueError(f"expected a kernel of at least the stride, got {list(kernel)} and {list(stride)}")
    return _run_pad_same(x, kernel, stride) if sizes_are_known((x,)) else _pad_same_opaque(x, kernel, stride)[0]


# x: [B, *spatial, C]; `size` and `multiple` have one entry per spatial axis. Padding is zero.
pad_to_at_least = composite("pad_to_at_least(Tensor(a) x, SymInt[] size) -> Tensor(a)", _pad_to_at_least)
pad_to_multiple = composite("pad_to_multiple(Tensor(a) x, SymInt[] multiple) -> Tensor(a)", _pad_to_multiple)
fit = composite("fit(Tensor(a) x, SymInt[] size) -> Tensor(a)", _fit)
# TensorFlow's rule "SAME": the bottom and right get the odd zero. An even length before a window of 3 every 2 is padded
# by (0, 1), an odd one by (1, 1).
pad_same = composite("pad_same(Tensor x, SymInt[] kernel, SymInt[] stride) -> Tensor", _pad_same)
