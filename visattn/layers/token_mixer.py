"""What the attention layers share that stand in for one another inside a transformer block."""

import torch
from torch import Tensor, nn

from visattn.layers.attention import MultiHeadAttention, attend_globally
from visattn.ops import floor_to_multiple

torch.fx.wrap("attend_globally")
torch.fx.wrap("floor_to_multiple")

Size = list[int]  # of a map


class TokenMixer(MultiHeadAttention):
    """Projections of multi-head attention among the tokens of a map and prefix tokens before them (a class token).

    Subclasses say how tokens attend: `_attend(q, k, v, size, kv_size)`, where q is [B, L, N, D], k and v [B, M, N, D],
    `size` the map of the queries, `kv_size` that of keys and values, and the result [B, L, N, D].

    Shapes: [B, H, W, dim] -> [B, H, W, dim], or with `size` (H, W) given [B, P + H * W, dim] -> the same.

    Args:
        dim: Channels.
        num_heads: Heads.
        feat_size: Map (H, W) that position parameters are made for; maps of any size may come in.
        num_prefix_tokens: P, tokens that come before those of the map and are attended to as well.
        sr_ratio: Keys and values of a map reduced by this factor per axis, as in PVT: a convolution over patches of
            sr_ratio x sr_ratio, then a norm. Rows and columns that no whole patch covers have no key.
        qkv_bias: Bias of the query, key and value projections.
        proj_drop: Dropout after the output projection.

    Raises:
        ValueError: Heads that do not divide the channels, sizes or ratios below 1, or prefix tokens with a reduced map.

    Sources: PVT (arXiv:2102.12122, section 3.3) for the reduction.
    """

    # Where keys and values are reduced:
    sr: nn.Conv2d
    norm: nn.LayerNorm

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feat_size: tuple[int, int],
        num_prefix_tokens: int = 0,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if sr_ratio < 1 or min(feat_size) < 1:
            got = f"{sr_ratio} and {feat_size}"
            raise ValueError(f"expected sr_ratio and feat_size of at least 1, got {got}")
        if sr_ratio > 1 and num_prefix_tokens:
            expected = f"no prefix tokens with sr_ratio {sr_ratio}"
            raise ValueError(f"expected {expected}, got {num_prefix_tokens}")
        dd, reduces = {"device": device, "dtype": dtype}, sr_ratio > 1
        super().__init__(dim, num_heads, qkv_bias, proj_drop, fused=not reduces, **dd)
        self.scale = self.head_dim**-0.5
        self.num_prefix_tokens = num_prefix_tokens
        self.sr_ratio = [sr_ratio, sr_ratio]
        reduce = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, **dd) if reduces else None
        self.register_module("sr", reduce)
        self.register_module("norm", nn.LayerNorm(dim, **dd) if reduces else None)

    def forward(self, x: Tensor, size: list[int] | None = None) -> Tensor:
        q, k, v, grid, kv_grid = self._project_tokens(x, size)
        # [B, H, W, C] or [B, P + H * W, C]
        x = self._attend(q, k, v, grid, kv_grid).reshape(x.shape)
        return self.proj_drop(self.proj(x))

    def _project_tokens(
        self, x: Tensor, size: Size | None
    ) -> tuple[Tensor, Tensor, Tensor, Size, Size]:
        """Project to q [B, L, N, D], k and v [B, M, N, D]; also the maps of queries and of keys."""
        grid = [x.shape[1], x.shape[2]] if size is None else size
        if self.qkv is not None:
            q, k, v = self._project(x.flatten(1, -2))  # [B, L, N, D]
            return q, k, v, grid, grid
        x = x.reshape(x.shape[0], grid[0], grid[1], x.shape[-1])  # [B, H, W, C]
        y = floor_to_multiple(x, self.sr_ratio).permute(0, 3, 1, 2)  # [B, C, H', W']
        y = self.norm(self.sr(y).permute(0, 2, 3, 1))  # [B, H'', W'', C]
        k, v = self._split(self.kv(y.flatten(1, 2)), 2)  # [B, M, N, D]
        (q,) = self._split(self.q(x.flatten(1, 2)), 1)  # [B, L, N, D]
        return q, k, v, grid, [y.shape[1], y.shape[2]]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, size: Size, kv_size: Size) -> Tensor:
        raise NotImplementedError

    def _map(self, x: Tensor, size: Size) -> Tensor:
        """Take [B, P + H * W, N, D] -> [B, H, W, N * D], without the prefix tokens."""
        return x[:, self.num_prefix_tokens :].flatten(2).unflatten(1, size)  # [B, H, W, C]

    def _add_to_map(self, x: Tensor, y: Tensor) -> Tensor:
        """Add a map y [B, H, W, N * D] to tokens x [B, P + H * W, N, D]; prefix tokens stay."""
        y = y.flatten(1, 2).unflatten(-1, [self.num_heads, self.head_dim])  # [B, H * W, N, D]
        if prefix := self.num_prefix_tokens:
            return torch.cat([x[:, :prefix], x[:, prefix:] + y], 1)
        return x + y

    def extra_repr(self) -> str:
        tokens = f"num_prefix_tokens={self.num_prefix_tokens}, sr_ratio={self.sr_ratio[0]}"
        return f"num_heads={self.num_heads}, {tokens}"


class SoftmaxAttention(TokenMixer):
    """Ordinary attention, softmax(q k^T / sqrt(head width)) v, without position: the control for the others."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, size: Size, kv_size: Size) -> Tensor:
        return attend_globally(q, k, v)
