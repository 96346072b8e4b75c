"""InLine attention: linear attention whose weights tell queries apart, with kernels that the input makes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.layers.conv import DepthwiseConv
from visattn.layers.token_mixer import Size, TokenMixer
from visattn.ops import dynamic_depthwise_conv, inline_attention
from visattn.ops.checks import check_choice

torch.fx.wrap("dynamic_depthwise_conv")
torch.fx.wrap("inline_attention")


class InLineAttention(TokenMixer):
    """Injective linear attention plus a 3x3 depthwise convolution of the values, whose kernels an MLP makes per sample.

    Prefix tokens take part in the attention and in the mean that kernels are made from, but are not convolved. With
    sr_ratio > 1, where the official code fails, the values are resized (bilinear) to the map before the convolution,
    as in agent attention: the convolution is to see neighbours on the queries' map.

    Shapes: [B, H, W, dim] -> [B, H, W, dim], or with `size` (H, W) given [B, P + H * W, dim] -> the same.

    Args: those of `TokenMixer` and
        kernel_func: Map of queries and keys before attention: "identity", "relu", "leakyrelu" or "exp", exp(x / 5).
        lepe: Add a depthwise convolution of the values with trained kernels as well (CSWin's `get_v`).

    Raises:
        ValueError: What `TokenMixer` refuses, or another kernel_func.

    Source: InLine attention (arXiv:2412.06590), section 4.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feat_size: tuple[int, int],
        num_prefix_tokens: int = 0,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        kernel_func: str = "identity",
        lepe: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        how = (feat_size, num_prefix_tokens, sr_ratio, qkv_bias, proj_drop)
        super().__init__(dim, num_heads, *how, **dd)
        check_choice("kernel_func", kernel_func, ("identity", "relu", "leakyrelu", "exp"))
        self.kernel_func = kernel_func
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=num_heads, **dd),
            nn.GELU(),
            nn.Conv1d(dim, 9 * dim, 1, groups=num_heads, **dd),
        )
        self.get_v = DepthwiseConv(dim, 3, **dd) if lepe else None

    def forward(self, x: Tensor, size: Size | None = None, source: Tensor | None = None) -> Tensor:
        """`source`, of x's shape: what the kernels are made from, by its mean; default x."""
        q, k, v, grid, kv_grid = self._project_tokens(x, size)
        mean = (x if source is None else source).flatten(1, -2).mean(1)  # [B, C]
        # [B, H, W, C] or [B, P + H * W, C]
        x = self._mix(q, k, v, mean, grid, kv_grid).reshape(x.shape)
        return self.proj_drop(self.proj(x))

    def _mix(
        self, q: Tensor, k: Tensor, v: Tensor, mean: Tensor, size: Size, kv_size: Size
    ) -> Tensor:
        """Attend with q [B, L, N, D], k and v [B, M, N, D], mean [B, C] -> [B, L, N, D]."""
        out = inline_attention(self._kernel(q), self._kernel(k), v)
        kernels = self.residual(mean[..., None]).squeeze(-1).unflatten(1, [-1, 9])  # [B, C, 9]
        v = self._map(v, kv_size)
        if self.sr is not None:
            v = F.interpolate(v.permute(0, 3, 1, 2), size=size, mode="bilinear")  # [B, C, H, W]
            v = v.permute(0, 2, 3, 1)  # [B, H, W, C]
        local = dynamic_depthwise_conv(v, kernels)
        if self.get_v is not None:
            local = local + self.get_v(v)
        return self._add_to_map(out, local)

    def _kernel(self, x: Tensor) -> Tensor:
        if self.kernel_func == "relu":
            return F.relu(x)
        if self.kernel_func == "leakyrelu":
            return F.leaky_relu(x)
        if self.kernel_func == "exp":
            return torch.exp(0.2 * x)
        return x
