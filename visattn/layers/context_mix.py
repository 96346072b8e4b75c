"""ContMix: each pixel's own kernel, made of its affinities to a pooled context, over `visattn.ops.neighborhood_mix`."""

from collections.abc import Sequence

import torch
from timm.layers import DropPath, LayerNorm2d, SqueezeExcite, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.layers.conv import ChannelScale, ConvNorm, ResDWConv
from visattn.layers.conv_mlp import ConvMlp, GlobalResponseNorm
from visattn.layers.dilated_reparam import DilatedReparam
from visattn.ops import adaptive_avg_pool, neighborhood_mix
from visattn.ops.geometry import Axis, is_symbolic, neighbors, outer_index, plain, sym_max, sym_min
from visattn.ops.registration import traced_as_one

_POOL = 7  # tokens of the pooled context per axis


@traced_as_one
def enlarge(x: Tensor, low: int) -> Tensor:
    """Interpolate a map [B, C, H, W] (bilinear) whose shorter axis is below `low` to that, the longer one with it.

    The longer one is rounded down, in floating point as in the official code; in a graph for every size in integers,
    which gives one more for a few sizes, such as 3 x 27 for 13.
    """
    size = plain(x.shape[2:])
    short = sym_min(*size)
    if is_symbolic(*size):
        at_least = sym_max(short, low)
        size = [at_least * n // short for n in size]
    elif short < low:
        size = [max(low, int(low / short * n)) for n in size]
    else:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@traced_as_one
def shrink(x: Tensor, like: Tensor) -> Tensor:
    """Average a map [B, H', W', C] to the size of `like` [B, C', H, W]; itself if it has that: [B, H, W, C]."""
    size = plain(like.shape[2:])
    if not is_symbolic(*size) and size == list(x.shape[1:3]):
        return x
    return adaptive_avg_pool(x, size)


for name in ("adaptive_avg_pool", "enlarge", "neighborhood_mix", "shrink"):
    torch.fx.wrap(name)


class ContextMix(nn.Module):
    """Sum of the values around each pixel, by kernels that it makes of its affinities to 7 x 7 context tokens.

    A linear layer, shared by pixels and heads, turns the 49 affinities of a query into the logits of a small and a
    large kernel; a learned bias per displacement is added, and each has a softmax. Half of the values' channels go
    through the small kernels, half through the large ones. Windows lie as those of neighborhood attention, shifted at
    the border. A map smaller than the large kernel is enlarged before and shrunk after.

    Args:
        dim: Channels of queries' map and values.
        context_dim: Channels of the context.
        num_heads: Heads of either kernel.
        kernel_size: The large kernel, odd.
        small_kernel: The small kernel, odd, at most as large.
        table_std: Standard deviation of the initial bias tables; 0: they start at zero.

    Raises:
        ValueError: Heads that do not divide half of the channels, or kernels that do not fit.

    Source: OverLoCK (arXiv:2502.20087), section 3.3.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        kernel_size: int,
        small_kernel: int = 5,
        table_std: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % (2 * num_heads):
            raise ValueError(f"expected dim divisible by 2 * num_heads, got {dim} and {num_heads}")
        if kernel_size % 2 == 0 or small_kernel % 2 == 0 or not 1 <= small_kernel <= kernel_size:
            got = f"{small_kernel} and {kernel_size}"
            raise ValueError(f"expected odd kernels, small_kernel at most kernel_size, got {got}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.kernels = [small_kernel, kernel_size]
        # That of heads twice as wide as those of q and k.
        self.scale = (dim / num_heads) ** -0.5
        self.table_std = table_std
        self.q = ConvNorm(dim, dim // 2, **dd)
        self.k = ConvNorm(context_dim, dim // 2, **dd)
        self.weight_proj = nn.Linear(_POOL**2, small_kernel**2 + kernel_size**2, **dd)
        sizes = ((num_heads, 2 * k - 1, 2 * k - 1) for k in self.kernels)
        self.rpb1, self.rpb2 = (nn.Parameter(torch.empty(size, **dd)) for size in sizes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the bias tables."""
        for table in (self.rpb1, self.rpb2):
            trunc_normal_(table, std=self.table_std) if self.table_std else nn.init.zeros_(table)

    def _affinities(self, x: Tensor, context: Tensor) -> Tensor:
        """Affinities [B, N, H W, 49] of x [B, dim, H, W] to the pooled context [B, context_dim, H, W]."""
        pooled = adaptive_avg_pool(context.permute(0, 2, 3, 1), [_POOL, _POOL])  # [B, 7, 7, Cx]
        q, k = self.q(x) * self.scale, self.k(pooled.permute(0, 3, 1, 2))
        q, k = (t.flatten(2).unflatten(1, (self.num_heads, -1)) for t in (q, k))  # [B, N, D, L]
        return q.mT @ k  # [B, N, H W, 49]

    def _logits(self, affinities: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, H, W, N, taps] of both kernels, of affinities [B, N, H W, 49] of the map `like` [B, dim, H, W]."""
        logits = self.weight_proj(affinities).unflatten(2, like.shape[2:])  # [B, N, H, W, taps]
        small, large = logits.permute(0, 2, 3, 1, 4).split([k * k for k in self.kernels], -1)
        return small, large

    def forward(self, x: Tensor, context: Tensor, v: Tensor) -> Tensor:
        """Mix v.

        Args:
            x: Map [B, dim, H, W] of the queries.
            context: Map [B, context_dim, H, W].
            v: Values [B, dim, H, W].

        Returns:
            [B, dim, H, W].
        """
        x, context, values = (enlarge(t, self.kernels[1]) for t in (x, context, v))
        small, large = self._logits(self._affinities(x, context), x)  # [B, H', W', N, taps]
        values = values.unflatten(1, (2, self.num_heads, -1)).permute(0, 1, 4, 5, 2, 3)
        v1, v2 = values.unbind(1)  # [B, H', W', N, D]
        mixed = [
            neighborhood_mix(small, v1, kernel_size=self.kernels[0], bias=self.rpb1).flatten(3),
            neighborhood_mix(large, v2, kernel_size=self.kernels[1], bias=self.rpb2).flatten(3),
        ]
        return shrink(torch.cat(mixed, -1), v).permute(0, 3, 1, 2)  # [B, dim, H, W]

    def attended(self, x: Tensor, context: Tensor, v: Tensor) -> dict[str, Tensor]:
        """What the kernels of `forward(x, context, v)` are made of, and what they are.

        H and W are those of the enlarged map if the map is smaller than the large kernel.

        Returns:
            "context" [B, H, W, N, 7, 7]: the affinities of every query to the tokens of the pooled context, q.k as they
            are. "small" and "large" [B, H, W, N, taps]: the kernels, which sum to 1, their windows row by row.
        """
        x, context = (enlarge(t, self.kernels[1]) for t in (x, context))
        affinities = self._affinities(x, context)
        small, large = self._logits(affinities, x)
        size = x.shape[2:]
        found = affinities.unflatten(2, size).permute(0, 2, 3, 1, 4)  # [B, H, W, N, 49]
        return {
            "context": found.unflatten(-1, (_POOL, _POOL)),
            "small": (small + _read(self.rpb1, self.kernels[0], size)).softmax(-1),
            "large": (large + _read(self.rpb2, self.kernels[1], size)).softmax(-1),
        }

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kernels={self.kernels}"


def _read(table: Tensor, kernel_size: int, size: Sequence[int]) -> Tensor:
    """Read a table [N, 2K - 1, 2K - 1] for all taps of a map of `size`: [H, W, N, K * K]."""
    where = [neighbors(Axis(n, kernel_size), table.device).displacement for n in size]  # [n, K]
    entry = outer_index(where, [2 * kernel_size - 1] * 2)  # [H W, K * K]
    return table.flatten(1)[:, entry].transpose(0, 1).unflatten(0, tuple(size))


class ContMixBlock(nn.Module):
    """ContMix with a gate, a large convolution beside it, and an MLP: [B, dim + context_dim, H, W] -> the same.

    For any network; OverLoCK gives it maps whose last channels are the context. The scale is on the shortcuts.

    Args:
        dim: Channels that are mixed.
        context_dim: Channels of the context behind them; 0: the map is its own context.
        num_heads: Heads of either kernel.
        kernel_size: The large kernel, and that of the convolution beside it; see `DilatedReparam`.
        small_kernel: The small kernel.
        mlp_ratio: Hidden width of the MLP over `dim`.
        layer_scale: Initial factor of the shortcuts; None leaves them as they are.
        drop_path: Probability of dropping a branch, per sample.
        deploy: Build the convolution beside as one, see `DilatedReparam`.

    Raises:
        ValueError: Channels, heads or kernels that do not fit.

    Source: OverLoCK (arXiv:2502.20087), section 3.2.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        num_heads: int = 4,
        kernel_size: int = 7,
        small_kernel: int = 5,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        deploy: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dim, self.context_dim = dim, context_dim
        width = dim + context_dim
        self.dwconv1 = ResDWConv(width, **dd)
        self.norm1 = LayerNorm2d(width, eps=1e-6, **dd)
        if context_dim:
            self.fusion = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, groups=width, **dd),
                nn.BatchNorm2d(width, **dd),
                nn.GELU(),
                nn.Conv2d(width, dim, 1, **dd),
                GlobalResponseNorm(dim, **dd),
            )
            self.v = nn.Identity()
        else:
            self.fusion = nn.Identity()
            self.v = ConvNorm(dim, dim, **dd)
        table_std = 0.0 if context_dim else 0.02
        self.mix = ContextMix(
            dim, context_dim or dim, num_heads, kernel_size, small_kernel, table_std, **dd
        )
        self.mix_proj = ConvNorm(dim, dim, **dd)
        self.lepe = nn.Sequential(
            DilatedReparam(dim, kernel_size, deploy, **dd), nn.BatchNorm2d(dim, **dd)
        )
        # pyrefly: ignore[bad-argument-type]: timm takes the name of an activation too
        self.se = SqueezeExcite(dim, rd_channels=max(16, dim // 8), act_layer="gelu", **dd)
        self.gate = ConvNorm(dim, dim, act="silu", **dd)
        self.out = nn.Sequential(nn.BatchNorm2d(dim, **dd), nn.Conv2d(dim, width, 1, **dd))
        self.dwconv2 = ResDWConv(width, **dd)
        self.norm2 = LayerNorm2d(width, eps=1e-6, **dd)
        self.mlp = ConvMlp(width, int(dim * mlp_ratio), **dd)
        self.ls1 = nn.Identity() if layer_scale is None else ChannelScale(width, layer_scale, **dd)
        self.ls2 = nn.Identity() if layer_scale is None else ChannelScale(width, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv1(x)
        normed = self.norm1(x)
        fused = self.fusion(normed)  # [B, C, H, W]
        mixed = self.mix(
            normed[:, : self.dim], normed[:, -(self.context_dim or self.dim) :], self.v(fused)
        )
        mixed = self.gate(fused) * self.se(self.mix_proj(mixed) + self.lepe(fused))
        x = self.dwconv2(self.ls1(x) + self.drop_path(self.out(mixed)))
        return self.ls2(x) + self.drop_path(self.mlp(self.norm2(x)))
