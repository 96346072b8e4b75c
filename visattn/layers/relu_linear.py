"""ReLU linear attention with a floor under its normaliser, and the convolutions that concentrate it locally."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.layers.conv import DepthwiseConv
from visattn.layers.token_mixer import Size, TokenMixer
from visattn.ops import relu_linear_attention
from visattn.ops.autocast import without_autocast

torch.fx.wrap("relu_linear_attention")


class LocalConcentration(nn.Module):
    """Depthwise convolution, GELU, BatchNorm, depthwise convolution: [B, H, W, dim] -> [B, H, W, dim].

    Args:
        dim: Channels.
        kernel_size: Odd kernel of both convolutions.

    Raises:
        ValueError: An even kernel.

    Source: local concentration module of L2ViT (arXiv:2501.16182).
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = DepthwiseConv(dim, kernel_size, **dd)
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.conv2 = DepthwiseConv(dim, kernel_size, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.conv1(x)).permute(0, 3, 1, 2)  # [B, C, H, W]
        return self.conv2(self.bn(x).permute(0, 2, 3, 1))  # [B, H, W, C]


class ReluLinearAttention(TokenMixer):
    """Linear attention of rectified queries and keys, with a temperature per head, without position.

    Shapes: [B, H, W, dim] -> [B, H, W, dim], or with `size` (H, W) given [B, P + H * W, dim] -> the same.

    Args: those of `TokenMixer` and
        floor: Least sum that a query is normalised by; those of smaller sums are scaled down.
        lcm: Add a `LocalConcentration` of the output's map to it; prefix tokens stay. In L2ViT's own blocks it is a
            residual branch with a norm of its own instead.

    Raises:
        ValueError: What `TokenMixer` refuses, or a floor that is not positive.

    Source: L2ViT (arXiv:2501.16182), linear global attention.
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
        floor: float = 100.0,
        lcm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        how = (feat_size, num_prefix_tokens, sr_ratio, qkv_bias, proj_drop)
        super().__init__(dim, num_heads, *how, **dd)
        if not 0 < floor < float("inf"):
            raise ValueError(f"expected floor > 0, got {floor}")
        self.floor = float(floor)
        # Weight decay takes it, as it does in the official code, for having several axes.
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.lcm = LocalConcentration(dim, **dd) if lcm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.temperature, self.scale)

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        out = super().forward(x, size)
        if self.lcm is None:
            return out
        if size is None:
            return out + self.lcm(out)
        tokens = out[:, self.num_prefix_tokens :]  # [B, H * W, C]
        tokens = tokens + self.lcm(tokens.unflatten(1, size)).flatten(1, 2)
        return torch.cat([out[:, : self.num_prefix_tokens], tokens], 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, size: Size, kv_size: Size) -> Tensor:
        temperature = self.temperature.flatten()
        return relu_linear_attention(q, k, v, temperature=temperature, floor=self.floor)

    def attended(self, x: Tensor, size: Size | None = None) -> dict[str, Tensor]:
        """How much of every value each query takes, for the same arguments as forward.

        Returns:
            weights: [B, N, L, M], queries in rows; those of a query sum to its head's temperature, or to less where
                the floor normalises it. In float32 or float64.
        """
        q, k, _, _, _ = self._project_tokens(x, size)
        with without_autocast(x.device):
            dtype = torch.promote_types(q.dtype, torch.float32)
            q, k = q.relu().to(dtype), k.relu().to(dtype)
            weights = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)  # [B, N, L, M]
            total = weights.sum(-1, keepdim=True).clamp(min=self.floor)
            return {"weights": weights * self.temperature / total}
