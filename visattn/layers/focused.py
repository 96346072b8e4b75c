"""Focused linear attention: linear attention of sharpened queries and keys, with a convolution of the values."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.layers.conv import DepthwiseConv
from visattn.layers.token_mixer import Size, TokenMixer
from visattn.ops import focused_linear_attention, resize_rel_pos

torch.fx.wrap("focused_linear_attention")
torch.fx.wrap("resize_rel_pos")


class _SharedConv(DepthwiseConv):
    """Depthwise convolution of all heads with the kernels of one: [B, H, W, N * D] -> [B, H, W, N * D]."""

    def __init__(
        self,
        head_dim: int,
        kernel_size: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(head_dim, kernel_size, device, dtype)
        self.num_heads = num_heads

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.repeat(self.num_heads, 1, 1, 1), self.bias.repeat(self.num_heads)
        groups = self.num_heads * self.out_channels
        x = input.permute(0, 3, 1, 2)  # [B, C, H, W]
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)
        return x.permute(0, 2, 3, 1)  # [B, H, W, C]


class FocusedLinearAttention(TokenMixer):
    """Focused linear attention plus a depthwise convolution of the values, whose kernels all heads share.

    Keys carry a learned position, resized (bicubic) for maps other than `feat_size`; prefix tokens have none and are
    not convolved. With sr_ratio > 1 the values are resized for the convolution linearly along the sequence of all
    tokens, not on the map: so did the official code.

    Shapes: [B, H, W, dim] -> [B, H, W, dim], or with `size` (H, W) given [B, P + H * W, dim] -> the same.

    Args: those of `TokenMixer` and
        focusing_factor: Exponent of the sharpening.
        kernel_size: Odd kernel of the convolution.

    Raises:
        ValueError: What `TokenMixer` refuses, an even kernel, or a factor that is not positive.

    Source: FLatten Transformer (arXiv:2308.00442), section 3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feat_size: tuple[int, int],
        num_prefix_tokens: int = 0,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        focusing_factor: float = 3.0,
        kernel_size: int = 5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        how = (feat_size, num_prefix_tokens, sr_ratio, qkv_bias, proj_drop)
        super().__init__(dim, num_heads, *how, **dd)
        if not 0 < focusing_factor < float("inf"):
            raise ValueError(f"expected focusing_factor > 0, got {focusing_factor}")
        self.focusing_factor = float(focusing_factor)
        kv_size = [max(1, n // sr_ratio) for n in feat_size]
        self.scale = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.positional_encoding = nn.Parameter(torch.empty(1, *kv_size, dim, **dd))
        self.dwc = _SharedConv(self.head_dim, kernel_size, num_heads, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.scale)
        nn.init.zeros_(self.positional_encoding)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, size: Size, kv_size: Size) -> Tensor:
        scale = self.scale.view(self.num_heads, self.head_dim)  # [N, D]
        k = k + self._positions(kv_size).to(k.dtype)
        out = focused_linear_attention(q, k, v, focus_scale=scale, factor=self.focusing_factor)
        v = self._map(v, kv_size)
        if self.sr is not None:
            v = F.interpolate(v.flatten(1, 2).mT, size[0] * size[1], mode="linear")  # [B, C, H * W]
            v = v.mT.unflatten(1, size)  # [B, H, W, C]
        return self._add_to_map(out, self.dwc(v))

    def _positions(self, size: list[int]) -> Tensor:
        """Resize the table to maps of `size`, zero for prefix tokens: [1, M, N, D]."""
        table = self.positional_encoding[0].permute(2, 0, 1)  # [C, h, w]
        table = resize_rel_pos(table, size).flatten(1).T  # [H * W, C]
        if self.num_prefix_tokens:
            table = F.pad(table, [0, 0, self.num_prefix_tokens, 0])
        return table.unflatten(1, [self.num_heads, self.head_dim])[None]  # [1, M, N, D]
