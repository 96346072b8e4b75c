"""DeiT as a token mixer backbone: a plain vision transformer with a choice of attention, for images of any size.

Papers: DeiT (ICML 2021, arXiv:2012.12877), Agent Attention (ECCV 2024, arXiv:2312.08874), InLine (NeurIPS 2024,
arXiv:2412.06590), FLatten (ICCV 2023, arXiv:2308.00442), Efficient Attention (WACV 2021, arXiv:1812.01243).
The backbone is timm's. Where the other attentions go in it: https://github.com/LeapLabTHU/Agent-Attention and
https://github.com/LeapLabTHU/InLine, which state no licence; this file is written from the papers.

What differs from the official code, and why:
    * Any image size (official: the square one of the constructor). Images are zero-padded to whole patches, and
      position parameters resized to the map at hand, as the official loaders do for another resolution.
    * Dropout of the attention weights, which no published model uses, is left out.
"""

from itertools import product
from typing import Any

import torch
from timm.models import vision_transformer
from torch import Tensor, nn

from visattn import layers
from visattn.models._backbone import unwrap
from visattn.models._token_mixer import create_token_mixer_backbone, fit_positions, plan_attention, token_mixer_cfg
from visattn.models._variants import Variant, register_variants
from visattn.models._vit import TokenTransformer

__all__ = ["DeiT"]


class DeiT(TokenTransformer):
    """timm's VisionTransformer with a choice of attention.

    Args:
        img_size: Image size that position parameters are made for. Images of any other size run as well.
        patch_size: Side of a patch in pixels.
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: What is classified: "token" (the class token), or "avg" and others of timm over the patches.
        embed_dim: Channels.
        depth: Number of blocks.
        num_heads: Heads per block.
        attention: Name of the attention, see `layers.TOKEN_MIXERS`.
        attention_depths: How many of the first blocks use it, the others softmax attention. Default: all.
        attention_args: Own arguments of that attention's layer.
        mlp_ratio: Hidden width of the MLPs over the channels.
        qkv_bias: Bias of the query, key and value projections.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embedding.
        proj_drop_rate: Dropout after attention and MLP projections.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: An unknown attention, or heads, depths or arguments that do not fit.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        attention: str = "softmax",
        attention_depths: int | None = None,
        attention_args: dict[str, Any] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        numbers = None if attention_depths is None else [attention_depths]
        plan = plan_attention(attention, [depth], numbers, attention_args)[0]
        dd = {"device": device, "dtype": dtype}

        def create_attn(number: int, feat_size: tuple[int, int]) -> nn.Module:
            args = plan[number]
            name = "softmax" if args is None else attention
            shared = {"num_prefix_tokens": 1, "qkv_bias": qkv_bias, "proj_drop": proj_drop_rate}
            return layers.create_token_mixer(name, embed_dim, num_heads, feat_size, **shared, **(args or {}), **dd)

        super().__init__(
            create_attn,
            img_size,
            patch_size,
            num_classes,
            global_pool,
            mlp_ratio,
            proj_drop_rate,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
        )


def _cfg(attention: str, file: str = "", size: int = 224, **kwargs: Any) -> dict[str, Any]:
    return token_mixer_cfg(attention, file, size, **{"pool_size": None, "classifier": "head", **kwargs})


_PAPER = {"paper_ids": "arXiv:2012.12877"}


def _hub(name: str, size: int = 224, **kwargs: Any) -> dict[str, Any]:
    origin = {"license": "apache-2.0", "origin_url": "https://github.com/facebookresearch/deit", **_PAPER}
    return _cfg("softmax", "", size, hf_hub_id=f"timm/{name}_patch16_{size}.fb_in1k", **origin, **kwargs)


# `drop_path_rate` is as published for plain DeiTs and agent attention; InLine takes agent attention's.
_SIZES = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "base": {"embed_dim": 768, "num_heads": 12},
}
_AGENT_SMALL = {**_SIZES["small"], "attention": "agent", "drop_path_rate": 0.1}
_AGENT_BASE = {"attention": "agent", "attention_depths": 4, "attention_args": {"num_agents": 81}, "drop_path_rate": 0.3}
_TEST = {"embed_dim": 96, "depth": 4, "num_heads": 3}
_TEST_AGENT = {"attention": "agent", "attention_depths": 3, "attention_args": {"num_agents": 9}}

VARIANTS: dict[str, Variant] = {
    "deit_tiny_va": Variant({**_SIZES["tiny"], "drop_path_rate": 0.1}, {"fb_in1k": _hub("deit_tiny")}),
    "deit_small_va": Variant({**_SIZES["small"], "drop_path_rate": 0.1}, {"fb_in1k": _hub("deit_small")}),
    "deit_base_va": Variant(
        {**_SIZES["base"], "drop_path_rate": 0.1},
        {"fb_in1k": _hub("deit_base"), "fb_in1k_384": _hub("deit_base", 384, crop_pct=1.0)},
    ),
    "agent_deit_tiny": Variant(
        {**_SIZES["tiny"], "attention": "agent"}, {"in1k": _cfg("agent", "57e0904221824ee7b7af")}
    ),
    "agent_deit_small": Variant(_AGENT_SMALL, {"in1k": _cfg("agent", "fdd43304372541db8ea7")}),
    "agent_deit_small_448": Variant(_AGENT_SMALL, {"in1k": _cfg("agent", "a228f86241c445f1969b", 448)}),
    "agent_deit_base": Variant(
        {**_SIZES["base"], **_AGENT_BASE},
        {"in1k": _cfg("agent", "5115f15fdd7e4ab58fbc")},
        doc="81 agents in the first four blocks, softmax attention in the others.",
    ),
    "inline_deit_tiny": Variant(
        {"embed_dim": 192, "num_heads": 6, "attention": "inline"}, {"in1k": _cfg("inline", "1d6b8191ad6d4114b291")}
    ),
    "inline_deit_small": Variant(
        {"embed_dim": 320, "num_heads": 10, "attention": "inline", "drop_path_rate": 0.1},
        {"in1k": _cfg("inline", "2f3898b07e9247f3beb3", 288)},
    ),
    "inline_deit_base": Variant(
        {"embed_dim": 384, "num_heads": 12, "attention": "inline", "drop_path_rate": 0.3},
        {"in1k": _cfg("inline", "10bdd726d4b0435eb34e", 448)},
    ),
    "test_deit_va": Variant(
        _TEST, {"untrained": _cfg("softmax", "", 160, **_PAPER)}, doc="Under 1M parameters, for tests."
    ),
    "test_agent_deit": Variant(
        {**_TEST, **_TEST_AGENT},
        {"untrained": _cfg("agent", "", 160)},
        doc="Under 1M parameters, the last block with softmax attention, for tests.",
    ),
}
for _attention, _size in product(("focused", "efficient"), _SIZES):
    VARIANTS[f"{_attention}_deit_{_size}"] = Variant(
        {**_SIZES[_size], "attention": _attention}, {"untrained": _cfg(_attention)}
    )


def checkpoint_filter_fn(state_dict: dict[str, Any], model: DeiT) -> dict[str, Tensor]:
    """Official and timm's classifiers; native keys pass unchanged.

    Position parameters learned for another image size are resized to the model's: positions of tokens bicubic, agents'
    biases of rows and columns linear.
    """
    return fit_positions(vision_transformer.checkpoint_filter_fn(unwrap(state_dict), model, antialias=False), model)


def _create_deit(variant: str, pretrained: bool = False, **kwargs: Any) -> DeiT:
    return create_token_mixer_backbone(DeiT, variant, pretrained, checkpoint_filter_fn, levels=3, **kwargs)


register_variants(__name__, VARIANTS, _create_deit)
