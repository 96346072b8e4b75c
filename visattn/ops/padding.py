"""Padding and cropping of channels-last maps, as ops that trace, script and export.

Most work at the bottom and right and are one operation, `fit`: give a map [B, *spatial, C] a new spatial size.
`pad_same` pads both sides for a strided window, `fit_centered` pads or crops both sides. In graphs with symbolic sizes
they are opaque, so that the graph does not come to depend on whether anything was padded or cropped at the traced size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from visattn.ops.registration import composite, define_op


def _fit(x: Tensor, size: list[int]) -> Tensor:
    pads = [0, 0]
    for axis, n in reversed(list(enumerate(size, start=1))):
        if n < x.shape[axis]:
            x = x.narrow(axis, 0, n)
        pads += [0, n - x.shape[axis]]
    return F.pad(x, pads) if any(pads) else x


def _fake_fit(x: Tensor, size: list[int]) -> Tensor:
    return x.new_empty((x.shape[0], *size, x.shape[-1]))


def _at_least(n: int, low: int) -> int:
    """Their maximum; n itself where its range says so, which later arithmetic need not carry along."""
    return n if statically_known_true(n >= low) else torch.sym_max(n, low)


def _pad_to_at_least(x: Tensor, size: list[int]) -> Tensor:
    return fit(x, [_at_least(n, s) for n, s in zip(x.shape[1:-1], size, strict=True)])


def _pad_to_multiple(x: Tensor, multiple: list[int]) -> Tensor:
    return fit(x, [(n + m - 1) // m * m for n, m in zip(x.shape[1:-1], multiple, strict=True)])


def _floor_to_multiple(x: Tensor, multiple: list[int]) -> Tensor:
    return fit(x, [torch.sym_max(1, n // m) * m for n, m in zip(x.shape[1:-1], multiple, strict=True)])


def _same(n: int, kernel: int, stride: int) -> int:
    """Length that gives a window of `kernel` every `stride` ceil(n / stride) places."""
    if kernel < stride:
        raise ValueError(f"expected a kernel of at least the stride, got {kernel} and {stride}")
    return (n - 1) // stride * stride + kernel


def _pad_same(x: Tensor, kernel: list[int], stride: list[int]) -> Tensor:
    pads = [0, 0]
    for n, k, s in zip(reversed(x.shape[1:-1]), reversed(kernel), reversed(stride), strict=True):
        total = _same(n, k, s) - n
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def _fit_centered(x: Tensor, size: list[int]) -> Tensor:
    pads = [0, 0]
    for axis, n in reversed(list(enumerate(size, start=1))):
        if n < x.shape[axis]:
            x = x.narrow(axis, (x.shape[axis] - n) // 2, n)
        total = n - x.shape[axis]
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads) if any(pads) else x


def _pad_centered_to_multiple(x: Tensor, multiple: list[int]) -> Tensor:
    return fit_centered(x, [(n + m - 1) // m * m for n, m in zip(x.shape[1:-1], multiple, strict=True)])


def _fake_pad_same(x: Tensor, kernel: list[int], stride: list[int]) -> Tensor:
    size = [_same(n, k, s) for n, k, s in zip(x.shape[1:-1], kernel, stride, strict=True)]
    return x.new_empty((x.shape[0], *size, x.shape[-1]))


# x: [B, *spatial, C]; `size` and `multiple` have one entry per spatial axis. Padding is zero.
fit = define_op("fit(Tensor(a) x, SymInt[] size) -> Tensor(a)", _fit, _fake_fit)
pad_to_at_least = composite("pad_to_at_least(Tensor(a) x, SymInt[] size) -> Tensor(a)", _pad_to_at_least)
pad_to_multiple = composite("pad_to_multiple(Tensor(a) x, SymInt[] multiple) -> Tensor(a)", _pad_to_multiple)
# Cropped instead of padded, but to one multiple at least.
floor_to_multiple = composite("floor_to_multiple(Tensor(a) x, SymInt[] multiple) -> Tensor(a)", _floor_to_multiple)
# TensorFlow's rule "SAME": the bottom and right get the odd zero. An even length before a window of 3 every 2 is padded
# by (0, 1), an odd one by (1, 1).
pad_same = define_op("pad_same(Tensor x, SymInt[] kernel, SymInt[] stride) -> Tensor", _pad_same, _fake_pad_same)
# CSWin's rule: half of the padding lies before the map, the odd one after it. Cropping to the old size undoes padding.
fit_centered = define_op("fit_centered(Tensor(a) x, SymInt[] size) -> Tensor(a)", _fit_centered, _fake_fit)
pad_centered_to_multiple = composite(
    "pad_centered_to_multiple(Tensor(a) x, SymInt[] multiple) -> Tensor(a)", _pad_centered_to_multiple
)
