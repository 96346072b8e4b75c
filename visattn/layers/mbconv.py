"""Convolutional stem and inverted bottleneck of CoAtNet and MaxViT, on maps [B, C, H, W]."""

import torch
from timm.layers import DropPath, SqueezeExcite, to_2tuple
from torch import Tensor, nn

from visattn.layers.conv import create_act
from visattn.layers.pool import PadSame, create_pool
from visattn.ops.checks import check_choice


class ConvStem(nn.Module):
    """conv3x3 of stride 2, BatchNorm, activation, conv3x3: [B, I, H, W] -> [B, C, H/2, W/2], channels-last in memory.

    Args:
        in_chans: Channels of the image.
        out_chans: Channels of both convolutions, or of each.
        act: Name of the activation, as in timm.
        bias: Biases of the convolutions, for both or for each.
        same_pad: Pad the strided convolution by TensorFlow's rule "SAME" instead of by one pixel on every side.
        norm_eps: Added to BatchNorm's variance.
        norm_momentum: Weight of a new batch in BatchNorm's running statistics.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int | tuple[int, int],
        act: str = "gelu",
        bias: bool | tuple[bool, bool] = False,
        same_pad: bool = False,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner, outer = to_2tuple(out_chans)
        bias1, bias2 = to_2tuple(bias)
        self.pad = PadSame(3, 2) if same_pad else nn.Identity()
        padding = 0 if same_pad else 1
        self.conv1 = nn.Conv2d(in_chans, inner, 3, stride=2, padding=padding, bias=bias1, **dd)
        self.norm1 = nn.BatchNorm2d(inner, norm_eps, norm_momentum, **dd)
        self.act = create_act(act)
        self.conv2 = nn.Conv2d(inner, outer, 3, padding=1, bias=bias2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return self.conv2(self.act(self.norm1(self.conv1(self.pad(x)))))


class MBConv(nn.Module):
    """Inverted bottleneck with the norm in front: [B, dim, H, W] -> [B, out_dim, H/stride, W/stride].

    shortcut(x) + conv1x1(SE(act(norm(dwconv3x3(act(norm(conv1x1(norm(x)))))))); all norms are BatchNorm. Sizes that the
    stride does not divide are rounded up, on both branches. The defaults are those of timm's `coatnet_0_224`.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output; default `dim`.
        stride: 1 or 2.
        dilation: Dilation of the depthwise convolution.
        expand_ratio: Channels between the 1x1 convolutions over `out_dim` (or `dim`, see `expand_input`).
        expand_input: The expansion and `se_ratio` are relative to the input: `expand_ratio * dim` channels, squeezed to
            `se_ratio` of these. False: `expand_ratio * out_dim` channels, squeezed to `se_ratio * out_dim`.
        stride_mode: Where the main branch strides: "dw", the depthwise convolution; "conv1", the first 1x1 convolution;
            "pool", a 2 x 2 average before the first 1x1 convolution.
        pool: Pooling of the shortcut, see `create_pool`.
        project_strided: The shortcut of a block of stride 2 has a 1x1 convolution even if the widths are equal. If they
            differ it always has one.
        same_pad: Pad the strided depthwise convolution by TensorFlow's rule "SAME" instead of by one on every side.
        se_ratio: See `expand_input`.
        se_act: Activation within squeeze and excitation, as in timm.
        se_early: Squeeze and excitation right after the depthwise convolution, before its norm.
        act: Activation after the norms, as in timm.
        pre_act: Also after the first norm.
        bias: Biases of the last 1x1 convolution and of the shortcut's.
        norm_eps: Added to BatchNorm's variance.
        norm_momentum: Weight of a new batch in BatchNorm's running statistics.
        drop_path: Probability of dropping the main branch, per sample.

    Raises:
        ValueError: A stride other than 1 and 2, or an unknown name.

    Sources: CoAtNet (arXiv:2106.04803, appendix A.1), MaxViT (arXiv:2204.01697); google-research/maxvit, timm and
    torchvision for their variants.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        stride: int = 1,
        dilation: int = 1,
        expand_ratio: float = 4.0,
        expand_input: bool = False,
        stride_mode: str = "dw",
        pool: str = "avg2",
        project_strided: bool = False,
        same_pad: bool = False,
        se_ratio: float = 0.25,
        se_act: str = "silu",
        se_early: bool = False,
        act: str = "gelu",
        pre_act: bool = False,
        bias: bool = True,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"expected stride 1 or 2, got {stride}")
        check_choice("stride_mode", stride_mode, ("dw", "conv1", "pool"))
        dd = {"device": device, "dtype": dtype}
        norm = {"eps": norm_eps, "momentum": norm_momentum, **dd}
        out_dim = out_dim or dim
        hidden = int(expand_ratio * (dim if expand_input else out_dim))
        strided = stride == 2
        self.shortcut = nn.Sequential()
        if strided:
            self.shortcut.add_module("pool", create_pool(pool))
        if dim != out_dim or (strided and project_strided):
            self.shortcut.add_module("proj", nn.Conv2d(dim, out_dim, 1, bias=bias, **dd))
        self.act = create_act(act)
        self.pre_norm = nn.BatchNorm2d(dim, **norm)
        self.pre_act = create_act(act if pre_act else None)
        self.down = create_pool("avg2") if strided and stride_mode == "pool" else nn.Identity()
        first = stride if stride_mode == "conv1" else 1
        self.conv1 = nn.Conv2d(dim, hidden, 1, stride=first, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(hidden, **norm)
        pads = same_pad and strided and stride_mode == "dw"
        self.pad = PadSame(3, stride) if pads else nn.Identity()
        self.conv2 = nn.Conv2d(
            hidden,
            hidden,
            3,
            stride=stride if stride_mode == "dw" else 1,
            padding=0 if pads else dilation,
            dilation=dilation,
            groups=hidden,
            bias=False,
            **dd,
        )
        squeezed = int(se_ratio * (hidden if expand_input else out_dim))
        # pyrefly: ignore[bad-argument-type]: timm takes the name of an activation too
        squeeze = SqueezeExcite(hidden, rd_channels=squeezed, act_layer=se_act, **dd)
        self.se_early = squeeze if se_early else None  # conv2 and norm2 can be fused then
        self.norm2 = nn.BatchNorm2d(hidden, **norm)
        self.se = nn.Identity() if se_early else squeeze
        self.conv3 = nn.Conv2d(hidden, out_dim, 1, bias=bias, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.act(self.norm1(self.conv1(self.down(self.pre_act(self.pre_norm(x))))))
        x = self.conv2(self.pad(x))
        if self.se_early is not None:
            x = self.se_early(x)
        x = self.conv3(self.se(self.act(self.norm2(x))))
        return self.drop_path(x) + shortcut
