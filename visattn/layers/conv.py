"""Convolutions: with norm and activation on maps [B, C, H, W], depthwise on maps [B, H, W, C]."""

import torch
from timm.layers import create_act_layer
from torch import Tensor, nn


def create_act(name: str | None) -> nn.Module:
    """Build the activation that timm calls `name`; None: the identity."""
    return create_act_layer(name, inplace=True) or nn.Identity()


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, activation: [B, in_dim, H, W] -> [B, dim, H/stride, W/stride], rounded up.

    The norm is a plain `nn.BatchNorm2d`: `nn.SyncBatchNorm.convert_sync_batchnorm` would lose the activation of timm's
    `BatchNormAct2d`.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the output.
        kernel_size: Odd.
        stride: Stride of the convolution.
        act: Activation, a name that timm knows; None leaves it out.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int = 1,
        stride: int = 1,
        act: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        how = {"stride": stride, "padding": kernel_size // 2, "bias": False, **dd}
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, **how)
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.act = create_act(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def dilate_convs(module: nn.Module, dilation: int) -> None:
    """Dilate the convolutions of stride 1 in `module`, in place; zero padding keeps their maps' sizes."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d) and conv.stride == (1, 1):
            height, width = conv.kernel_size
            conv.dilation = (dilation, dilation)
            conv.padding = (dilation * (height // 2), dilation * (width // 2))


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of an odd kernel, zero padding, with bias: [B, H, W, dim] -> [B, H, W, dim].

    Raises:
        ValueError: An even kernel, which would shift the map.
    """

    # pyrefly: ignore[bad-override-mutable-attribute]: there always is one
    bias: nn.Parameter

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"expected an odd kernel_size, got {kernel_size}")
        how = {"groups": dim, "device": device, "dtype": dtype}
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, **how)

    def forward(self, input: Tensor) -> Tensor:
        x = self._conv_forward(input.permute(0, 3, 1, 2), self.weight, self.bias)  # [B, C, H, W]
        return x.permute(0, 2, 3, 1)  # [B, H, W, C]


class ResDWConv(nn.Conv2d):
    """Depthwise convolution of an odd kernel plus its input: [B, dim, H, W] -> [B, dim, H, W]."""

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        how = {"groups": dim, "device": device, "dtype": dtype}
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, **how)

    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


class ChannelScale(nn.Module):
    """Factor and summand per channel: [B, dim, H, W] -> [B, dim, H, W].

    Args:
        dim: Channels.
        init_value: First value of the factors; the summands start at 0.
    """

    def __init__(
        self,
        dim: int,
        init_value: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.init_value = init_value
        self.weight = nn.Parameter(torch.empty(dim, 1, 1, 1, **dd))  # as official files have it
        self.bias = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values."""
        nn.init.constant_(self.weight, self.init_value)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, 0] + self.bias[:, None, None]
