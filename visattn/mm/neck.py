"""Efficient attention in a feature pyramid."""

from collections.abc import Sequence
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from visattn.layers import EfficientAttention2d


@MODELS.register_module()
class EfficientAttentionFPN(BaseModule):
    """The FPN of mmdet or mmsegmentation, and efficient attention over each of its maps.

    Source: arXiv:1812.01243, section 4.1: modules in the feature pyramid of a Mask R-CNN. They have a linear cost, so
    that the largest map can have one. Keys have half of the map's channels, values as many as the map.

    Args:
        out_channels: Channels of every output.
        key_channels: Channels of queries and keys; None for half of `out_channels`.
        head_count: Heads.
        attended: Outputs with attention, counted from the largest map; None for all.
        zero_init: Start as a plain FPN.
        **fpn: Of the FPN.

    Raises:
        ValueError: Channels that the heads do not divide, or an output that is not there.
    """

    def __init__(
        self,
        out_channels: int,
        key_channels: int | None = None,
        head_count: int = 1,
        attended: Sequence[int] | None = None,
        zero_init: bool = True,
        init_cfg: dict[str, Any] | None = None,
        **fpn: Any,
    ) -> None:
        super().__init__(init_cfg)
        self.fpn = MODELS.build({"type": "FPN", "out_channels": out_channels, **fpn})
        number = self.fpn.num_outs
        attended = range(number) if attended is None else attended
        if any(i not in range(number) for i in attended):
            raise ValueError(f"expected attended outputs from 0 to {number - 1}, got {tuple(attended)}")
        keys = out_channels // 2 if key_channels is None else key_channels
        self.attention = nn.ModuleDict(
            {str(i): EfficientAttention2d(out_channels, keys, head_count, out_channels, zero_init) for i in attended}
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps [B, C, H, W] of the backbone -> as many maps [B, out_channels, H, W] as the FPN has outputs."""
        maps = list(self.fpn(inputs))
        for i, attention in self.attention.items():
            maps[int(i)] = attention(maps[int(i)])
        return tuple(maps)
