"""A stage of a hierarchical backbone."""

import torch
from timm.models import checkpoint_seq
from torch import Tensor, nn


class Stage(nn.Module):
    """A downsampler (or nn.Identity), blocks of equal width, then `norm` if given: [B, H, W, C] -> [B, H', W', C'].

    `grad_checkpointing` recomputes the blocks' activations in the backward pass.
    """

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)
