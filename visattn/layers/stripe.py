"""CSWin's attention within stripes, vertical ones for half of the heads and horizontal ones for the other half."""

import torch
from torch import Tensor

from visattn.layers.attention import MultiHeadAttention, attend_globally
from visattn.layers.conv import DepthwiseConv
from visattn.ops import fit_centered, pad_centered_to_multiple, window_attention, window_conv

torch.fx.wrap("attend_globally")
torch.fx.wrap("fit_centered")
torch.fx.wrap("pad_centered_to_multiple")
torch.fx.wrap("window_attention")
torch.fx.wrap("window_conv")


class CrossShapedAttention(MultiHeadAttention):
    """Multi-head attention within stripes, to which a depthwise convolution of the values adds local position (LePE).

    The first half of the heads attends in vertical stripes (all rows, `split_size` columns), the second half in
    horizontal ones; together they see a cross. The convolution sees no further than its stripe, with zeros around it.

    Maps that stripes do not divide follow the official segmentation code: queries, keys and values are padded with
    zeros, half of them before the map, and zero keys take part in the softmax.

    Shapes: [B, H, W, dim] -> [B, H, W, dim].

    Args:
        dim: Channels.
        num_heads: Heads.
        split_size: Width of a stripe; None: one branch of all heads attends over the whole map. No parameter changes.
        qkv_bias: Bias of the query, key and value projections.
        proj_drop: Dropout after the output projection.

    Raises:
        ValueError: A width below 1, heads that do not divide the channels, or an odd number of heads for stripes.

    Sources: CSWin (arXiv:2107.00652, section 3.2, equations 3 to 7); microsoft/CSWin-Transformer (MIT) for the padding.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        split_size: int | None = 7,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if split_size is not None and (split_size < 1 or num_heads % 2):
            raise ValueError(
                f"expected split_size of at least 1 and an even number of heads, got {split_size} and {num_heads}; try "
                "split_size=None, which attends over the whole map"
            )
        super().__init__(dim, num_heads, qkv_bias, proj_drop, device=device, dtype=dtype)
        self.lepe = DepthwiseConv(dim, 3, device=device, dtype=dtype)
        self.split_size = split_size

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._project(x)
        if self.split_size is None:
            x = attend_globally(q, k, v).flatten(3) + self.lepe(v.flatten(3))  # [B, H, W, C]
        else:
            h, w, s, n = x.shape[1], x.shape[2], self.split_size, self.num_heads // 2
            down = self._attend(q[..., :n, :], k[..., :n, :], v[..., :n, :], [h, s], [1, s], 0)
            across = self._attend(q[..., n:, :], k[..., n:, :], v[..., n:, :], [s, w], [s, 1], n)
            x = torch.cat([down, across], -1)  # [B, H, W, C]
        return self.proj_drop(self.proj(x))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, stripe: list[int], multiple: list[int], head: int
    ) -> Tensor:
        """Attend [B, H, W, N, D] -> [B, H, W, N * D], the N heads from `head` on, in stripes of the padded map."""
        size, first = [q.shape[1], q.shape[2]], head * self.head_dim
        channels = slice(first, first + self.num_heads // 2 * self.head_dim)
        # Padding takes the heads for a third axis, on which nothing is to be padded.
        multiple = [*multiple, 1]
        q, k, v = (pad_centered_to_multiple(t, multiple) for t in (q, k, v))  # [B, H', W', N, D]
        x = window_attention(q, k, v, window_size=stripe).flatten(3)  # [B, H', W', N * D]
        weight, bias = self.lepe.weight[channels], self.lepe.bias[channels]
        x = x + window_conv(v.flatten(3), weight, bias, window=stripe)  # [B, H', W', N * D]
        return fit_centered(x, size)  # [B, H, W, N * D]

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, split_size={self.split_size}"
