"""Self-attention modules over `visattn.ops.neighborhood_attention`, channels-last."""

import torch
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from visattn.ops import fit, neighborhood_attention, pad_to_at_least, resize_rel_pos

torch.fx.wrap("fit")
torch.fx.wrap("neighborhood_attention")
torch.fx.wrap("pad_to_at_least")
torch.fx.wrap("resize_rel_pos")


class _SelfAttention(nn.Module):
    """Projections, heads and position table, named as in the official modules; subclasses attend.

    `table_size` None leaves the table out. `attn_dim`, the width of all heads together, and `out_dim` are `dim` if not
    given.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        table_size: tuple[int, ...] | None,
        qkv_bias: bool,
        proj_drop: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        attn_dim: int | None = None,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        attn_dim = attn_dim or dim
        if attn_dim % num_heads:
            raise ValueError(f"expected dim divisible by num_heads, got {attn_dim} and {num_heads}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = attn_dim // num_heads
        self.qkv = nn.Linear(dim, 3 * attn_dim, bias=qkv_bias, **dd)
        table = None if table_size is None else nn.Parameter(torch.empty(num_heads, *table_size, **dd))
        self.register_parameter("rpb", table)
        self.proj = nn.Linear(attn_dim, out_dim or dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, W, C] -> q, k, v [B, H, W, N, D], views of one projection."""
        b, h, w, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, h, w, 3, self.num_heads, self.head_dim).unbind(3)
        return q, k, v


class NeighborhoodAttention(_SelfAttention):
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
        super().__init__(dim, num_heads, table, qkv_bias, proj_drop, device, dtype)
        self.kernel_size = list(to_2tuple(kernel_size))
        self.dilation = list(to_2tuple(dilation))
        self.stride = [1, 1]
        self.is_causal = [False, False]
        self.min_size = [k * d for k, d in zip(self.kernel_size, self.dilation, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        q, k, v = self._project(pad_to_at_least(x, self.min_size))
        x = neighborhood_attention(q, k, v, self.kernel_size, self.dilation, self.stride, self.is_causal, self.rpb)
        x = fit(x.flatten(3), [h, w])
        return self.proj_drop(self.proj(x))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"


class GlobalAttention(_SelfAttention):
    """Multi-head attention over the whole map, with a relative position table learned on maps of `feat_size`.

    This is neighborhood attention with a window as large as the map; the table is interpolated for other map sizes.

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
        rel_pos: Computes the table [N, 2H-1, 2W-1] for a map (H, W), instead of `rpb`; `feat_size` has no effect then.
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
        super().__init__(dim, num_heads, table, qkv_bias, proj_drop, device, dtype, attn_dim, out_dim)
        self.resize = resize
        self.rel_pos = rel_pos

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        q, k, v = self._project(x)
        if self.rel_pos is not None:
            bias = self.rel_pos(h, w)
        else:
            bias = resize_rel_pos(self.rpb, [2 * h - 1, 2 * w - 1], self.resize)
        x = neighborhood_attention(q, k, v, [h, w], [1, 1], [1, 1], [False, False], bias)
        return self.proj_drop(self.proj(x.flatten(3)))
