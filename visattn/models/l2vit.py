"""L2ViT: softmax attention within windows and ReLU linear attention over the whole map, block by block.

Paper: The Linear Attention Resurrection in Vision Transformer (arXiv:2501.16182).
Official code: https://github.com/ChuanyangZheng/L2ViT (MIT).

What differs from the official code, and why:
    * One class for classification and dense tasks: `out_norm="layer"` gives the maps of the official dense backbones,
      whose windows always have 7 tokens per axis.
    * A stage begins with its downsampler. Maps are channels-last between stem and head. Names are this package's;
      `checkpoint_filter_fn` renames official keys.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from visattn import layers
from visattn.models._backbone import Backbone, TellsAttended, convert_checkpoint, drop_path_rates, plan_strides
from visattn.models._build import build_model
from visattn.models._variants import Variant, imagenet_cfg, register_variants
from visattn.ops import fit, pad_to_multiple

__all__ = ["L2ViT"]

# B batch, I image channels, H W map, C channels.

torch.fx.wrap("fit")
torch.fx.wrap("pad_to_multiple")


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2 with BatchNorm, ReLU between, LayerNorm: [B, I, H, W] -> [B, H/4, W/4, C].

    Images that 4 does not divide are zero-padded at the bottom and right.
    """

    def __init__(self, in_chans: int, embed_dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, 3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(embed_dim // 2, **dd),
            nn.ReLU(),
            nn.Conv2d(embed_dim // 2, embed_dim, 3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(embed_dim, **dd),
        )
        self.norm = nn.LayerNorm(embed_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        _, _, h, w = x.shape
        # Of a size that is a symbol, PyTorch has to see that it is positive, as it does here, to export the last norm.
        x = fit(x.permute(0, 2, 3, 1), [(h - 1) // 4 * 4 + 4, (w - 1) // 4 * 4 + 4])  # [B, H', W', I]
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # [B, H/4, W/4, C]


class Downsampler(nn.Module):
    """LayerNorm, then a 2x2 convolution of stride 2: [B, H, W, dim] -> [B, H/2, W/2, out_dim], rounded up.

    Odd maps are zero-padded at the bottom and right, after the norm. What stride 1 does: `layers.PatchConv`.
    """

    def __init__(self, dim: int, out_dim: int, stride: int, dilation: int, **dd: Any) -> None:
        super().__init__()
        self.stride = [stride, stride]
        self.norm = nn.LayerNorm(dim, **dd)
        conv = layers.PatchConv if stride == 1 else nn.Conv2d
        self.proj = conv(dim, out_dim, 2, stride, dilation=dilation, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(self.norm(x), self.stride)
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [B, H/2, W/2, out_dim]


class LocalBlock(layers.TransformerBlock):
    """Positional convolution, attention, positional convolution, MLP, each with a shortcut: [B, H, W, dim] -> the same.

    Args:
        dim: C.
        attn: Attention within windows.
        **block: Further arguments of `layers.TransformerBlock`.
    """

    def __init__(self, dim: int, attn: nn.Module, **block: Any) -> None:
        super().__init__(dim, attn, **block)
        dd = {"device": block["device"], "dtype": block["dtype"]}
        self.cpe1 = layers.DepthwiseConv(dim, 3, **dd)
        self.cpe2 = layers.DepthwiseConv(dim, 3, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.cpe1(x)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = x + self.cpe2(x)
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class GlobalBlock(layers.TransformerBlock):
    """Positional convolution, attention, local concentration, MLP, each with a shortcut: [B, H, W, dim] -> the same.

    Args:
        dim: C.
        attn: Attention over the whole map.
        drop_path: Probability of dropping a branch, per sample.
        **block: Further arguments of `layers.TransformerBlock`.
    """

    def __init__(self, dim: int, attn: nn.Module, drop_path: float, **block: Any) -> None:
        super().__init__(dim, attn, drop_path=drop_path, **block)
        dd = {"device": block["device"], "dtype": block["dtype"]}
        self.cpe1 = layers.DepthwiseConv(dim, 3, **dd)
        self.norm3 = nn.LayerNorm(dim, **dd)
        self.lcm = layers.LocalConcentration(dim, **dd)
        self.drop_path3 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.cpe1(x)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = x + self.drop_path3(self.lcm(self.norm3(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class L2ViT(TellsAttended, Backbone):
    """L2ViT for images of any size.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: Pooling before the classifier; "" leaves it out.
        embed_dims: Channels of each stage.
        depths: Blocks per stage. Every second one attends to the whole map, the others to windows.
        num_heads: Heads per stage.
        window_size: Tokens per axis of a window. It changes no parameter.
        mlp_ratio: Hidden width of the MLPs over the channels.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after attention and MLP projections.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        out_norm: "layer" normalises every feature map that `features_only` returns, as the official dense backbones
            do; None returns them as they are.
        output_stride: 32, 16 or 8. Stages beyond it keep their map; convolutions are dilated instead, and windows keep
            their size.
        img_size: No effect, as for timm's models of any input size; accepted so that callers may always give it.

    Raises:
        ValueError: Heads, sizes or `output_stride` that do not fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
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
        block = {"mlp_ratio": mlp_ratio, "proj_drop": proj_drop_rate, **dd}
        self.patch_embed = Stem(in_chans, embed_dims[0], **dd)
        rates = drop_path_rates(drop_path_rate, depths)
        steps = plan_strides(4, (1, *[2] * (len(depths) - 1)), output_stride)
        self.stages = nn.Sequential()
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            reduction, stride, before, dilation = steps[i]
            blocks: list[nn.Module] = []
            for j, rate in enumerate(rates[i]):
                if j % 2:
                    attn = layers.ReluLinearAttention(dim, heads, (1, 1), proj_drop=proj_drop_rate, **dd)
                    blocks.append(GlobalBlock(dim, attn, rate, **block))
                else:
                    attn = layers.ShiftedWindowAttention(
                        dim, heads, window_size, proj_drop=proj_drop_rate, rel_pos=False, **dd
                    )
                    blocks.append(LocalBlock(dim, attn, drop_path=rate, **block))
            downsample = Downsampler(embed_dims[i - 1], dim, stride, before, **dd) if i else nn.Identity()
            self.stages.append(layers.Stage(downsample, blocks, dilation=dilation))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self._build_head(drop_rate, out_norm, **dd)

    def init_weights(self, needs_reset: bool = True) -> None:
        """As every family's; convolutions as the linear layers, as in the official classifiers."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


_cfg = partial(
    imagenet_cfg,
    first_conv="patch_embed.conv.0",
    license="mit",
    origin_url="https://github.com/ChuanyangZheng/L2ViT",
    paper_ids="arXiv:2501.16182",
)


def _file(name: str, size: int = 224, **kwargs: Any) -> dict[str, Any]:
    """`name` is that of a file of the official release, without what all have in common."""
    release = "https://github.com/ChuanyangZheng/L2ViT/releases/download/v1.0"
    return _cfg(size, url=f"{release}/L2ViT-{name}.pth", **kwargs)


_TINY = {"embed_dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_SMALL = {**_TINY, "depths": (2, 2, 18, 2)}
_BASE = {"embed_dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_TEST = {"embed_dims": (16, 32, 64, 96), "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 12)}
_FINETUNED = "Base-22k21k-finetune-{}-checkpoint-best"

VARIANTS: dict[str, Variant] = {
    "l2vit_tiny": Variant(_TINY, {"in1k": _file("Tiny-checkpoint-best-ema")}),
    "l2vit_small": Variant(_SMALL, {"in1k": _file("Small-checkpoint-best-ema")}),
    "l2vit_base": Variant(
        _BASE,
        {"in1k": _file("Base-checkpoint-best-ema"), "in22k_ft_in1k": _file(_FINETUNED.format(224))},
    ),
    "l2vit_base_384": Variant(
        {**_BASE, "window_size": 12},
        {"in22k_ft_in1k": _file(_FINETUNED.format(384), 384, crop_pct=1.0, crop_mode="squash")},
        doc="`l2vit_base` with larger windows.",
    ),
    "test_l2vit": Variant(_TEST, {"untrained": _cfg(160)}, doc="Under 1M parameters; head dim 8, for tests."),
}

_RENAMED = (
    (r"^downsample_layers\.0\.proj\.proj\.", "patch_embed.conv."),
    (r"^downsample_layers\.0\.", "patch_embed."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^norm(\d+)\.", r"out_norms.\1."),
    (r"\.cpe\.0\.proj\.", ".cpe1."),
    (r"\.cpe\.1\.proj\.", ".cpe2."),
    (r"\.local_mp\.", ".lcm."),
)


def _convert(key: str, value: Tensor) -> tuple[str, Tensor]:
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    return key, value


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Official classifiers, and the backbones of official detectors and segmenters; native keys pass unchanged.

    Files that are called "ema" may hold the average beside the model that it is of: it is what was published.
    """
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    url = cfg.get("url") or ""
    if "-ema" in url and isinstance(state_dict, Mapping):
        state_dict = state_dict.get("model_ema", state_dict)
    return convert_checkpoint(state_dict, model, _convert)


def _create_l2vit(variant: str, pretrained: bool = False, **kwargs: Any) -> L2ViT:
    return build_model(L2ViT, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3), **kwargs)


register_variants(__name__, VARIANTS, _create_l2vit)
