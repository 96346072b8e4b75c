"""Depthwise convolutions on channels-last maps, and attention over the whole map with such a position encoding."""

import reprlib

import torch
from torch import Tensor, nn

from visattn.layers.neighborhood import _SelfAttention
from visattn.ops import neighborhood_attention

torch.fx.wrap("neighborhood_attention")


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of an odd kernel, zero padding, with bias: [B, H, W, dim] -> [B, H, W, dim].

    Raises:
        ValueError: An even kernel, which would shift the map.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"expected an odd kernel_size, got {kernel_size}")
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x.permute(0, 3, 1, 2), self.weight, self.bias).permute(0, 2, 3, 1)


class LePEAttention(_SelfAttention):
    """Multi-head attention over the whole map, to which a depthwise convolution adds local position (LePE).

    proj(softmax(q k^T / sqrt(head width)) v + dwconv(x or v)); any map size, no position table.

    Shapes: [B, H, W, dim] -> [B, H, W, dim].

    Args:
        dim: Channels.
        num_heads: Heads.
        side_dwconv: Kernel of the depthwise convolution; 0 leaves it out.
        lepe_on: What is convolved: "input", x as it comes in, or "value", v.
        qkv_bias: Bias of the query, key and value projections.

    Raises:
        ValueError: Heads that do not divide the channels, an even kernel, another `lepe_on`.

    Sources: LePE is CSWin's (arXiv:2107.00652, equation 6), there on values; on the input as in the last stage of the
    official BiFormer (arXiv:2303.08810, MIT).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        side_dwconv: int = 5,
        lepe_on: str = "input",
        qkv_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if lepe_on not in ("input", "value"):
            raise ValueError(f"expected lepe_on 'input' or 'value', got {reprlib.repr(lepe_on):.80}")
        super().__init__(dim, num_heads, None, qkv_bias, 0.0, device, dtype)
        self.lepe_on = lepe_on
        self.lepe = DepthwiseConv(dim, side_dwconv, device=device, dtype=dtype) if side_dwconv else None

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        q, k, v = self._project(x)
        out = neighborhood_attention(q, k, v, [h, w], [1, 1], [1, 1], [False, False]).flatten(3)
        if self.lepe is not None:
            out = out + self.lepe(v.flatten(3) if self.lepe_on == "value" else x)
        return self.proj(out)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, lepe_on={self.lepe_on!r}"
