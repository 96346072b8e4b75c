"""Efficient attention: keys become a few global descriptions of the map, of which every query takes its mixture."""

import torch
from torch import Tensor, nn

from visattn.layers.token_mixer import Size, TokenMixer
from visattn.ops import efficient_attention

torch.fx.wrap("efficient_attention")


class EfficientAttention(TokenMixer):
    """Efficient attention, softmax(q) (softmax(k)^T v), without position; no parameters beyond the projections.

    Shapes: [B, H, W, dim] -> [B, H, W, dim], or with `size` (H, W) given [B, P + H * W, dim] -> the same.

    Arguments and errors are those of `TokenMixer`. Source: arXiv:1812.01243, section 3.2.
    """

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, size: Size, kv_size: Size) -> Tensor:
        return efficient_attention(q, k, v)


class EfficientAttention2d(nn.Module):
    """Efficient attention as a residual module for convolutional networks, x + reprojection(attention(x)).

    Shapes: [B, in_channels, H, W] -> the same, any H and W.

    Args:
        in_channels: Channels of the map.
        key_channels: Channels of queries and keys, all heads together.
        head_count: Heads.
        value_channels: Channels of values, all heads together.
        zero_init: Start as the identity, by zero weights of the reprojection: for insertion into a trained network.

    Raises:
        ValueError: Key or value channels that the heads do not divide.

    Source: arXiv:1812.01243, and the official module (MIT), whose parameters have the same names. That one rounds
    key_channels down to a multiple of head_count without a word.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        head_count: int,
        value_channels: int,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if head_count < 1 or key_channels % head_count or value_channels % head_count:
            raise ValueError(
                f"expected key_channels and value_channels divisible by head_count, got {key_channels}, "
                f"{value_channels} and {head_count}"
            )
        dd = {"device": device, "dtype": dtype}
        self.head_count = head_count
        self.zero_init = zero_init
        self.keys = nn.Conv2d(in_channels, key_channels, 1, **dd)
        self.queries = nn.Conv2d(in_channels, key_channels, 1, **dd)
        self.values = nn.Conv2d(in_channels, value_channels, 1, **dd)
        self.reprojection = nn.Conv2d(value_channels, in_channels, 1, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.zero_init:
            for parameter in self.reprojection.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` [B, H, W] boolean, True where there is image: elsewhere x stays as it is, and nothing looks there."""
        q, k, v = (self._heads(project(x)) for project in (self.queries, self.keys, self.values))
        out = efficient_attention(q, k, v, mask=mask).flatten(3).permute(0, 3, 1, 2)  # [B, C, H, W]
        out = self.reprojection(out)
        if mask is not None:
            out = out.masked_fill(~mask[:, None], 0.0)
        return x + out

    def _heads(self, x: Tensor) -> Tensor:
        """Split the heads of a map [B, C, H, W] into a view [B, H, W, N, D]."""
        return x.permute(0, 2, 3, 1).unflatten(-1, [self.head_count, -1])  # [B, H, W, N, D]
