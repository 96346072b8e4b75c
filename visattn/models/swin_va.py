"""Swin as a token mixer backbone: shifted windows, or in the first blocks of a stage any global attention.

Papers: Swin (ICCV 2021, arXiv:2103.14030), Agent Attention (ECCV 2024, arXiv:2312.08874), InLine (NeurIPS 2024,
arXiv:2412.06590), FLatten (ICCV 2023, arXiv:2308.00442), Efficient Attention (WACV 2021, arXiv:1812.01243).
Official code: https://github.com/microsoft/Swin-Transformer (MIT) for the backbone. Where other attentions go in it:
https://github.com/LeapLabTHU/Agent-Attention and https://github.com/LeapLabTHU/InLine, which state no licence; this
file is written from the papers.

What differs from the official code, and why:
    * One class for classification and dense tasks. Official classifiers take images of one size; here maps that windows
      do not divide are padded before the projection, as in the official dense code. (timm pads after the shift.)
    * Where one window covers the map, the official dense code shifts it and the classifiers do not: `always_shift`.
      Height and width are judged apart, as in timm.
    * A stage begins with the merging of patches, as in timm; `checkpoint_filter_fn` renames official keys.
"""

import math
import re
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from visattn import layers
from visattn.models._backbone import Backbone, convert_checkpoint, drop_path_rates, plan_strides, unwrap
from visattn.models._token_mixer import create_token_mixer_backbone, fit_positions, plan_attention, token_mixer_cfg
from visattn.models._variants import Variant, register_variants
from visattn.ops.geometry import ceil_div

__all__ = ["Swin"]


class Swin(Backbone):
    """Swin Transformer for images of any size, with a choice of attention.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: Pooling before the classifier; "" leaves it out.
        img_size: Image size that windows and position parameters are made for. Images of any other size run as well.
            Default: the input size of the pretrained tag.
        embed_dim: Channels of the first stage; each later stage has twice as many.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        attention: Name of the attention over the whole map, see `layers.TOKEN_MIXERS`.
        attention_depths: Per stage, how many of its first blocks use that attention; the others use shifted windows.
            Default: all blocks, but none for "softmax".
        attention_args: Own arguments of that attention's layer: a dict, or one per stage.
        window_size: Tokens per axis of a window. Default: `img_size / 32`, rounded up.
        always_shift: Shift the windows of odd blocks also where one window covers the map, as detectors do.
        mlp_ratio: Hidden width of the MLPs over the channels.
        qkv_bias: Bias of the query, key and value projections.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after attention and MLP projections.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        out_norm: "layer" normalises every feature map that `features_only` returns, as the official dense backbones
            do; None returns them as they are.
        output_stride: 32, 16 or 8. Stages beyond it keep their map; convolutions are dilated instead, and windows keep
            their size.

    Raises:
        ValueError: An unknown attention, or heads, sizes, depths, arguments or `output_stride` that do not fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        attention: str = "softmax",
        attention_depths: Sequence[int] | None = None,
        attention_args: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        window_size: int | tuple[int, int] | None = None,
        always_shift: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: str | None = None,
        output_stride: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, num_classes, global_pool)
        dd = {"device": device, "dtype": dtype}
        if attention_depths is None and attention == "softmax":
            attention_depths = [0] * len(depths)
        plan = plan_attention(attention, depths, attention_depths, attention_args)
        height, width = to_2tuple(img_size)
        if window_size is None:
            window_size = (ceil_div(height, 32), ceil_div(width, 32))
        shared = {"qkv_bias": qkv_bias, "proj_drop": proj_drop_rate, **dd}
        self.patch_embed = layers.PatchTokenizer(in_chans, embed_dim, 4, **dd)
        rates = drop_path_rates(drop_path_rate, depths)
        steps = plan_strides(4, (1, *[2] * (len(depths) - 1)), output_stride)
        self.stages = nn.Sequential()
        for i, heads in enumerate(num_heads):
            dim = embed_dim * 2**i
            reduction, stride, before, dilation = steps[i]
            feat_size = (ceil_div(height, 2 ** (i + 2)), ceil_div(width, 2 ** (i + 2)))
            blocks = []
            for j, (rate, args) in enumerate(zip(rates[i], plan[i], strict=True)):
                if args is None:
                    attn = layers.ShiftedWindowAttention(dim, heads, window_size, j % 2 == 1, always_shift, **shared)
                else:
                    attn = layers.create_token_mixer(attention, dim, heads, feat_size, **args, **shared)
                blocks.append(layers.TransformerBlock(dim, attn, mlp_ratio, proj_drop_rate, rate, **dd))
            downsample = layers.PatchMerging(dim // 2, stride, before, **dd) if i else nn.Identity()
            self.stages.append(layers.Stage(downsample, blocks, dilation=dilation))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self._build_head(drop_rate, out_norm, **dd)

    def no_weight_decay(self) -> set[str]:
        """Patterns of parameters that weight decay leaves alone; as in the official code, agents' biases decay."""
        return {"*.rpb"}


_MICROSOFT = {
    "license": "mit",
    "origin_url": "https://github.com/microsoft/Swin-Transformer",
    "paper_ids": "arXiv:2103.14030",
}


def _hub(size: str, tag: str, pixels: int = 224, **kwargs: Any) -> dict[str, Any]:
    crop = {} if pixels == 224 else {"crop_pct": 1.0}
    hub = f"timm/swin_{size}_patch4_window{pixels // 32}_{pixels}.{tag}"
    return token_mixer_cfg("softmax", "", pixels, hf_hub_id=hub, **_MICROSOFT, **crop, **kwargs)


def _controls(size: str, pixels: Sequence[int] = (224,)) -> dict[str, dict[str, Any]]:
    """timm's tags, those of other image sizes with the size behind; first what is trained on ImageNet-1k alone."""
    tags = {"ms_in1k": {}, "ms_in22k_ft_in1k": {}, "ms_in22k": {"num_classes": 21841}}
    cfgs = {}
    for tag, args in tags.items():
        for n in pixels:
            cfgs[tag if n == 224 else f"{tag}_{n}"] = _hub(size, tag, n, **args)
    return cfgs


_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2}
_SMALL = {**_TINY, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
_BASE = {**_SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}
_SIZES = {"tiny": _TINY, "small": _SMALL, "base": _BASE}
_TEST = {"embed_dim": 20, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 4, 8)}


def _mixed(base: dict[str, Any], attention: str, attention_depths: Sequence[int], args: Any = None) -> dict[str, Any]:
    return {**base, "attention": attention, "attention_depths": attention_depths, "attention_args": args}


_AGENTS = tuple({"num_agents": n} for n in (9, 16, 49, 49))
_AGENT_SMALL = _mixed(_SMALL, "agent", (2, 2, 0, 0), _AGENTS)
_AGENT_BASE = _mixed(_BASE, "agent", (2, 2, 2, 0), _AGENTS)
_FOR_TESTS = "Under 1M parameters, for tests."

VARIANTS: dict[str, Variant] = {
    "swin_tiny_va": Variant(_TINY, _controls("tiny")),
    "swin_small_va": Variant(_SMALL, _controls("small")),
    "swin_base_va": Variant(_BASE, _controls("base", (224, 384))),
    "agent_swin_tiny": Variant(
        _mixed(_TINY, "agent", (2, 2, 6, 0), _AGENTS), {"in1k": token_mixer_cfg("agent", "a2ddc1190c224f768a41")}
    ),
    "agent_swin_small": Variant(_AGENT_SMALL, {"in1k": token_mixer_cfg("agent", "f607172c9fea4d6e99bb")}),
    "agent_swin_small_288": Variant(
        _AGENT_SMALL, {"in1k": token_mixer_cfg("agent", "09760394e93b4046a25e", 288, crop_pct=1.0)}
    ),
    "agent_swin_base": Variant(_AGENT_BASE, {"in1k": token_mixer_cfg("agent", "4fcd2d0114bb490483c3")}),
    "agent_swin_base_384": Variant(
        _AGENT_BASE, {"in1k": token_mixer_cfg("agent", "bb84ee9058954706a557", 384, crop_pct=1.0)}
    ),
    "inline_swin_tiny": Variant(
        _mixed(_TINY, "inline", (2, 2, 6, 0)), {"in1k": token_mixer_cfg("inline", "32810869fcc34410966b")}
    ),
    "inline_swin_small": Variant(
        _mixed(_SMALL, "inline", (2, 2, 0, 0)), {"in1k": token_mixer_cfg("inline", "e9657fd247c04c7cb1a1")}
    ),
    "inline_swin_base": Variant(
        _mixed(_BASE, "inline", (2, 2, 2, 0)), {"in1k": token_mixer_cfg("inline", "bf23564bb64c420aafe1")}
    ),
    "test_swin_va": Variant(_TEST, {"untrained": token_mixer_cfg("softmax", "", 160, **_MICROSOFT)}, doc=_FOR_TESTS),
    "test_agent_swin": Variant(
        _mixed(_TEST, "agent", (2, 2, 1, 0), _AGENTS),
        {"untrained": token_mixer_cfg("agent", "", 160)},
        doc="Under 1M parameters, with a stage of both kinds of blocks, for tests.",
    ),
    "test_focused_swin": Variant(
        _mixed(_TEST, "focused", (2, 2, 0, 0)), {"untrained": token_mixer_cfg("focused", "", 160)}, doc=_FOR_TESTS
    ),
}
for _attention, _size in product(("focused", "efficient"), _SIZES):
    VARIANTS[f"{_attention}_swin_{_size}"] = Variant(
        _mixed(_SIZES[_size], _attention, (2, 2, 0, 0)), {"untrained": token_mixer_cfg(_attention)}
    )


def _convert(key: str, value: Tensor, merges_last: bool, own: dict[str, Tensor]) -> tuple[str, Tensor]:
    """Key and value of an official or timm's network, official ones with the merging of patches last in a stage."""
    merge = re.match(r"layers\.(\d+)\.downsample\.(.+)", key)
    if merge is not None:
        key = f"stages.{int(merge[1]) + merges_last}.downsample.{merge[2]}"
    key = re.sub(r"^layers\.", "stages.", key)
    key = re.sub(r"^norm(\d+)\.", r"out_norms.\1.", key)
    if key.endswith(".relative_position_bias_table"):  # [(2h - 1)(2w - 1), N], by query - key
        key = key.replace(".relative_position_bias_table", ".rpb")
        side = math.isqrt(len(value))
        size = own[key].shape[1:] if key in own and side * side != len(value) else (side, side)
        value = value.reshape(*size, -1).permute(2, 0, 1).flip(1, 2)  # [N, *size]
    return key, value


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Official and timm's classifiers, and the backbones of official detectors; native keys pass unchanged.

    Position parameters learned for another image size are resized to the model's: tables of windows and positional
    encodings bicubic, agents' biases of rows and columns linear.
    """
    state_dict = {key: value for key, value in unwrap(state_dict).items() if not key.endswith(".attn_mask")}
    merges_last = any(key.startswith("layers.0.downsample.") for key in state_dict)
    own = model.state_dict()
    converted = convert_checkpoint(state_dict, model, lambda key, value: _convert(key, value, merges_last, own))
    return fit_positions(converted, model)


def _create_swin(variant: str, pretrained: bool = False, **kwargs: Any) -> Swin:
    return create_token_mixer_backbone(Swin, variant, pretrained, checkpoint_filter_fn, **kwargs)


register_variants(__name__, VARIANTS, _create_swin)
