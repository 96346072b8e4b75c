"""Split attention: a channel-wise softmax over the splits of a grouped convolution."""

import torch
from torch import Tensor, nn


class SplAt(nn.Module):
    """3x3 convolution into `radix` splits, then their sum weighted per channel: [B, C, H, W] -> [B, C, H, W].

    ResNeSt (arXiv:2004.08955), equations 1 to 3, in the radix-major form of its section 3.2: one convolution with
    cardinality x radix groups gives the splits U_r; the mean over positions of their sum passes two 1x1 convolutions
    with `cardinality` groups; a softmax over the radix (a sigmoid for radix 1) gives the weights a_r; the output is
    the sum of a_r * U_r.

    Args:
        dim: Channels C.
        radix: Splits per cardinal group.
        cardinality: Cardinal groups.
        dilation: Dilation of the 3x3 convolution.

    Raises:
        ValueError: Channels that the groups do not divide.
    """

    def __init__(
        self,
        dim: int,
        radix: int = 2,
        cardinality: int = 1,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = max(dim * radix // 4, 32)
        if radix < 1 or cardinality < 1 or dim % (radix * cardinality) or hidden % cardinality:
            raise ValueError(
                f"expected channels and hidden channels in groups of equal width, got {dim} channels for radix {radix} "
                f"x cardinality {cardinality}, {hidden} hidden for cardinality {cardinality}; "
                f"try a multiple of {4 * max(radix, 1) * max(cardinality, 1)} channels"
            )
        self.radix = radix
        self.cardinality = cardinality
        groups = radix * cardinality
        how = {"padding": dilation, "dilation": dilation, "groups": groups, "bias": False, **dd}
        self.conv = nn.Conv2d(dim, dim * radix, 3, **how)
        self.bn0 = nn.BatchNorm2d(dim * radix, **dd)
        self.fc1 = nn.Conv2d(dim, hidden, 1, groups=cardinality, **dd)
        self.bn1 = nn.BatchNorm2d(hidden, **dd)
        self.fc2 = nn.Conv2d(hidden, dim * radix, 1, groups=cardinality, **dd)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn0(self.conv(x)))
        if self.radix == 1:
            return x * self._logits(x.mean((2, 3), keepdim=True)).sigmoid()
        splits = x.unflatten(1, (self.radix, -1))  # [B, radix, C, H, W]
        logits = self._logits(splits.mean((3, 4), keepdim=True).sum(1))
        # fc2's channels are (cardinal group, split, channel), those of the splits (split, cardinal group, channel)
        # [B, cardinality, radix, C', 1, 1]
        weights = logits.unflatten(1, (self.cardinality, self.radix, -1)).softmax(2)
        weights = weights.transpose(1, 2).flatten(2, 3)  # [B, radix, C, 1, 1]
        return (splits * weights).sum(1)

    def _logits(self, pooled: Tensor) -> Tensor:
        return self.fc2(self.act(self.bn1(self.fc1(pooled))))
