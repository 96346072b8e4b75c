"""A stage of a hierarchical backbone."""

from collections import OrderedDict
from collections.abc import Sequence

from timm.models import checkpoint_seq
from torch import Tensor, nn

from visattn.layers.conv import dilate_convs


class CheckpointedSequential(nn.Sequential):
    """`nn.Sequential` that recomputes its modules' activations in the backward pass instead of keeping them."""

    def forward(self, input: Tensor) -> Tensor:
        return checkpoint_seq(self, input)


class Stage(nn.Sequential):
    """A downsampler (or nn.Identity), blocks of equal width, then `norm` if given: [B, H, W, C] -> [B, H', W', C'].

    `dilation` is that of the blocks' convolutions, where strides before them were left out.
    `grad_checkpointing` recomputes the blocks' activations in the backward pass. It changes the class of `blocks`,
    which stays the same object with the same hooks: set it before others change that class, as FSDP does.
    """

    blocks: nn.Sequential

    def __init__(
        self,
        downsample: nn.Module,
        blocks: Sequence[nn.Module],
        norm: nn.Module | None = None,
        dilation: int = 1,
    ) -> None:
        norm = nn.Identity() if norm is None else norm
        parts = {"downsample": downsample, "blocks": nn.Sequential(*blocks), "norm": norm}
        super().__init__(OrderedDict[str, nn.Module](parts))
        if dilation > 1:
            dilate_convs(self.blocks, dilation)

    @property
    def grad_checkpointing(self) -> bool:
        """Whether the blocks' activations are recomputed."""
        return isinstance(self.blocks, CheckpointedSequential)

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool) -> None:
        if enable != self.grad_checkpointing:
            self.blocks.__class__ = CheckpointedSequential if enable else nn.Sequential
