"""TransNeXt: aggregated attention (neighbours and pooled tokens in one softmax) and convolutional gated MLPs.

Paper: TransNeXt: Robust Foveal Visual Perception for Vision Transformers (CVPR 2024, arXiv:2311.17132).
Official code: https://github.com/DaiShiResearch/TransNeXt (Apache-2.0).

What differs from the official code, and why:
    * One class for classification and dense tasks. The official classifier takes images of one size that 32 divides;
      here any size follows the rule of the official dense code: the image is zero-padded at the bottom and right to a
      multiple of 4 (`layers.PatchTokenizer`), nothing later is. At the classifier's size the results are its own.
    * A map smaller than a pooling ratio is pooled to one token (official: to none).
    * A stage ends with its norm, so that a stage's output is its feature map; the last stage's norm is the network's,
      and `forward_intermediates(norm=True)` applies it. `checkpoint_filter_fn` renames official keys.
"""

import math
import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from visattn import layers
from visattn.models._backbone import Backbone, TellsAttended, convert_checkpoint, drop_path_rates, plan_strides
from visattn.models._build import build_model
from visattn.models._variants import Variant, imagenet_cfg, register_variants

__all__ = ["TransNeXt"]


class TransNeXt(TellsAttended, Backbone):
    """TransNeXt for images of any size.

    `forward_intermediates(norm=True)` gives the maps of the official dense backbones: all but the last are normalised
    anyway, as the next stage takes them. Without `norm`, the last one is not.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: Pooling before the classifier; "" leaves it out.
        embed_dim: Channels of the first stage; each later stage has twice as many.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        mlp_ratios: Per stage, the width of an MLP over the channels; its gated form has 2 / 3 of it.
        sr_ratios: Per stage, tokens per axis for one pooled token; 1: attention over the whole map instead.
        kernel_size: Window of neighbours per axis, odd.
        pretrain_size: Image size that positions are measured by. It belongs to the weights: 224 for all official ones,
            those fine-tuned at 384 and on dense tasks included, but 256 for `transnext_micro_aaaa`.
        pool_size: Pooled tokens per axis instead of `map // sr_ratio`, at most those of the map: the official "linear
            inference mode", whose cost is linear in the pixels.
        position_bias: "extrapolate" computes the position bias for the image at hand. "interpolate" computes it for
            images of `bias_img_size` and resizes it (bilinear), as the published detectors and segmenters do.
        bias_img_size: Image size of "interpolate": 800 for official detectors, 512 for segmenters.
        qkv_bias: Bias of the query, key and value projections.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after attention and MLP projections.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        out_norm: "layer" normalises every feature map that `features_only` returns; None returns them as they are.
        output_stride: 32, 16 or 8. Stages beyond it keep their map; convolutions are dilated instead, neighbours stay
            the nearest, maps are pooled by the same ratios, and positions keep their distances in the image.
        img_size: No effect, as for timm's models of any input size; accepted so that callers may always give it.

    Raises:
        ValueError: A position bias without what it needs, or heads, sizes, ratios or `output_stride` that do not fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 48,
        depths: Sequence[int] = (2, 2, 15, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        kernel_size: int = 3,
        pretrain_size: int = 224,
        pool_size: int | None = None,
        position_bias: str = "extrapolate",
        bias_img_size: int | None = None,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: str | None = None,
        output_stride: int = 32,
        img_size: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, num_classes, global_pool)
        dd = {"device": device, "dtype": dtype}
        number = len(depths)
        smallest = 2 ** (number + 1)
        if position_bias not in ("extrapolate", "interpolate"):
            raise ValueError(f"expected position_bias 'extrapolate' or 'interpolate', got {position_bias!r}")
        if (position_bias == "interpolate") != (bias_img_size is not None):
            raise ValueError(
                f"expected bias_img_size with position_bias 'interpolate' and only then, got {bias_img_size} with "
                f"{position_bias!r}; try the image size of the training, 800 for the official detectors"
            )
        if pretrain_size < 2 * smallest or (bias_img_size is not None and bias_img_size < smallest):
            raise ValueError(
                f"expected pretrain_size of at least {2 * smallest} and bias_img_size of at least {smallest} for "
                f"{number} stages, got {pretrain_size} and {bias_img_size}"
            )
        self.patch_embed = layers.PatchTokenizer(in_chans, embed_dim, 4, kernel_size=7, **dd)
        rates = drop_path_rates(drop_path_rate, depths)
        steps = plan_strides(4, (1, *[2] * (number - 1)), output_stride)
        self.stages = nn.Sequential()
        for i, (ratio, sr_ratio) in enumerate(zip(mlp_ratios, sr_ratios, strict=True)):
            dim = embed_dim * 2**i
            reduction, stride, before, dilation = steps[i]
            # the official rounding, in two steps
            hidden_dim = int(2 * int(dim * ratio) / 3)
            sizes = pretrain_size // reduction, None if bias_img_size is None else bias_img_size // reduction
            blocks = []
            for rate in rates[i]:
                if sr_ratio == 1:
                    attn = layers.CosineAttention(dim, num_heads[i], *sizes, qkv_bias, proj_drop_rate, **dd)
                else:
                    attn = layers.AggregatedAttention(
                        dim, num_heads[i], kernel_size, sr_ratio, *sizes, pool_size, qkv_bias, proj_drop_rate, **dd
                    )
                mlp = layers.ConvGLU(dim, hidden_dim, proj_drop_rate, **dd)
                blocks.append(layers.TransformerBlock(dim, attn, drop_path=rate, eps=1e-6, mlp=mlp, **dd))
            downsample = layers.ConvDownsampler(dim // 2, True, stride, before, **dd) if i else nn.Identity()
            norm = nn.LayerNorm(dim, eps=1e-6, **dd) if i < number - 1 else None
            self.stages.append(layers.Stage(downsample, blocks, norm, dilation))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self._build_head(drop_rate, out_norm, norm=nn.LayerNorm(embed_dim * 2 ** (number - 1), eps=1e-6, **dd), **dd)

    def init_weights(self, needs_reset: bool = True) -> None:
        """As every family's; convolutions are normal with variance 2 / (kernel area * outputs per group), zero biases.

        `sr`, a linear layer here, is a convolution of the official code.
        """
        super().init_weights(needs_reset)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and name.endswith(".sr")):
                outputs = len(module.weight) // getattr(module, "groups", 1)
                nn.init.normal_(module.weight, std=math.sqrt(2 / (outputs * module.weight[0, 0].numel())))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters from stem to head, for layer-wise learning rates; stage norms go with the last block."""
        groups = super().group_matcher(coarse)
        if not coarse:
            stages = cast("Iterable[layers.Stage]", self.stages)
            norms = [(rf"^stages\.({i})\.norm", (len(stage.blocks) - 1,)) for i, stage in enumerate(stages)]
            groups["blocks"] = norms + groups["blocks"]
        return groups

    def no_weight_decay(self) -> set[str]:
        """Patterns of parameters that weight decay leaves alone."""
        return {"*.temperature", "*.query_embedding", "*.local_bias", "*.cpb_fc*"}


_cfg = partial(
    imagenet_cfg,
    first_conv="patch_embed.proj",
    license="apache-2.0",
    origin_url="https://github.com/DaiShiResearch/TransNeXt",
    paper_ids="arXiv:2311.17132",
)


def _hub(name: str, size: int = 224, **kwargs: Any) -> dict[str, Any]:
    """`name` is that of the authors' repository on the Hugging Face hub; its one file is called alike."""
    return _cfg(
        size,
        hf_hub_id=f"DaiShiResearch/{name}",
        hf_hub_filename=f"{name.replace('-', '_')}.pth",
        **kwargs,
    )


_SIZE_384 = {"size": 384, "crop_pct": 1.0, "crop_mode": "squash"}
_MICRO = {"embed_dim": 48, "depths": (2, 2, 15, 2), "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.15}
_TINY = {"embed_dim": 72, "depths": (2, 2, 15, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.25}
_SMALL = {**_TINY, "depths": (5, 5, 22, 5), "drop_path_rate": 0.45}
_BASE = {"embed_dim": 96, "depths": (5, 5, 23, 5), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.6}
_TEST = {
    "embed_dim": 20,
    "depths": (2, 2, 1, 1),
    "num_heads": (1, 2, 4, 8),
    "mlp_ratios": (4, 4, 2, 2),
    "sr_ratios": (4, 2, 1, 1),
    "pretrain_size": 160,
}

VARIANTS: dict[str, Variant] = {
    "transnext_micro": Variant(_MICRO, {"in1k": _hub("transnext-micro-224-1k")}),
    "transnext_tiny": Variant(_TINY, {"in1k": _hub("transnext-tiny-224-1k")}),
    "transnext_small": Variant(
        _SMALL,
        {"in1k": _hub("transnext-small-224-1k"), "in1k_384": _hub("transnext-small-384-1k-ft-1k", **_SIZE_384)},
    ),
    "transnext_base": Variant(
        _BASE,
        {"in1k": _hub("transnext-base-224-1k"), "in1k_384": _hub("transnext-base-384-1k-ft-1k", **_SIZE_384)},
    ),
    "transnext_micro_aaaa": Variant(
        {**_MICRO, "sr_ratios": (16, 8, 4, 2), "pretrain_size": 256},
        {"in1k": _hub("transnext-micro-AAAA-256-1k", 256)},
        doc="Aggregated attention in the last stage too; trained at 256 x 256.",
    ),
    "test_transnext": Variant(
        _TEST,
        {"untrained": _cfg(160)},
        doc="Under 1M parameters; head dim 20 and less pooling, for tests.",
    ),
}


def _convert(key: str, value: Tensor, number: int) -> tuple[str, Tensor]:
    """Key and value of a network of `number` stages, official to ours."""
    match = re.match(r"(patch_embed|block|norm)(\d+)\.(.+)", key)
    if match is None:
        return key, value
    part, stage, rest = match[1], int(match[2]) - 1, match[3]
    if part == "norm":
        return (f"norm.{rest}" if stage == number - 1 else f"stages.{stage}.norm.{rest}"), value
    if part == "patch_embed":
        rest = rest if stage == 0 else rest.replace("proj.", "reduction.")
        return (f"patch_embed.{rest}" if stage == 0 else f"stages.{stage}.downsample.{rest}"), value
    rest = rest.replace(".dwconv.dwconv.", ".dwconv.").replace(".relative_pos_bias_local", ".local_bias")
    rest = rest.replace(".learnable_tokens", ".tokens").replace(".learnable_bias", ".token_bias")
    if rest.endswith(".temperature"):
        value = value.flatten()
    elif rest.endswith((".query_embedding", ".token_bias")):
        value = value.squeeze(1)
    elif rest.endswith(".sr.weight"):
        value = value.flatten(1)
    return f"stages.{stage}.blocks.{rest}", value


def checkpoint_filter_fn(state_dict: dict[str, Any], model: TransNeXt) -> dict[str, Tensor]:
    """Official classifiers, and the backbones of official detectors and segmenters; native keys pass unchanged."""
    number = len(model.stages)
    return convert_checkpoint(state_dict, model, lambda key, value: _convert(key, value, number))


def _create_transnext(variant: str, pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    return build_model(TransNeXt, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3), **kwargs)


register_variants(__name__, VARIANTS, _create_transnext)
