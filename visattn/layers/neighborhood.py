"""Attention of every token to its neighbours, or to the whole map, on channels-last maps with a position table."""

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from visattn.layers.attention import MultiHeadAttention, attend_globally
from visattn.ops import fit, neighborhood_attention, pad_to_at_least, resize_rel_pos

torch.fx.wrap("attend_globally")
torch.fx.wrap("fit")
torch.fx.wrap("neighborhood_attention")
torch.fx.wrap("pad_to_at_least")
torch.fx.wrap("resize_rel_pos")


class NeighborhoodAttention(MultiHeadAttention):
    """Multi-head neighborhood attention on maps of any size, with a learned relative position bias.

    A map smaller than `kernel_size * dilation` is zero-padded at the bottom and right before the projection and
    cropped after the attention, as natten 0.14 did when the official weights were trained: padding tokens are real
    neighbours that carry the bias of `qkv`.

    Shapes: [B, H, W, dim] -> [B, H, W, dim].

    Sources: arXiv:2204.07143, arXiv:2209.15001; parameters as in SHI-Labs/NATTEN 0.14 (MIT).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | tuple[int, int] = 7,
        dilation: int | tuple[int, int] = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        table = tuple(2 * k - 1 for k in to_2tuple(kernel_size))
        super().__init__(dim, num_heads, qkv_bias, proj_drop, table, device=device, dtype=dtype)
        self.kernel_size = list(to_2tuple(kernel_size))
        self.dilation = list(to_2tuple(dilation))
        self.min_size = [k * d for k, d in zip(self.kernel_size, self.dilation, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        q, k, v = self._project(pad_to_at_least(x, self.min_size))
        window = {"kernel_size": self.kernel_size, "dilation": self.dilation}
        x = neighborhood_attention(q, k, v, **window, bias=self.rpb)
        x = fit(x.flatten(3), [h, w])  # [B, H, W, C]
        return self.proj_drop(self.proj(x))

    def extra_repr(self) -> str:
        window = f"kernel_size={self.kernel_size}, dilation={self.dilation}"
        return f"num_heads={self.num_heads}, {window}"


class GlobalAttention(MultiHeadAttention):
    """Multi-head attention over the whole map, with a relative position table learned on maps of `feat_size`.

    The table is interpolated for maps of other sizes.

    Shapes: [B, H, W, dim] -> [B, H, W, out_dim].

    Args:
        dim: Channels of the input.
        num_heads: Heads.
        feat_size: Map that the table `rpb` [N, 2 * feat_size - 1 per axis] is learned for.
        qkv_bias: Bias of the query, key and value projections.
        proj_drop: Dropout after the output projection.
        attn_dim: Channels of all heads together; default `dim`.
        out_dim: Channels of the output; default `dim`.
        resize: Interpolation of the table, "bicubic" or "bilinear".
        rel_pos: Computes the table [N, 2H-1, 2W-1] for the map that comes in, instead of `rpb`; `feat_size` has no
            effect then.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feat_size: int | tuple[int, int],
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_dim: int | None = None,
        out_dim: int | None = None,
        resize: str = "bicubic",
        rel_pos: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        table = tuple(2 * n - 1 for n in to_2tuple(feat_size)) if rel_pos is None else None
        how = {"attn_dim": attn_dim, "out_dim": out_dim, "device": device, "dtype": dtype}
        super().__init__(dim, num_heads, qkv_bias, proj_drop, table, **how)
        self.resize = resize
        self.rel_pos = rel_pos

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        q, k, v = self._project(x)
        if self.rel_pos is not None:
            table = self.rel_pos(x)
        else:
            table = resize_rel_pos(self.rpb, [2 * h - 1, 2 * w - 1], self.resize)
        x = attend_globally(q, k, v, table=table)
        return self.proj_drop(self.proj(x.flatten(3)))  # [B, H, W, out_dim]
