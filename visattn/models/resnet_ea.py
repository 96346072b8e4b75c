"""ResNet with efficient attention: a residual attention module after the stages res3 and res4.

Paper: Efficient Attention: Attention with Linear Complexities (WACV 2021, arXiv:1812.01243), whose detectors have such
modules in a ResNet-50 and in its FPN. Official code: https://github.com/cmsflash/efficient-attention (MIT), the module
alone. The ResNet is timm's, with its constructor, keys and weights.

What is ours, and why:
    * The authors published neither the network nor its weights. Where the modules sit (after res3 and res4, that is
      `layer2` and `layer3`) is told by others of the paper's table; that values have as many channels as the map, keys
      half of them, and that there is one head, the author says in issue 1 of the official repository.
    * A module is the last entry of its stage, so that all keys of a plain ResNet keep their names. It starts as the
      identity: with the weights of a plain ResNet, the network gives that ResNet's outputs until it is trained.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from visattn.layers import EfficientAttention2d, reset_parameters
from visattn.models._backbone import unwrap
from visattn.models._build import NCHW_POOLS, build_model, check_classifier
from visattn.models._variants import Variant, imagenet_cfg, register_variants
from visattn.weights import ChecksWeights

__all__ = ["ResNetEA"]


class ResNetEA(ChecksWeights, ResNet):
    """timm's ResNet with `EfficientAttention2d` after some stages; images of any size.

    Args:
        block: As all arguments that are not listed here, timm's.
        layers: Blocks per stage.
        ea_stages: Stages, counted from 1 as in `layer1`, that attention follows; the paper's res3 is 2.
        ea_key_channels: Channels of queries and keys; None for half of the map's.
        ea_value_channels: Channels of values; None for the map's.
        ea_heads: Heads.
        zero_init_last: Start every residual branch, those of the attention included, at zero.
        img_size: No effect, as for timm's models of any input size; accepted so that callers may always give it.

    Raises:
        ValueError: A stage that is not there or is named twice, or heads that do not divide the channels.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        *,
        ea_stages: Sequence[int] = (2, 3),
        ea_key_channels: int | None = None,
        ea_value_channels: int | None = None,
        ea_heads: int = 1,
        zero_init_last: bool = True,
        img_size: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        check_classifier(kwargs.get("num_classes", 1000), kwargs.get("global_pool", "avg"), NCHW_POOLS)
        super().__init__(
            cast(Any, block), tuple(layers), zero_init_last=zero_init_last, device=device, dtype=dtype, **kwargs
        )
        levels = self.feature_info[1:]
        if len(set(ea_stages)) < len(ea_stages) or not set(ea_stages) <= set(range(1, len(levels) + 1)):
            raise ValueError(f"expected ea_stages of 1 to {len(levels)}, each at most once, got {tuple(ea_stages)}")
        for number in ea_stages:
            channels = levels[number - 1]["num_chs"]
            attention = EfficientAttention2d(
                channels,
                key_channels=channels // 2 if ea_key_channels is None else ea_key_channels,
                head_count=ea_heads,
                value_channels=channels if ea_value_channels is None else ea_value_channels,
                zero_init=zero_init_last,
                device=device,
                dtype=dtype,
            )
            cast(nn.Sequential, self.get_submodule(f"layer{number}")).append(attention)

    def init_weights(self, zero_init_last: bool = True) -> None:
        """timm's for the ResNet, after every module reset itself; the attention as it resets itself."""
        for module in self.modules():
            reset_parameters(module)
        super().init_weights(zero_init_last)
        for module in self.modules():
            if isinstance(module, EfficientAttention2d):
                for part in [*module.children(), module]:
                    reset_parameters(part)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's, which refuses what would fail in forward."""
        check_classifier(num_classes, global_pool, NCHW_POOLS)
        super().reset_classifier(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's, with "NHWC" and "NLC" (L = H * W) as further formats of the intermediate maps.

        Raises:
            ValueError: Another output format.
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"expected output_fmt 'NCHW', 'NHWC' or 'NLC', got {output_fmt!r}")
        result: Any = super().forward_intermediates(x, indices, norm, stop_early)
        x, maps = result
        if output_fmt != "NCHW":
            maps = [y.permute(0, 2, 3, 1) for y in maps]  # [B, H, W, C] each
        if output_fmt == "NLC":
            maps = [y.flatten(1, 2) for y in maps]  # [B, L, C] each
        return maps if intermediates_only else (x, maps)


_cfg = partial(
    imagenet_cfg,
    crop_pct=0.95,
    first_conv="conv1",
    classifier="fc",
    license="apache-2.0",
    origin_url="https://github.com/cmsflash/efficient-attention",
    paper_ids="arXiv:1812.01243",
)
_TEST = {
    "block": Bottleneck,
    "layers": (1, 2, 1, 1),
    "channels": (8, 12, 20, 28),
    "ea_heads": 2,
    "zero_init_last": False,
}

VARIANTS: dict[str, Variant] = {
    "resnet50_ea": Variant(
        {"block": Bottleneck, "layers": (3, 4, 6, 3)},
        {"a1_in1k": _cfg(hf_hub_id="timm/resnet50.a1_in1k", test_input_size=(3, 288, 288), test_crop_pct=1.0)},
        doc="`pretrained=True` loads timm's plain ResNet-50, whose outputs it gives before it is trained.",
    ),
    "test_resnet_ea": Variant(
        _TEST,
        {"untrained": _cfg(160)},
        doc="Under 1M parameters; two heads, and residual branches that contribute from the start.",
    ),
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Complete the weights of a plain ResNet by attention that starts as the identity; others pass unchanged."""
    state_dict = unwrap(state_dict)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, EfficientAttention2d)}
    attention = {f"{name}.{key}": value for name, m in modules.items() for key, value in m.state_dict().items()}
    if attention.keys() & state_dict.keys():
        return state_dict
    identity = {k: torch.zeros_like(v) if ".reprojection." in k else v for k, v in attention.items()}
    return {**state_dict, **identity}


def _create_resnet_ea(variant: str, pretrained: bool = False, **kwargs: Any) -> ResNetEA:
    features = {"no_rewrite": False}
    return build_model(ResNetEA, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3, 4), features, **kwargs)


register_variants(__name__, VARIANTS, _create_resnet_ea)
