"""Class attention: class tokens are the only queries, and gather from a map what a classifier needs."""

import torch
from timm.layers import LayerScale, Mlp
from torch import Tensor, nn

from visattn.layers.attention import MultiHeadAttention, attend_globally
from visattn.ops.checks import default_scale

torch.fx.wrap("attend_globally")


class ClassAttention(MultiHeadAttention):
    """Attention of n class tokens to L others: [B, n, dim], [B, L, dim] -> [B, n, dim].

    Arguments are those of `MultiHeadAttention`.

    Sources: CaiT (arXiv:2103.17239), section 3.2; PatchConvNet (arXiv:2112.13692), section 3.1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        qkv_bias: bool = True,
        attn_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, qkv_bias, attn_dim=attn_dim, fused=False, **dd)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        (q,) = self._split(self.q(tokens), 1)  # [B, n, N, D]
        k, v = self._split(self.kv(x), 2)  # [B, L, N, D]
        return self.proj(attend_globally(q, k, v).flatten(2))  # [B, n, C]

    def weights(self, tokens: Tensor, x: Tensor) -> Tensor:
        """How much every head attends to what: [B, N, n, L], 1 in sum over L."""
        (q,) = self._split(self.q(tokens), 1)  # [B, n, N, D]
        k, _ = self._split(self.kv(x), 2)  # [B, L, N, D]
        q = q * default_scale(self.head_dim, None)
        return (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(-1)  # [B, N, n, L]


class ClassAttentionBlock(nn.Module):
    """tokens + attn(norm1(tokens), norm1(map)), then tokens + mlp(norm2(tokens)); layer scale on both branches.

    Shapes: [B, n, dim], map [B, H, W, dim] -> [B, n, dim].

    Args:
        dim: Channels.
        num_heads: Heads.
        mlp_ratio: Hidden width of the MLP over `dim`.
        layer_scale: Initial value of the per-channel scales.
        attend_tokens: Keys and values are those of the class tokens, too.
        qkv_bias: Bias of the query, key and value projections.
        attn_dim: Channels of all heads together; default `dim`.
        eps: Of both norms.
        mlp: Takes the place of the MLP; `mlp_ratio` has no effect then.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        mlp_ratio: float = 3.0,
        layer_scale: float = 1e-4,
        attend_tokens: bool = True,
        qkv_bias: bool = True,
        attn_dim: int | None = None,
        eps: float = 1e-6,
        mlp: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.attend_tokens = attend_tokens
        self.norm1 = nn.LayerNorm(dim, eps=eps, **dd)
        self.attn = ClassAttention(dim, num_heads, qkv_bias, attn_dim, **dd)
        self.ls1 = LayerScale(dim, layer_scale, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=eps, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd) if mlp is None else mlp
        self.ls2 = LayerScale(dim, layer_scale, **dd)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        tokens = tokens + self.ls1(self.attn(*self._normalise(tokens, x)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))

    def attended(self, tokens: Tensor, x: Tensor) -> dict[str, Tensor]:
        """What the class tokens attend to, 1 in sum over all keys.

        Returns:
            "patches" [B, N, n, H, W], a map for every head and class token; with `attend_tokens` also "tokens"
            [B, N, n, n].
        """
        weights = self.attn.weights(*self._normalise(tokens, x))  # [B, N, n, (n +) H * W]
        own, patches = weights.tensor_split([weights.shape[-1] - x.shape[1] * x.shape[2]], -1)
        told = {"patches": patches.unflatten(-1, x.shape[1:3])}  # [B, N, n, H, W]
        return {**told, "tokens": own} if self.attend_tokens else told

    def _normalise(self, tokens: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, n, C], and keys and values [B, (n +) H * W, C]."""
        tokens, x = self.norm1(tokens), self.norm1(x.flatten(1, 2))
        return tokens, torch.cat([tokens, x], 1) if self.attend_tokens else x
