"""Depthwise convolution within windows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from visattn.ops.padding import fit
from visattn.ops.registration import define_op


def _window_conv(x: Tensor, weight: Tensor, bias: Tensor | None, window: list[int]) -> Tensor:
    b, height, width, c = x.shape
    (kh, kw), (h, w) = weight.shape[-2:], window
    if weight.shape[:-2] != (c, 1) or kh % 2 == 0 or kw % 2 == 0 or min(window) < 1:
        raise ValueError(
            f"expected weight [{c}, 1, kh, kw] of odd kernels for x of {c} channels, and windows of at least 1, got "
            f"{list(weight.shape)} and {list(window)}"
        )
    rows, cols = -(-height // h), -(-width // w)
    x = fit(x, [rows * h, cols * w])  # zeros of the padding are those that surround a window anyway
    x = x.reshape(b, rows, h, cols, w, c).permute(0, 1, 3, 5, 2, 4).flatten(0, 2)
    x = F.conv2d(x, weight, bias, padding=(kh // 2, kw // 2), groups=c)
    x = x.reshape(b, rows, cols, c, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, rows * h, cols * w, c)
    return fit(x, [height, width])


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, window: list[int]) -> Tensor:
    return x.new_empty(x.shape)


# x [B, H, W, C], weight [C, 1, kh, kw], bias [C] -> [B, H, W, C]; a window of `window` tokens per axis is convolved by
# itself, with zeros around it. Windows at the bottom and right may have fewer tokens.
window_conv = define_op(
    "window_conv(Tensor x, Tensor weight, Tensor? bias, SymInt[] window) -> Tensor", _window_conv, _fake
)
