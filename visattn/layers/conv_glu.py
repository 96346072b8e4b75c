"""TransNeXt's channel mixer: a gated linear unit whose gate sees the eight neighbours."""

import torch
from torch import Tensor, nn

from visattn.layers.conv import DepthwiseConv


class ConvGLU(nn.Module):
    """fc2(gelu(dwconv3x3(a)) * b), where a and b are the halves of fc1(x): [B, H, W, dim] -> [B, H, W, dim].

    Args:
        dim: Channels.
        hidden_dim: Channels of a and of b.
        drop: Dropout before and after `fc2`.

    Source: TransNeXt (arXiv:2311.17132), section 3.4.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, **dd)
        self.dwconv = DepthwiseConv(hidden_dim, 3, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fc1(x).chunk(2, dim=-1)
        return self.drop(self.fc2(self.drop(self.act(self.dwconv(a)) * b)))
