"""TransNeXt's attention modules over `visattn.ops.aggregated_attention`, channels-last, on maps of any size."""

import math

import torch
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.ops import aggregated_attention, avg_pool_grid
from visattn.ops.aggregated import aggregated_weights

torch.fx.wrap("aggregated_attention")
torch.fx.wrap("avg_pool_grid")


class _CosineAttention(nn.Module):
    """What both modules share. Subclasses add projections and, or None, the parameters of the local keys."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        pretrain_size: int | tuple[int, int],
        bias_size: list[int] | None,
        kernel_size: int,
        proj_drop: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"expected dim divisible by num_heads, got {dim} and {num_heads}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.kernel_size = kernel_size
        self.pretrain_size = list(to_2tuple(pretrain_size))
        if min(self.pretrain_size) < 2:
            raise ValueError(f"expected pretrain_size of a map of at least 2 x 2 tokens, got {self.pretrain_size}")
        self.interpolate = bias_size is not None
        self.bias_size = bias_size or [0, 0, 0, 0]  # TorchScript wants a list in either case
        self.temperature = nn.Parameter(torch.empty(num_heads, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, self.head_dim, **dd))
        self.cpb_fc1 = nn.Linear(2, 512, **dd)
        self.cpb_fc2 = nn.Linear(512, num_heads, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_parameters(self) -> None:
        """The official initial values; softplus(temperature) is 1 / 0.24."""
        nn.init.constant_(self.temperature, math.log(math.expm1(1 / 0.24)))
        trunc_normal_(self.query_embedding, std=0.02)
        if self.local_bias is not None:
            trunc_normal_(self.local_bias, std=0.0004)
            trunc_normal_(self.tokens, std=0.02)
            nn.init.zeros_(self.token_bias)

    def forward(self, x: Tensor) -> Tensor:
        q, pool_k, pool_v, k, v = self._project(x)
        x = aggregated_attention(
            q,
            pool_k,
            pool_v,
            self.temperature,
            self.query_embedding,
            self.cpb_fc1.weight,
            self.cpb_fc1.bias,
            self.cpb_fc2.weight,
            self.cpb_fc2.bias,
            self.pretrain_size,
            self.bias_size if self.interpolate else self.bias_size[:0],
            k,
            v,
            self.kernel_size,
            self.local_bias,
            self.tokens,
            self.token_bias,
        )
        return self.proj_drop(self.proj(x.flatten(3)))

    @torch.jit.ignore
    def attended(self, x: Tensor) -> dict[str, Tensor]:
        """The softmax weights of every query, for the same input as `forward`.

        Args:
            x: Map [B, H, W, dim].

        Returns:
            "pooled" [B, H, W, N, PH, PW], the pooled tokens, or all tokens where nothing is pooled; and with local keys
            "local" [B, H, W, N, kernel_size ** 2], the window row by row, 0 outside the map. The two sum to 1.
        """
        q, pool_k, _, k, _ = self._project(x)
        local, pooled = aggregated_weights(
            q,
            pool_k,
            self.temperature,
            self.query_embedding,
            self.cpb_fc1.weight,
            self.cpb_fc1.bias,
            self.cpb_fc2.weight,
            self.cpb_fc2.bias,
            self.pretrain_size,
            self.bias_size if self.interpolate else [],
            k,
            self.kernel_size,
            self.local_bias,
        )
        return {"pooled": pooled} if local is None else {"local": local, "pooled": pooled}


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
        super().__init__(dim, num_heads, pretrain_size, sizes, 1, proj_drop, device, dtype)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        for name in ("local_bias", "tokens", "token_bias"):
            self.register_parameter(name, None)
        self.reset_parameters()

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        q, k, v = self.qkv(x).unflatten(-1, [3, self.num_heads, self.head_dim]).unbind(3)
        return q, k, v, None, None


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
            raise ValueError(f"expected sr_ratio and pool_size of at least 1, got {sr_ratio} and {pool_size}")
        sizes = None
        if bias_size is not None:
            size = to_2tuple(bias_size)
            sizes = [*size, *(max(1, n // sr_ratio) if pool_size is None else min(n, pool_size) for n in size)]
        super().__init__(dim, num_heads, pretrain_size, sizes, kernel_size, proj_drop, device, dtype)
        dd = {"device": device, "dtype": dtype}
        self.sr_ratio = [sr_ratio, sr_ratio]
        self.fixed_pool = pool_size is not None
        self.pool_size = [pool_size or 0, pool_size or 0]
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.sr = nn.Linear(dim, dim, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.local_bias = nn.Parameter(torch.empty(num_heads, kernel_size**2, **dd))
        self.tokens = nn.Parameter(torch.empty(num_heads, self.head_dim, kernel_size**2, **dd))
        self.token_bias = nn.Parameter(torch.empty(num_heads, kernel_size**2, **dd))
        self.reset_parameters()

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        pooled = avg_pool_grid(
            F.gelu(self.sr(x)), self.sr_ratio, self.pool_size if self.fixed_pool else self.pool_size[:0]
        )
        pool_k, pool_v = self.kv(self.norm(pooled)).unflatten(-1, [2, self.num_heads, self.head_dim]).unbind(3)
        k, v = self.kv(x).unflatten(-1, [2, self.num_heads, self.head_dim]).unbind(3)
        return self.q(x).unflatten(-1, [self.num_heads, self.head_dim]), pool_k, pool_v, k, v

    def extra_repr(self) -> str:
        pool = f"pool_size={self.pool_size[0]}" if self.fixed_pool else f"sr_ratio={self.sr_ratio[0]}"
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, {pool}"
