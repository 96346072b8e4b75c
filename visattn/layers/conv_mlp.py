"""An MLP over the channels with a depthwise convolution and global response norm, on maps [B, C, H, W]."""

import torch
from torch import Tensor, nn

from visattn.layers.conv import ResDWConv


class GlobalResponseNorm(nn.Module):
    """x + gamma * (n * x) + beta: [B, dim, H, W] -> [B, dim, H, W].

    n is the norm of a channel over the map, divided by its mean over the channels. gamma and beta start at 0.

    Source: ConvNeXt V2 (arXiv:2301.00808), section 3.
    """

    def __init__(
        self,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # Weight decay takes them, as it does in the official code, for having several axes.
        self.gamma = nn.Parameter(torch.empty(1, dim, 1, 1, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(1, dim, 1, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeros, the identity."""
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        norm = x.norm(dim=(2, 3), keepdim=True)  # [B, C, 1, 1]
        norm = norm / (norm.mean(1, keepdim=True) + 1e-6)
        return x * (1 + self.gamma * norm) + self.beta


class ConvMlp(nn.Module):
    """1x1 convolution, GELU, depthwise 3x3 with a shortcut, global response norm, 1x1 convolution.

    Shapes: [B, dim, H, W] -> [B, dim, H, W].

    Args:
        dim: Channels.
        hidden_dim: Channels in between.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.act = nn.GELU()
        self.dwconv = ResDWConv(hidden_dim, **dd)
        self.grn = GlobalResponseNorm(hidden_dim, **dd)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.grn(self.dwconv(self.act(self.fc1(x)))))
