"""TransNeXt's attention modules over `visattn.ops.aggregated_attention`, channels-last, on maps of any size."""

import math
from typing import Any, cast

import torch
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.layers.attention import MultiHeadAttention, weight_and_bias
from visattn.ops import aggregated_attention, aggregated_weights, avg_pool_grid

torch.fx.wrap("aggregated_attention")
torch.fx.wrap("avg_pool_grid")


class _CosineAttention(MultiHeadAttention):
    """What both modules share. Subclasses add projections and, or None, the parameters of the local keys."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        pretrain_size: int | tuple[int, int],
        bias_size: list[int] | None,
        qkv_bias: bool,
        proj_drop: float,
        fused: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, qkv_bias, proj_drop, fused=fused, **dd)
        self.pretrain_size = list(to_2tuple(pretrain_size))
        if min(self.pretrain_size) < 2:
            expected = "pretrain_size of a map of at least 2 x 2 tokens"
            raise ValueError(f"expected {expected}, got {self.pretrain_size}")
        self.bias_size = bias_size or []
        self.temperature = nn.Parameter(torch.empty(num_heads, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, self.head_dim, **dd))
        self.cpb_fc1 = nn.Linear(2, 512, **dd)
        self.cpb_fc2 = nn.Linear(512, num_heads, **dd)

    def reset_parameters(self) -> None:
        """The official initial values; softplus(temperature) is 1 / 0.24."""
        nn.init.constant_(self.temperature, math.log(math.expm1(1 / 0.24)))
        trunc_normal_(self.query_embedding, std=0.02)

    def _position(self, x: Tensor) -> dict[str, Any]:
        """The arguments of the op that scale queries and make the position bias of pooled keys, for the input x."""
        (weight1, bias1), (weight2, bias2) = (
            weight_and_bias(fc, x) for fc in (self.cpb_fc1, self.cpb_fc2)
        )
        return {
            "temperature": self.temperature,
            "query_embedding": self.query_embedding,
            "cpb_weight1": weight1,
            "cpb_bias1": bias1,
            "cpb_weight2": weight2,
            "cpb_bias2": bias2,
            "pretrain_size": self.pretrain_size,
            "bias_size": self.bias_size,
        }


class CosineAttention(_CosineAttention):
    """Length-scaled cosine attention over the whole map.

    Queries and keys are normalised; a vector per head is added to the queries, and they are scaled by
    softplus(temperature) * log(number of keys). The position bias is an MLP of the displacement on a logarithmic scale.

    Shapes: [B, H, W, dim] -> [B, H, W, dim].

    Args:
        dim: Channels.
        num_heads: Heads.
        pretrain_size: Map that displacements are measured by, at least 2 x 2: that of pre-training, whatever the map.
        bias_size: Map that the position bias is computed for, then interpolated to the one that comes in (bilinear).
            None: computed for the map that comes in.
        qkv_bias: Bias of the query, key and value projections.
        proj_drop: Dropout after the output projection.

    Raises:
        ValueError: Heads that do not divide the channels, or too small a map.

    Source: TransNeXt (arXiv:2311.17132), sections 3.2 and 3.3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        pretrain_size: int | tuple[int, int],
        bias_size: int | tuple[int, int] | None = None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = None if bias_size is None else [*to_2tuple(bias_size), *to_2tuple(bias_size)]
        how = (pretrain_size, sizes, qkv_bias, proj_drop, True, device, dtype)
        super().__init__(dim, num_heads, *how)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._project(x)
        x = aggregated_attention(q, k, v, return_lse=False, **self._position(x))
        return self.proj_drop(self.proj(x.flatten(3)))  # [B, H, W, C]

    def attended(self, x: Tensor) -> dict[str, Tensor]:
        """The softmax weights of every query, for the same input as `forward`.

        Args:
            x: Map [B, H, W, dim].

        Returns:
            "pooled" [B, H, W, N, H, W], the weights of all tokens, which sum to 1.
        """
        q, k, _ = self._project(x)
        return {"pooled": aggregated_weights(q, k, **self._position(x))[1]}


class AggregatedAttention(_CosineAttention):
    """Attention to the neighbours of each token and to pooled tokens of the whole map, in one softmax.

    Both kinds of keys and values come from the same projection, the pooled ones from norm(pool(gelu(sr(x)))). Logits
    are those of `CosineAttention`, the number of keys being that of the query (fewer at the border); neighbours have a
    bias per place in the window instead of the MLP. The weights of the neighbours' values have a second part, the
    product of the query with a learned token per place plus a bias, which takes no part in the softmax.

    Shapes: [B, H, W, dim] -> [B, H, W, dim].

    Args:
        dim: Channels.
        num_heads: Heads.
        kernel_size: Window of neighbours per axis, odd; outside the map there are none.
        sr_ratio: Tokens per axis for one pooled token: the pooled map has max(1, n // sr_ratio) per axis, in bins that
            overlap where `sr_ratio` does not divide n.
        pretrain_size: Map that displacements are measured by, at least 2 x 2: that of pre-training, whatever the map.
        bias_size: Map that the position bias of pooled tokens is computed for, then interpolated to the one that comes
            in (bilinear, keys and queries). None: computed for the map that comes in.
        pool_size: Pooled tokens per axis, at most those of the map, whatever `sr_ratio`; the cost is then linear in
            the number of tokens.
        qkv_bias: Bias of the query, key and value projections.
        proj_drop: Dropout after the output projection.

    Raises:
        ValueError: Heads that do not divide the channels, an even window, a ratio or pool size below 1, or too small a
            map.

    Source: TransNeXt (arXiv:2311.17132), section 3.2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        sr_ratio: int,
        pretrain_size: int | tuple[int, int],
        bias_size: int | tuple[int, int] | None = None,
        pool_size: int | None = None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"expected an odd kernel_size, got {kernel_size}")
        if sr_ratio < 1 or (pool_size is not None and pool_size < 1):
            got = f"{sr_ratio} and {pool_size}"
            raise ValueError(f"expected sr_ratio and pool_size of at least 1, got {got}")
        sizes = None
        if bias_size is not None:
            size = to_2tuple(bias_size)
            pool = [max(1, n // sr_ratio) if pool_size is None else min(n, pool_size) for n in size]
            sizes = [*size, *pool]
        how = (pretrain_size, sizes, qkv_bias, proj_drop, False, device, dtype)
        super().__init__(dim, num_heads, *how)
        dd = {"device": device, "dtype": dtype}
        self.kernel_size = kernel_size
        self.sr_ratio = [sr_ratio, sr_ratio]
        self.pool_size = [] if pool_size is None else [pool_size, pool_size]
        self.sr = nn.Linear(dim, dim, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.local_bias = nn.Parameter(torch.empty(num_heads, kernel_size**2, **dd))
        self.tokens = nn.Parameter(torch.empty(num_heads, self.head_dim, kernel_size**2, **dd))
        self.token_bias = nn.Parameter(torch.empty(num_heads, kernel_size**2, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The official initial values."""
        super().reset_parameters()
        trunc_normal_(self.local_bias, std=0.0004)
        trunc_normal_(self.tokens, std=0.02)
        nn.init.zeros_(self.token_bias)

    def _project_both(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Project [B, H, W, C] to q [B, H, W, N, D], pooled k and v [B, PH, PW, N, D], and k and v of all tokens."""
        pooled = avg_pool_grid(F.gelu(self.sr(x)), self.sr_ratio, self.pool_size)  # [B, PH, PW, C]
        pool_k, pool_v = self._split(self.kv(self.norm(pooled)), 2)
        k, v = self._split(self.kv(x), 2)
        (q,) = self._split(self.q(x), 1)
        return q, pool_k, pool_v, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, pool_k, pool_v, k, v = self._project_both(x)
        x = aggregated_attention(
            q,
            pool_k,
            pool_v,
            **self._position(x),
            k=k,
            v=v,
            kernel_size=self.kernel_size,
            local_bias=self.local_bias,
            tokens=self.tokens,
            token_bias=self.token_bias,
            return_lse=False,
        )
        return self.proj_drop(self.proj(x.flatten(3)))  # [B, H, W, C]

    def attended(self, x: Tensor) -> dict[str, Tensor]:
        """The softmax weights of every query, for the same input as `forward`.

        Args:
            x: Map [B, H, W, dim].

        Returns:
            "local" [B, H, W, N, kernel_size ** 2], the window row by row, 0 outside the map, and "pooled" [B, H, W, N,
            PH, PW], the pooled tokens. The two sum to 1.
        """
        q, pool_k, _, k, _ = self._project_both(x)
        window = {"k": k, "kernel_size": self.kernel_size, "local_bias": self.local_bias}
        local, pooled = aggregated_weights(q, pool_k, **self._position(x), **window)
        return {"local": cast(Tensor, local), "pooled": pooled}

    def extra_repr(self) -> str:
        pool = f"sr_ratio={self.sr_ratio[0]}"
        if self.pool_size:
            pool = f"pool_size={self.pool_size[0]}"
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, {pool}"
