"""Attention over the whole channels-last map with a depthwise convolution as position encoding."""

import torch
from torch import Tensor

from visattn.layers.attention import MultiHeadAttention, attend_globally
from visattn.layers.conv import DepthwiseConv
from visattn.ops.checks import check_choice

torch.fx.wrap("attend_globally")


class LePEAttention(MultiHeadAttention):
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
        check_choice("lepe_on", lepe_on, ("input", "value"))
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, qkv_bias, **dd)
        self.lepe_on = lepe_on
        self.lepe = DepthwiseConv(dim, side_dwconv, **dd) if side_dwconv else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._project(x)
        out = attend_globally(q, k, v).flatten(3)  # [B, H, W, C]
        if self.lepe is not None:
            out = out + self.lepe(v.flatten(3) if self.lepe_on == "value" else x)  # [B, H, W, C]
        return self.proj(out)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, lepe_on={self.lepe_on!r}"
