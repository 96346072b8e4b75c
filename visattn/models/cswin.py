"""CSWin as a token mixer backbone: cross-shaped windows, or in the first blocks of a stage any global attention.

Papers: CSWin (CVPR 2022, arXiv:2107.00652), Agent Attention (ECCV 2024, arXiv:2312.08874), InLine (NeurIPS 2024,
arXiv:2412.06590), FLatten (ICCV 2023, arXiv:2308.00442), Efficient Attention (WACV 2021, arXiv:1812.01243).
Official code: https://github.com/microsoft/CSWin-Transformer (MIT) for the backbone. Where other attentions go in it:
https://github.com/LeapLabTHU/Agent-Attention and https://github.com/LeapLabTHU/InLine, which state no licence; this
file is written from the papers.

What differs from the official code, and why:
    * One class for classification and dense tasks. Official classifiers take images of one size; here any size follows
      the official segmentation code, which pads queries, keys and values where stripes do not divide the map.
    * A stage whose stripes are as wide as its map at `img_size` attends over the whole map, as in the classifiers; the
      segmentation code never looks. The two halves' convolutions are one, so that parameters do not depend on it.
    * Images of less than 3 pixels are padded to 3, from which on there is a token.
    * A stage begins with its downsampling; `checkpoint_filter_fn` renames official keys.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from visattn import layers
from visattn.models._backbone import Backbone, convert_checkpoint, drop_path_rates, plan_strides, unwrap
from visattn.models._token_mixer import create_token_mixer_backbone, fit_positions, plan_attention, token_mixer_cfg
from visattn.models._variants import Variant, deprecate_infix, register_variants
from visattn.ops import pad_to_at_least
from visattn.ops.geometry import ceil_div

torch.fx.wrap("pad_to_at_least")

__all__ = ["CSWin"]


class Stem(nn.Module):
    """7x7 convolution of stride 4 with 2 zeros around the image, then LayerNorm: [B, I, H, W] -> [B, H', W', C].

    H' = (H + 1) // 4, at least 1.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, embed_dim, 7, stride=4, padding=2, **dd)
        self.norm = nn.LayerNorm(embed_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_at_least(x.permute(0, 2, 3, 1), [3, 3])  # [B, H, W, I]
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # [B, H', W', C]


class InLineBlock(layers.TransformerBlock):
    """The block with InLine attention, which makes its kernels from the block's input, before the norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), None, x)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class CSWin(Backbone):
    """CSWin Transformer for images of any size, with a choice of attention.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: Pooling before the classifier; "" leaves it out.
        img_size: Image size that position parameters are made for. Images of any other size run as well. Default: the
            input size of the pretrained tag.
        embed_dim: Channels of the first stage; each later stage has twice as many.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        split_sizes: Width of the stripes per stage. The last stage has none and attends over the whole map.
        attention: Name of the attention over the whole map, see `layers.TOKEN_MIXERS`.
        attention_depths: Per stage, how many of its first blocks use that attention; the others use stripes. Default:
            all blocks, but none for "softmax".
        attention_args: Own arguments of that attention's layer: a dict, or one per stage.
        mlp_ratio: Hidden width of the MLPs over the channels.
        qkv_bias: Bias of the query, key and value projections.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after attention and MLP projections.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        out_norm: "layer" normalises every feature map that `features_only` returns; None returns them as they are.
        output_stride: 32, 16 or 8. Stages beyond it keep their map; convolutions are dilated instead, and stripes keep
            their width.

    Raises:
        ValueError: An attention, depths, arguments, heads, widths or `output_stride` that do not fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dim: int = 64,
        depths: Sequence[int] = (1, 2, 21, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        split_sizes: Sequence[int] = (1, 2, 7, 7),
        attention: str = "softmax",
        attention_depths: Sequence[int] | None = None,
        attention_args: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
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
        number = len(depths)
        if attention_depths is None and attention == "softmax":
            attention_depths = [0] * number
        plan = plan_attention(attention, depths, attention_depths, attention_args)
        shared = {"qkv_bias": qkv_bias, "proj_drop": proj_drop_rate, **dd}
        self.patch_embed = Stem(in_chans, embed_dim, **dd)
        rates = drop_path_rates(drop_path_rate, depths)
        steps = plan_strides(4, (1, *[2] * (number - 1)), output_stride)
        self.stages = nn.Sequential()
        height, width = (max(1, (n + 1) // 4) for n in to_2tuple(img_size))
        for i, (heads, split_size) in enumerate(zip(num_heads, split_sizes, strict=True)):
            dim = embed_dim * 2**i
            reduction, stride, before, dilation = steps[i]
            height, width = (ceil_div(n, 2) if i else n for n in (height, width))
            if i == number - 1 or (height, width) == (split_size, split_size):
                split_size = None
            blocks: list[nn.Module] = []
            for rate, args in zip(rates[i], plan[i], strict=True):
                if args is None:
                    attn = layers.CrossShapedAttention(dim, heads, split_size, **shared)
                else:
                    attn = layers.create_token_mixer(attention, dim, heads, (height, width), **args, **shared)
                block = InLineBlock if isinstance(attn, layers.InLineAttention) else layers.TransformerBlock
                blocks.append(block(dim, attn, mlp_ratio, proj_drop_rate, rate, **dd))
            downsample = layers.ConvDownsampler(dim // 2, True, stride, before, **dd) if i else nn.Identity()
            self.stages.append(layers.Stage(downsample, blocks, dilation=dilation))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self._build_head(drop_rate, out_norm, **dd)


_MICROSOFT = {
    "license": "mit",
    "origin_url": "https://github.com/microsoft/CSWin-Transformer",
    "paper_ids": "arXiv:2107.00652",
}


def _release(file: str, size: int = 224, **kwargs: Any) -> dict[str, Any]:
    url = f"https://github.com/microsoft/CSWin-Transformer/releases/download/v0.1.0/cswin_{file}_{size}.pth"
    crop = {} if size == 224 else {"crop_pct": 1.0}
    return token_mixer_cfg("softmax", "", size, url=url, **_MICROSOFT, **crop, **kwargs)


def _mixed(base: dict[str, Any], attention: str, args: Any = None) -> dict[str, Any]:
    """Two stages with this attention, two with stripes."""
    return {
        **base,
        "attention": attention,
        "attention_depths": (*base["depths"][:2], 0, 0),
        "attention_args": args,
    }


_TINY = {"embed_dim": 64, "depths": (1, 2, 21, 1), "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.2}
_SMALL = {**_TINY, "depths": (2, 4, 32, 2), "drop_path_rate": 0.4}
_BASE = {**_SMALL, "embed_dim": 96, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}
_LARGE = {**_SMALL, "embed_dim": 144, "num_heads": (6, 12, 24, 24), "drop_path_rate": 0.2}
_WIDE = {"split_sizes": (1, 2, 12, 12)}
_TUNED = {**_WIDE, "drop_path_rate": 0.7}
_TEST = {"embed_dim": 20, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 4)}
# Networks with other attentions have other depths.
_SIZES = {
    "tiny": {**_TINY, "depths": (2, 4, 18, 1)},
    "small": {**_SMALL, "depths": (3, 6, 29, 2)},
    "base": {**_BASE, "depths": (3, 6, 29, 2)},
}
_AGENTS = tuple({"num_agents": n} for n in (9, 16, 49, 49))
# Ids of the authors' files.
_AGENT_FILES = {"tiny": "8c562a74441e46d5902b", "small": "30eb8af675bc4b7a8747", "base": "c8035b0839b2410c8c9f"}
_INLINE_FILES = {"tiny": "49fa2ecc543647c4b970", "small": "59f4e65f776f4052b93c", "base": "91e17121df284ae38521"}
_AT_384 = "Fine-tuned at 384 x 384, with wider stripes."
_FOR_TESTS = "Under 1M parameters, for tests."

VARIANTS: dict[str, Variant] = {
    "cswin_tiny": Variant(_TINY, {"ms_in1k": _release("tiny")}),
    "cswin_small": Variant(_SMALL, {"ms_in1k": _release("small")}),
    "cswin_base": Variant(_BASE, {"ms_in1k": _release("base")}),
    "cswin_base_384": Variant({**_BASE, **_TUNED}, {"ms_in1k": _release("base", 384)}, doc=_AT_384),
    "cswin_large": Variant(
        _LARGE, {"ms_in22k_ft_in1k": _release("large"), "ms_in22k": _release("large_22k", num_classes=21841)}
    ),
    "cswin_large_384": Variant({**_LARGE, **_WIDE}, {"ms_in22k_ft_in1k": _release("large", 384)}, doc=_AT_384),
    "agent_cswin_base_384": Variant(
        {**_mixed(_SIZES["base"], "agent", _AGENTS), **_TUNED},
        {"in1k": token_mixer_cfg("agent", "1239be0df44b47719432", 384)},
        doc=_AT_384,
    ),
    "test_cswin": Variant(_TEST, {"untrained": token_mixer_cfg("softmax", "", 160, **_MICROSOFT)}, doc=_FOR_TESTS),
    "test_efficient_cswin": Variant(
        _mixed(_TEST, "efficient"), {"untrained": token_mixer_cfg("efficient", "", 160)}, doc=_FOR_TESTS
    ),
}
for _size, _args in _SIZES.items():
    VARIANTS |= {
        f"agent_cswin_{_size}": Variant(
            _mixed(_args, "agent", _AGENTS), {"in1k": token_mixer_cfg("agent", _AGENT_FILES[_size])}
        ),
        f"inline_cswin_{_size}": Variant(
            _mixed(_args, "inline", {"lepe": True}), {"in1k": token_mixer_cfg("inline", _INLINE_FILES[_size])}
        ),
        f"focused_cswin_{_size}": Variant(_mixed(_args, "focused"), {"untrained": token_mixer_cfg("focused")}),
        f"efficient_cswin_{_size}": Variant(_mixed(_args, "efficient"), {"untrained": token_mixer_cfg("efficient")}),
    }


def _convert(key: str, value: Tensor, own: dict[str, Tensor]) -> tuple[str, Tensor]:
    """Key and value of an official network, the halves' convolutions joined before, or of our own."""
    key = key.replace("stage1_conv_embed.0.", "patch_embed.proj.").replace("stage1_conv_embed.2.", "patch_embed.norm.")
    key = re.sub(r"^merge(\d)\.conv\.", r"stages.\1.downsample.reduction.", key)
    key = re.sub(r"^merge(\d)\.norm\.", r"stages.\1.downsample.norm.", key)
    key = re.sub(r"^norm(\d)\.", lambda m: f"out_norms.{int(m[1]) - 1}.", key)
    block = re.match(r"stage(\d)\.(\d+)\.(.+)", key)
    if block is not None:
        rest = re.sub(r"^(qkv|proj)\.", r"attn.\1.", block[3]).replace("attns.0.", "attn.")
        key = f"stages.{int(block[1]) - 1}.blocks.{block[2]}.{rest}"
    for name in ("lepe", "dwc"):
        renamed = key.replace(".attn.get_v.", f".attn.{name}.")
        key = renamed if renamed in own else key
    return key, value


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Official classifiers, averaged weights first, and backbones of official segmenters; native keys pass unchanged.

    Position parameters learned for another image size are resized to the model's: positional encodings bicubic, agents'
    biases of rows and columns linear.
    """
    state_dict = unwrap(state_dict)
    joined = {}
    for key, value in state_dict.items():
        other = key.replace(".attns.0.", ".attns.1.")
        if ".attns.1." not in key:
            joined[key] = value if other == key or other not in state_dict else torch.cat([value, state_dict[other]])
    own = model.state_dict()
    converted = convert_checkpoint(joined, model, lambda key, value: _convert(key, value, own))
    return fit_positions(converted, model)


def _create_cswin(variant: str, pretrained: bool = False, **kwargs: Any) -> CSWin:
    return create_token_mixer_backbone(CSWin, variant, pretrained, checkpoint_filter_fn, **kwargs)


register_variants(__name__, VARIANTS, _create_cswin)
deprecate_infix(__name__, [name for name in VARIANTS if name.startswith(("cswin", "test_cswin"))])
