"""Depthwise convolution within windows."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from visattn.ops.geometry import ceil_div
from visattn.ops.padding import fit
from visattn.ops.registration import custom_op


def _empty(x: Tensor, weight: Tensor, bias: Tensor | None, window: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape)


@custom_op(fake=_empty)
def window_conv(x: Tensor, weight: Tensor, bias: Tensor | None, window: Sequence[int]) -> Tensor:
    """Convolve each window by itself, with zeros around it: [B, H, W, C] -> [B, H, W, C].

    Args:
        x: The map; windows at the bottom and right may have fewer tokens.
        weight: [C, 1, kh, kw], odd kernels.
        bias: [C] or None.
        window: Tokens of a window per axis.

    Raises:
        ValueError: A weight or a window that does not fit.
    """
    b, height, width, c = x.shape
    (kh, kw), (h, w) = weight.shape[-2:], window
    if weight.shape[:-2] != (c, 1) or kh % 2 == 0 or kw % 2 == 0 or min(window) < 1:
        raise ValueError(
            f"expected weight [{c}, 1, kh, kw] of odd kernels for x of {c} channels, and windows of at least 1, got "
            f"{list(weight.shape)} and {list(window)}"
        )
    rows, cols = ceil_div(height, h), ceil_div(width, w)
    x = fit(x, [rows * h, cols * w])  # zeros of the padding are those that surround a window anyway
    x = x.reshape(b, rows, h, cols, w, c).permute(0, 1, 3, 5, 2, 4)  # [B, rows, cols, C, h, w]
    x = x.flatten(0, 2)  # [B * windows, C, h, w]
    x = F.conv2d(x, weight, bias, padding=(kh // 2, kw // 2), groups=c)  # [B * windows, C, h, w]
    x = x.reshape(b, rows, cols, c, h, w).permute(0, 1, 4, 2, 5, 3)  # [B, rows, h, cols, w, C]
    return fit(x.reshape(b, rows * h, cols * w, c), [height, width])  # [B, H, W, C]
