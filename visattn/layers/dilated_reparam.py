"""A large depthwise convolution that is trained as a sum of dilated small ones, on maps [B, C, H, W]."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

# By kernel size, (kernel size, dilation) of the branches besides the kernel itself.
BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class DilatedReparam(nn.Module):
    """Sum of depthwise convolutions, each with BatchNorm: [B, dim, H, W] -> [B, dim, H, W].

    The first branch has the whole kernel, the others smaller ones whose taps lie some steps apart. In evaluation mode
    the sum is one convolution with a bias: `reparameterize` turns the layer into it (so does
    `timm.utils.model.reparameterize_model` for all of a model), `deploy` builds it as such.

    Args:
        dim: Channels.
        kernel_size: 5, 7, 9, 11, 13, 15, 17 or 19.
        deploy: The one convolution, `conv`, in the place of `branches`.

    Raises:
        ValueError: Another kernel size.

    Source: UniRepLKNet (arXiv:2311.15599), section 3.1.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        deploy: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size not in BRANCHES:
            raise ValueError(f"expected a kernel_size of {sorted(BRANCHES)}, got {kernel_size}")
        self.dim = dim
        self.kernels = ((kernel_size, 1), *BRANCHES[kernel_size])
        dd = {"device": device, "dtype": dtype}
        self.conv = self._conv(kernel_size, 1, True, **dd) if deploy else None
        self.branches = nn.ModuleDict()
        for i, (size, dilation) in enumerate(() if deploy else self.kernels):
            parts = {
                "conv": self._conv(size, dilation, False, **dd),
                "bn": nn.BatchNorm2d(dim, **dd),
            }
            name = f"k{size}_{dilation}" if i else "origin"
            self.branches[name] = nn.Sequential(OrderedDict[str, nn.Module](parts))

    def _conv(
        self,
        size: int,
        dilation: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> nn.Conv2d:
        how = {"groups": self.dim, "bias": bias, "device": device, "dtype": dtype}
        padding = dilation * (size // 2)
        return nn.Conv2d(self.dim, self.dim, size, padding=padding, dilation=dilation, **how)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            return self.conv(x)
        first, *others = self.branches.values()
        out = first(x)
        for branch in others:
            out = out + branch(x)
        return out

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Replace the branches by one convolution, which gives what they give in evaluation mode."""
        if self.conv is not None:
            return
        size = self.kernels[0][0]
        branches: Any = self.branches.values()
        like = next(iter(branches)).conv.weight
        wide = torch.promote_types(like.dtype, torch.float32)
        weight = torch.zeros(self.dim, 1, size, size, dtype=wide, device=like.device)
        bias = weight.new_zeros(self.dim)
        for (small, dilation), branch in zip(self.kernels, branches, strict=True):
            first = size // 2 - dilation * (small // 2)  # the branch's taps lie around the middle
            taps = slice(first, size - first, dilation)
            factor = branch.bn.weight / (branch.bn.running_var.to(wide) + branch.bn.eps).sqrt()
            weight[..., taps, taps] += branch.conv.weight.to(wide) * factor[:, None, None, None]
            bias += branch.bn.bias - branch.bn.running_mean * factor
        conv = self._conv(size, 1, True, like.device, like.dtype)
        conv.load_state_dict({"weight": weight, "bias": bias})
        self.conv = conv.requires_grad_(like.requires_grad)
        self.branches = nn.ModuleDict()

    def extra_repr(self) -> str:
        return f"{self.dim}, kernel_size={self.kernels[0][0]}"
