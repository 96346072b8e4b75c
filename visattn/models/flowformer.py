"""Flowformer for images: flow attention to the whole map in all four stages, at a cost linear in the tokens.

Paper: Flowformer: Linearizing Transformers with Conservation Flows (ICML 2022, arXiv:2202.06258).
Official code: https://github.com/thuml/Flowformer, Flowformer_CV (MIT).

What differs from the official code, and why:
    * Any image size (official: the square one of the constructor). Positions are resized (bicubic) to the map at hand;
      rows and columns that no whole patch covers are cropped, and an image smaller than a patch is zero-padded to one.
    * Layer scale, which is on the MLP branch alone, is timm's. `checkpoint_filter_fn` renames official keys.
    * Dropout after the positions, which no published model uses, is left out.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerScale, to_2tuple, trunc_normal_
from torch import Tensor, nn

from visattn import layers
from visattn.models._backbone import Backbone, TellsAttended, convert_checkpoint, drop_path_rates, plan_strides
from visattn.models._token_mixer import create_token_mixer_backbone, fit_positions, token_mixer_cfg
from visattn.models._variants import Variant, register_variants
from visattn.ops import resize_rel_pos

torch.fx.wrap("resize_rel_pos")

__all__ = ["Flowformer"]

# B batch, H W map, C channels.


class Stem(nn.Module):
    """Linear embedding of p x p patches plus a learned position of each: [B, I, H, W] -> [B, H/p, W/p, C].

    The table of positions [1, h, w, C] is resized (bicubic) for maps of another size.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        patch_size: int,
        feat_size: tuple[int, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = layers.PatchConv(in_chans, embed_dim, patch_size, patch_size, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, *feat_size, embed_dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal (std 0.02) for the positions."""
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)  # [B, C, H/p, W/p]
        table = resize_rel_pos(self.pos_embed[0].permute(2, 0, 1), [x.shape[2], x.shape[3]])  # [C, H/p, W/p]
        return (x + table).permute(0, 2, 3, 1)  # [B, H/p, W/p, C]


class Downsampler(layers.PatchConv):
    """Linear embedding of 2 x 2 patches, cropped or padded as by `PatchConv`: [B, H, W, I] -> [B, H/2, W/2, C]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [B, H/2, W/2, C]


class Flowformer(TellsAttended, Backbone):
    """Flowformer for images of any size.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: Pooling before the classifier; "" leaves it out.
        img_size: Image size that positions are made for. Images of any other size run as well. Default: the input size
            of the pretrained tag.
        patch_size: Side in pixels of the first stage's patches; each later stage has patches of twice the side.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        mlp_ratio: Hidden width of the MLPs over the channels.
        layer_scale: Initial value of the scales of the MLP branches.
        qkv_bias: Bias of the query, key and value projections.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after attention and MLP projections.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        out_norm: "layer" normalises every feature map that `features_only` returns; None returns them as they are.
        output_stride: 32, 16 or 8. Stages beyond it keep their map; patches are dilated instead.

    Raises:
        ValueError: Heads, sizes, depths or `output_stride` that do not fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 10, 3),
        num_heads: Sequence[int] = (12, 12, 12, 12),
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-5,
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
        height, width = (max(1, n // patch_size) for n in to_2tuple(img_size))
        self.patch_embed = Stem(in_chans, embed_dims[0], patch_size, (height, width), **dd)
        rates = drop_path_rates(drop_path_rate, depths)
        steps = plan_strides(patch_size, (1, *[2] * (len(depths) - 1)), output_stride)
        self.stages = nn.Sequential()
        for i, (dim, (reduction, stride, before, _)) in enumerate(zip(embed_dims, steps, strict=True)):
            blocks: list[nn.Module] = []
            for rate in rates[i]:
                how = {"qkv_bias": qkv_bias, "proj_drop": proj_drop_rate, **dd}
                attn = layers.FlowAttention(dim, num_heads[i], (height, width), **how)
                block = layers.TransformerBlock(dim, attn, mlp_ratio, proj_drop_rate, rate, eps=1e-6, **dd)
                block.ls2 = LayerScale(dim, layer_scale, **dd)
                blocks.append(block)
            downsample = Downsampler(embed_dims[i - 1], dim, 2, stride, dilation=before, **dd) if i else nn.Identity()
            self.stages.append(layers.Stage(downsample, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self._build_head(drop_rate, out_norm, norm=nn.LayerNorm(embed_dims[-1], eps=1e-6, **dd), **dd)

    def no_weight_decay(self) -> set[str]:
        """Patterns of parameters that weight decay leaves alone."""
        return {"*.pos_embed"}


def _cfg(size: int = 224, **kwargs: Any) -> dict[str, Any]:
    origin = {"license": "mit", "origin_url": "https://github.com/thuml/Flowformer"}
    return token_mixer_cfg("flow", "", size, crop_pct=0.875, **origin, **kwargs)


VARIANTS: dict[str, Variant] = {
    "flowformer_small": Variant({"drop_path_rate": 0.2}, {"untrained": _cfg()}),
    "test_flowformer": Variant(
        {"patch_size": 2, "embed_dims": (24, 48, 96, 144), "depths": (1, 1, 2, 1), "num_heads": (3, 3, 3, 3)},
        {"untrained": _cfg(160, pool_size=(10, 10))},
        doc="Under 1M parameters, for tests.",
    ),
}


def _convert(key: str, value: Tensor) -> tuple[str, Tensor]:
    """Official key and value to ours."""
    key = re.sub(r"^patch_embed\.0\.", "patch_embed.", re.sub(r"^pos_embed$", "patch_embed.pos_embed", key))
    key = re.sub(r"^patch_embed\.(\d)\.proj\.", r"stages.\1.downsample.", key)
    key = re.sub(r"^blocks\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2.", key)
    return re.sub(r"(\.\d+)\.gamma$", r"\1.ls2.gamma", key), value


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Flowformer) -> dict[str, Tensor]:
    """Official classifiers, whose positions are resized (bicubic) to the model's; native keys pass unchanged."""
    converted = convert_checkpoint(state_dict, model, _convert)
    # as the official loader does: a FLOP counter's
    converted = {k: v for k, v in converted.items() if not k.endswith(("total_ops", "total_params"))}
    return fit_positions(converted, model)


def _create_flowformer(variant: str, pretrained: bool = False, **kwargs: Any) -> Flowformer:
    return create_token_mixer_backbone(Flowformer, variant, pretrained, checkpoint_filter_fn, **kwargs)


register_variants(__name__, VARIANTS, _create_flowformer)
