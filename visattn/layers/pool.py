"""Pooling of stride 2, and padding, of maps [B, C, H, W] of any size."""

import reprlib

import torch
from torch import Tensor, nn

from visattn.ops import pad_same, pool2x2

torch.fx.wrap("pad_same")
torch.fx.wrap("pool2x2")


class PadSame(nn.Module):
    """TensorFlow's "SAME" padding for a convolution of `kernel_size` and `stride` that pads nothing itself.

    Where the stride is 1 the two rules agree, and the convolution's own padding is cheaper.
    """

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size = [kernel_size, kernel_size]
        self.stride = [stride, stride]

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # [B, H, W, C]
        x = pad_same(x, kernel=self.kernel_size, stride=self.stride)  # [B, H', W', C]
        return x.permute(0, 3, 1, 2)  # [B, C, H', W']


class Pool2x2(nn.Module):
    """Average ("avg") or maximum ("max") of 2 x 2 pixels; the windows at the border of an odd map are smaller."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return pool2x2(x.permute(0, 2, 3, 1), self.kind).permute(0, 3, 1, 2)  # [B, C, H', W']


def create_pool(kind: str) -> nn.Module:
    """Pooling of stride 2 that gives ceil(size / 2) for every size, as strided convolutions do.

    Args:
        kind: "avg2" or "max2", windows of 2 x 2, cut at the border of an odd map (TensorFlow's "SAME"); "max3", windows
            of 3 x 3 around every second pixel; "avg3", the same with the zeros outside counted (torchvision's MaxViT).

    Raises:
        ValueError: Another kind.
    """
    if kind in ("avg2", "max2"):
        return Pool2x2(kind[:3])
    if kind == "avg3":
        return nn.AvgPool2d(3, stride=2, padding=1)
    if kind == "max3":
        return nn.MaxPool2d(3, stride=2, padding=1)
    raise ValueError(
        f"expected a pool of 'avg2', 'avg3', 'max2' or 'max3', got {reprlib.repr(kind):.80}"
    )
