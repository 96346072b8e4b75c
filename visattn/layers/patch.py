"""Images to token maps, and maps to maps of half the size; outputs are channels-last, any input size.

Downsamplers of stride 1 keep the map's size: with the same parameters they compute what those of stride 2 do, at every
position. Their `dilation` spreads the taps where strides before them were left out too.
"""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visattn.ops import floor_to_multiple, pad_to_multiple, resize_rel_pos

torch.fx.wrap("floor_to_multiple")
torch.fx.wrap("pad_to_multiple")
torch.fx.wrap("resize_rel_pos")


class ConvTokenizer(nn.Module):
    """Two 3x3 convolutions of stride 2, nothing between them, then LayerNorm: [B, I, H, W] -> [B, H/4, W/4, C]."""

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(embed_dim // 2, embed_dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = nn.LayerNorm(embed_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1))  # [B, H/4, W/4, C]


class PatchTokenizer(nn.Module):
    """Linear embedding of p x p patches, then LayerNorm: [B, I, H, W] -> [B, H/p, W/p, C].

    Images that p does not divide are zero-padded at the bottom and right. An odd `kernel_size` larger than p makes
    patches overlap: each is centred on the first pixel of its p x p, and zeros surround the image.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        patch_size: int,
        kernel_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.patch_size = [patch_size, patch_size]
        how = {"stride": patch_size, "padding": kernel_size // 2 if kernel_size else 0, **dd}
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size or patch_size, **how)
        self.norm = nn.LayerNorm(embed_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x.permute(0, 2, 3, 1), self.patch_size)  # [B, H', W', I]
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # [B, H/p, W/p, C]


class PatchConv(nn.Conv2d):
    """Convolution of patches that do not overlap: [B, dim, H, W] -> [B, out_dim, H/size, W/size], rounded down.

    Maps smaller than a patch are zero-padded at the bottom and right. With `stride` 1 there is a patch at every
    position, [B, out_dim, H, W], and zeros at the bottom and right are what is missing of them. Arguments are those of
    `nn.Conv2d`, as adapters make others of a layer's class; the stride is the kernel's size, or 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.stride == (1, 1):
            more = self.dilation[0] * (self.kernel_size[0] - 1)
            x = F.pad(input, (0, more, 0, more))  # [B, dim, H + more, W + more]
        else:
            x = floor_to_multiple(input.permute(0, 2, 3, 1), self.kernel_size)  # [B, H', W', dim]
            x = x.permute(0, 3, 1, 2)  # [B, dim, H', W']
        return self._conv_forward(x, self.weight, self.bias)


class PositionedTokenizer(nn.Module):
    """Linear embedding of p x p patches, LayerNorm, plus a learned position of each: [B, H, W, I] -> [B, H/p, W/p, C].

    Maps that p does not divide are cropped or padded as by `PatchConv`, which says what `stride` 1 does. The table of
    positions [1, h, w, C] is resized (bilinear) for maps of another size.

    Args:
        in_chans: Channels of the map.
        embed_dim: C.
        patch_size: p.
        feat_size: Map (h, w) that positions are learned for.
        input_fmt: "NHWC", or "NCHW" for images [B, I, H, W].
        stride: Pixels from one patch to the next, p or 1; default p.
        dilation: Pixels from one of a patch to the next.

    Source: PVT (arXiv:2102.12122), section 3.2.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        patch_size: int,
        feat_size: tuple[int, int],
        input_fmt: str = "NHWC",
        stride: int | None = None,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.channels_first = input_fmt == "NCHW"
        stride = stride or patch_size
        self.proj = PatchConv(in_chans, embed_dim, patch_size, stride, dilation=dilation, **dd)
        self.norm = nn.LayerNorm(embed_dim, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, *feat_size, embed_dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal (std 0.02) for the positions."""
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.channels_first else x.permute(0, 3, 1, 2)  # [B, I, H, W]
        x = self.norm(self.proj(x).permute(0, 2, 3, 1))  # [B, H/p, W/p, C]
        table = self.pos_embed[0].permute(2, 0, 1)  # [C, h, w]
        table = resize_rel_pos(table, [x.shape[1], x.shape[2]], "bilinear")  # [C, H/p, W/p]
        return x + table.permute(1, 2, 0)  # [B, H/p, W/p, C]


class ConvDownsampler(nn.Module):
    """3x3 convolution of stride 2 (or 1), then LayerNorm: [B, H, W, C] -> [B, H/2, W/2, 2C]."""

    def __init__(
        self,
        dim: int,
        bias: bool = False,
        stride: int = 2,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride, dilation, dilation, bias=bias, **dd)
        self.norm = nn.LayerNorm(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduction(x.permute(0, 3, 1, 2))  # [B, 2C, H/2, W/2]
        return self.norm(x.permute(0, 2, 3, 1))  # [B, H/2, W/2, 2C]


class PatchMerging(nn.Module):
    """Swin's 2x2 merge, LayerNorm(4C) before Linear(4C, 2C): [B, H, W, C] -> [B, H/2, W/2, 2C].

    Odd maps are zero-padded at the bottom and right. The four neighbours are concatenated column by column. With stride
    1 every position is merged with those `dilation` below and to its right, zeros outside: [B, H, W, 2C].
    """

    def __init__(
        self,
        dim: int,
        stride: int = 2,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.stride = stride
        self.dilation = dilation
        self.norm = nn.LayerNorm(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            d = self.dilation
            column = torch.cat([x, F.pad(x, (0, 0, 0, 0, 0, d))[:, d:]], -1)  # [B, H, W, 2C]
            x = torch.cat([column, F.pad(column, (0, 0, 0, d))[:, :, d:]], -1)  # [B, H, W, 4C]
        else:
            x = pad_to_multiple(x, [2, 2])
            b, h, w, c = x.shape
            x = x.reshape(b, h // 2, 2, w // 2, 2, c)  # [B, H/2, 2, W/2, 2, C]
            x = x.permute(0, 1, 3, 4, 2, 5)  # [B, H/2, W/2, 2, 2, C]
            x = x.flatten(3)  # [B, H/2, W/2, 4C]
        return self.reduction(self.norm(x))
