"""MaxViT: Multi-Axis Vision Transformer.

Paper: MaxViT: Multi-Axis Vision Transformer (ECCV 2022, arXiv:2204.01697). Official code:
https://github.com/google-research/maxvit (Apache-2.0). PyTorch weights: timm's conversions of the official ones
(`*.tf_*`, Apache-2.0), and torchvision's own training (`maxvit_t_va`, BSD-3-Clause).

What differs from the official code, and why:
    * Any image size: windows and grids that the map does not fill are attended as they are; the official code, timm and
      torchvision refuse such maps. The shortcut's average of 2 x 2 at the border of an odd map counts real pixels only,
      as TensorFlow's does (timm counts its padding, too).
    * The window is a run-time setting and never replaces a parameter: the relative position table of the checkpoint
      stays and is resized, bilinear as in the official code, to the window in use.
    * Drop path grows to `drop_path_rate` in the last block, as in timm; the official schedule ends one step before.
    * `output_stride` 16 and 8, for dense prediction.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm2d, NormMlpClassifierHead, to_2tuple
from timm.models import resolve_pretrained_cfg
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from visattn import layers
from visattn.models._backbone import Backbone, convert_checkpoint, plan_stages
from visattn.models._build import NORM_MLP_POOLS, build_model
from visattn.models._variants import Variant, imagenet_cfg, register_variants
from visattn.ops.geometry import ceil_div

__all__ = ["MaxViT"]

# B batch, H W map, C channels. Maps between blocks are [B, C, H, W], channels-last in memory: permuting costs nothing.

_IMAGE_PER_WINDOW = 32  # windows of the official models have image / 32 tokens per axis, in every stage


def resolve_window(img_size: tuple[int, int], window_size: int | tuple[int, int] | str) -> tuple[int, int] | None:
    """Tokens per axis of all windows, or None if they grow with the image; for the arguments see `MaxViT`.

    Raises:
        ValueError: A size below 1, or an unknown name.
    """
    if len(img_size) != 2 or min(img_size) < 1:
        raise ValueError(f"expected img_size of one int or two, at least 1, got {img_size}")
    if window_size == "image":
        return ceil_div(img_size[0], _IMAGE_PER_WINDOW), ceil_div(img_size[1], _IMAGE_PER_WINDOW)
    if window_size == "grow":
        return None
    if isinstance(window_size, str) or min(to_2tuple(window_size)) < 1:
        raise ValueError(f"expected window_size 'image', 'grow', or one int or two, at least 1, got {window_size!r}")
    return to_2tuple(window_size)


class Permute(nn.Module):
    """x.permute(*dims), to bring maps from one layout to another."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)

    def extra_repr(self) -> str:
        return f"{self.dims}"


class MaxViTBlock(nn.Sequential):
    """MBConv, then attention within windows and within grids, each with an MLP: [B, C, H, W] -> [B, C', H', W'].

    Args:
        conv: The MBConv.
        attentions: Within windows, within grids; on maps [B, H, W, C'].
        dim: C'.
        **block: Further arguments of `layers.TransformerBlock`.
    """

    def __init__(self, conv: nn.Module, attentions: Sequence[nn.Module], dim: int, **block: Any) -> None:
        attn_block, attn_grid = (layers.TransformerBlock(dim, attn, **block) for attn in attentions)
        super().__init__(
            OrderedDict(
                conv=conv,
                to_channels_last=Permute(0, 2, 3, 1),
                attn_block=attn_block,
                attn_grid=attn_grid,
                to_channels_first=Permute(0, 3, 1, 2),
            )
        )


class MaxViT(Backbone):
    """MaxViT.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: Pooling before the classifier; "" leaves it out.
        stem_width: Channels of both convolutions of the stem.
        embed_dims: Channels of each stage.
        depths: Blocks per stage.
        head_dim: Channels of each head.
        img_size: Image size that windows and tables are made for. Images of any other size run as well. Default: the
            input size of the pretrained tag.
        window_size: Tokens per axis of windows and grids, in every stage: "image", `img_size / 32` (rounded up);
            "grow", the same for the size of the image at hand, as in the official fine-tuning, so that the number of
            windows per axis stays 32 / stride of the stage; or one or two ints.
        table_size: Window that the relative position tables are learned for. Default: the window; `img_size / 32` for
            "grow". Another one means that the tables are resized to the window on every call.
        form: "google", or "torchvision" for the network of its `maxvit_t`: exact GELU, symmetric padding, 3x3 pooling
            and always a convolution in strided shortcuts, attention scaled by the width of all heads together, no bias
            in the first convolution and in the classifier.
        mlp_ratio: Hidden width of the MLPs over the channels.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after attention and MLP projections.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0; on the five branches of each block.
        out_norm: "layer" or "batch" normalises every feature map that `features_only` returns; None returns them as
            they are.
        output_stride: 32, 16 or 8. Stages beyond it keep their map and dilate the depthwise convolutions instead; the
            windows keep their size, so that there are more of them.

    Raises:
        ValueError: Sizes, windows, `form` or `output_stride` that do not fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_width: int = 64,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 5, 2),
        head_dim: int = 32,
        img_size: int | tuple[int, int] = 224,
        window_size: int | tuple[int, int] | str = "image",
        table_size: int | tuple[int, int] | None = None,
        form: str = "google",
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: str | None = None,
        output_stride: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, num_classes, global_pool, "NCHW", NORM_MLP_POOLS)
        if form not in ("google", "torchvision"):
            raise ValueError(f"expected form 'google' or 'torchvision', got {form!r}")
        plan = plan_stages(depths, output_stride, drop_path_rate)
        dd = {"device": device, "dtype": dtype}
        self.is_google = form == "google"
        self.img_size, self.window_size = to_2tuple(img_size), window_size
        window = resolve_window(self.img_size, window_size)
        if table_size is None:
            table_size = resolve_window(self.img_size, "image") if window is None else window
        self.table_size = to_2tuple(table_size)

        act = "gelu_tanh" if self.is_google else "gelu"
        conv_args = {"act": act, "same_pad": self.is_google, "norm_eps": 1e-3, "norm_momentum": 0.01, **dd}
        block_args = {"mlp_ratio": mlp_ratio, "proj_drop": proj_drop_rate, "act": act, **dd}
        shortcut: dict[str, Any] = {"pool": "avg2"} if self.is_google else {"pool": "avg3", "project_strided": True}
        self.patch_embed = layers.ConvStem(in_chans, stem_width, bias=(self.is_google, True), **conv_args)
        self.feature_info.append({"num_chs": stem_width, "reduction": 2, "module": "patch_embed"})
        self.stages = nn.Sequential()
        in_dim = stem_width
        for i, dim in enumerate(embed_dims):
            reduction, steps = plan[i]
            attn_args = {
                "window_size": window,
                "num_windows": _IMAGE_PER_WINDOW // reduction,
                "table_size": self.table_size,
                "scale": None if self.is_google else dim**-0.5,
                "proj_drop": proj_drop_rate,
            }
            blocks = []
            for stride, dilation, rate in steps:
                conv = layers.MBConv(in_dim, dim, stride, dilation, drop_path=rate, **shortcut, **conv_args)
                attentions = [
                    layers.WindowAttention(dim, dim // head_dim, grid=grid, **attn_args, **dd) for grid in (False, True)
                ]
                blocks.append(MaxViTBlock(conv, attentions, dim, drop_path=rate, **block_args))
                in_dim = dim
            self.stages.append(layers.Stage(nn.Identity(), blocks))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        head = NormMlpClassifierHead(
            in_dim, num_classes, in_dim, global_pool, drop_rate, partial(LayerNorm2d, eps=1e-5), "tanh", **dd
        )
        self._build_head(drop_rate, out_norm, **dd, norm=nn.Identity(), head=head)
        self._drop_classifier_bias()

    def _drop_classifier_bias(self) -> None:
        if not self.is_google and self.num_classes > 0:
            self.head.fc.register_parameter("bias", None)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Normal (std 0.02) for all linear and convolution weights and tables, as in the official code."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif needs_reset:
                layers.reset_parameters(module)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        window_size: int | tuple[int, int] | str | None = None,
    ) -> None:
        """Choose the windows of another image size, or other windows. All parameters stay as they are.

        Args:
            img_size: See the class; None keeps it.
            window_size: See the class; None keeps the rule, so that "image" follows `img_size`.

        Raises:
            ValueError: Sizes below 1, or an unknown name.
        """
        img_size = self.img_size if img_size is None else to_2tuple(img_size)
        window_size = self.window_size if window_size is None else window_size
        window = resolve_window(img_size, window_size)
        for module in self.modules():
            if isinstance(module, layers.WindowAttention):
                module.set_window_size(window)
        self.img_size, self.window_size = img_size, window_size
        # what timm needs to build this model again from a saved one
        update_model_input_size(self, img_size, window_size=window_size, table_size=self.table_size)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """See `Backbone`."""
        super().reset_classifier(num_classes, global_pool, reset_other)
        self._drop_classifier_bias()

    def no_weight_decay(self) -> set[str]:
        """Patterns of parameters that weight decay leaves alone."""
        return {"*.rpb"}


def _cfg(size: int = 224, **kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        size,
        **{
            "url": "",
            "hf_hub_id": "",
            "crop_pct": 0.95 if size == 224 else 1.0,
            "crop_mode": "center" if size == 224 else "squash",
            "first_conv": "patch_embed.conv1",
            "license": "apache-2.0",
            "origin_url": "https://github.com/google-research/maxvit",
            "paper_ids": "arXiv:2204.01697",
            **kwargs,
        },
    )


_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def _hub(size: str, pixels: int, tag: str, **kwargs: Any) -> dict[str, dict[str, Any]]:
    """Weights of timm's `maxvit_{size}_tf_{pixels}.{tag}`."""
    hub = f"timm/maxvit_{size}_tf_{pixels}.{tag}"
    return {f"tf_{pixels}_{tag}": _cfg(pixels, **{"hf_hub_id": hub, **_HALF, **kwargs})}


def _in1k(size: str) -> dict[str, dict[str, Any]]:
    imagenet = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return {**_hub(size, 224, "in1k", **imagenet), **_hub(size, 384, "in1k"), **_hub(size, 512, "in1k")}


def _in21k(size: str) -> dict[str, dict[str, Any]]:
    tuned = {**_hub(size, 384, "in21k_ft_in1k"), **_hub(size, 512, "in21k_ft_in1k")}
    return {**tuned, **_hub(size, 224, "in21k", num_classes=21843)}


_TINY = {"drop_path_rate": 0.2}
_SMALL = {"embed_dims": (96, 192, 384, 768), "drop_path_rate": 0.3}
_BASE = {**_SMALL, "depths": (2, 6, 14, 2), "drop_path_rate": 0.4}
_LARGE = {**_BASE, "stem_width": 128, "embed_dims": (128, 256, 512, 1024), "drop_path_rate": 0.6}
_XLARGE = {**_BASE, "stem_width": 192, "embed_dims": (192, 384, 768, 1536), "drop_path_rate": 0.6}
_TEST = {"stem_width": 16, "embed_dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "head_dim": 16}
_TORCHVISION = _cfg(
    url="https://download.pytorch.org/models/maxvit_t-bc5ab103.pth",
    crop_pct=1.0,
    license="bsd-3-clause",
    origin_url="https://github.com/pytorch/vision",
)

VARIANTS: dict[str, Variant] = {
    "maxvit_tiny_va": Variant(_TINY, _in1k("tiny")),
    "maxvit_small_va": Variant(_SMALL, _in1k("small")),
    "maxvit_base_va": Variant(_BASE, {**_in1k("base"), **_in21k("base")}),
    "maxvit_large_va": Variant(_LARGE, {**_in1k("large"), **_in21k("large")}),
    "maxvit_xlarge_va": Variant(_XLARGE, _in21k("xlarge")),
    "maxvit_t_va": Variant({**_TINY, "form": "torchvision"}, {"tv_in1k": _TORCHVISION}, doc="torchvision's maxvit_t."),
    "test_maxvit_va": Variant(_TEST, {"untrained": _cfg(160, **_HALF)}, doc="Under 1M parameters, for tests."),
}


_RENAMED = (
    # torchvision
    (r"^stem\.0\.0\.", "patch_embed.conv1."),
    (r"^stem\.0\.1\.", "patch_embed.norm1."),
    (r"^stem\.1\.0\.", "patch_embed.conv2."),
    (r"^blocks\.(\d+)\.layers\.(\d+)\.layers\.", r"stages.\1.blocks.\2."),
    (r"\.MBconv\.proj\.1\.", ".conv.shortcut.proj."),
    (r"\.MBconv\.layers\.", ".conv."),
    (r"\.conv_a\.0\.", ".conv1."),
    (r"\.conv_a\.1\.", ".norm1."),
    (r"\.conv_b\.0\.", ".conv2."),
    (r"\.conv_b\.1\.", ".norm2."),
    (r"\.conv_c\.", ".conv3."),
    (r"\.squeeze_excitation\.", ".se."),
    (r"\.window_attention\.", ".attn_block."),
    (r"\.grid_attention\.", ".attn_grid."),
    (r"\.attn_layer\.0\.", ".norm1."),
    (r"\.attn_layer\.1\.", ".attn."),
    (r"\.to_qkv\.", ".qkv."),
    (r"\.merge\.", ".proj."),
    (r"\.mlp_layer\.0\.", ".norm2."),
    (r"\.mlp_layer\.1\.", ".mlp.fc1."),
    (r"\.mlp_layer\.3\.", ".mlp.fc2."),
    (r"^classifier\.2\.", "head.norm."),
    (r"^classifier\.3\.", "head.pre_logits.fc."),
    (r"^classifier\.5\.", "head.fc."),
    # timm
    (r"^stem\.", "patch_embed."),
    (r"\.conv1_1x1\.", ".conv1."),
    (r"\.conv2_kxk\.", ".conv2."),
    (r"\.conv3_1x1\.", ".conv3."),
    (r"\.shortcut\.expand\.", ".shortcut.proj."),
    # both
    (r"\.(rel_pos\.)?relative_position_bias_table$", ".rpb"),
)


def _convert(key: str, value: Tensor) -> tuple[str, Tensor]:
    for pattern, name in _RENAMED:
        key = re.sub(pattern, name, key)
    if key.endswith(".rpb") and value.ndim == 2:  # torchvision: [(2P - 1)^2, N], by query - key
        side = math.isqrt(len(value))
        value = value.reshape(side, side, -1).permute(2, 0, 1).flip(1, 2)  # [N, side, side]
    return key, value


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename timm's and torchvision's keys and fit position tables to the model; native keys pass unchanged."""
    return convert_checkpoint(state_dict, model, _convert, "bilinear")


def _create_maxvit(variant: str, pretrained: bool = False, **kwargs: Any) -> MaxViT:
    if "img_size" not in kwargs:
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        kwargs["img_size"] = cfg.input_size[-2:]
    return build_model(MaxViT, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3, 4), **kwargs)


register_variants(__name__, VARIANTS, _create_maxvit)
