"""ShiftViT: a Swin Transformer whose attention is replaced by a shift of some channels, which has no parameters.

Paper: When Shift Operation Meets Vision Transformer: An Extremely Simple Alternative to Attention Mechanism
(AAAI 2022, arXiv:2201.10801). Official code: https://github.com/microsoft/SPACH (MIT).

What differs from the official code, and why:
    * Maps are channels-last, where each group of shifted channels is a slice, and all layers but the first are linear:
      on a CPU that is faster than the official convolutions of 1 x 1 and of 2 x 2 patches, whose weights
      `checkpoint_filter_fn` flattens.
    * A stage begins with its downsampling (official: ends with the next one's), so that a stage's output is its feature
      map. `checkpoint_filter_fn` renames official keys.
    * Arguments of variants take effect: the official functions ignore every keyword. Dropout after the patch embedding,
      which no model uses, is left out.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn

from visattn import layers
from visattn.models._backbone import Backbone, convert_checkpoint, drop_path_rates, plan_strides
from visattn.models._build import build_model
from visattn.models._variants import Variant, imagenet_cfg, register_variants
from visattn.ops import floor_to_multiple, shift

torch.fx.wrap("floor_to_multiple")
torch.fx.wrap("shift")

__all__ = ["ShiftViT"]

# B batch, H W map, C channels. Maps are [B, H, W, C] between the stem and the head.


class SampleNorm(nn.GroupNorm):
    """GroupNorm of one group: mean and variance of the whole map of a sample, [B, H, W, dim] -> [B, H, W, dim].

    What it gives for one pixel depends on all others: of a crop, or of a padded image, everything is different.
    """

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(1, dim, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [B, H, W, C]


class PatchEmbed(nn.Module):
    """Patches that do not overlap, then the norm: [B, I, H, W] -> [B, H/size, W/size, dim], rounded down."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, **dd: Any) -> None:
        super().__init__()
        self.proj = layers.PatchConv(in_chans, dim, patch_size, patch_size, **dd)
        self.norm = SampleNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))  # [B, H', W', C]


class Downsample(nn.Module):
    """The norm, then a linear layer over patches of 2 x 2: [B, H, W, dim] -> [B, H/2, W/2, 2 * dim], rounded down.

    With stride 1 there is a patch at every position, of pixels that lie `dilation` apart and zeros outside:
    [B, H, W, 2 * dim].
    """

    def __init__(self, dim: int, stride: int = 2, dilation: int = 1, **dd: Any) -> None:
        super().__init__()
        self.stride = stride
        self.dilation = dilation
        self.norm = SampleNorm(dim, **dd)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.stride == 1:
            (h, w), d = x.shape[1:3], self.dilation
            x = F.pad(x, (0, 0, 0, d, 0, d))  # [B, H + d, W + d, C]
            x = torch.cat([x.narrow(1, i, h).narrow(2, j, w) for i in (0, d) for j in (0, d)], -1)  # [B, H, W, 4C]
        else:
            x = floor_to_multiple(x, [2, 2])
            b, h, w, c = x.shape
            x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(2, 3)  # [B, H/2, W/2, 2, 2, C]
            x = x.flatten(3)  # [B, H/2, W/2, 4C]
        return self.reduction(x)


class ShiftBlock(nn.Module):
    """x = shift(x), then x + mlp(norm(x)): [B, H, W, dim] -> [B, H, W, dim].

    The residual stream itself is shifted, in every pass: stochastic depth drops the MLP alone.

    Args:
        dim: Channels.
        shifted: How many of them move in each of the four directions.
        step: Pixels that they move by.
        mlp_ratio: Hidden width of the MLP over `dim`.
        proj_drop: Dropout after both linear layers of the MLP.
        drop_path: Probability of dropping the MLP, per sample.
    """

    def __init__(
        self,
        dim: int,
        shifted: int,
        step: int = 1,
        mlp_ratio: float = 2.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.shifted = shifted
        self.step = step
        self.norm = SampleNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = shift(x, channels=self.shifted, step=self.step)
        return x + self.drop_path(self.mlp(self.norm(x)))

    def extra_repr(self) -> str:
        return f"shifted={self.shifted}, step={self.step}"


class ShiftViT(Backbone):
    """ShiftViT for images of any size; rows and columns that no whole patch covers are dropped, as officially.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: Pooling before the classifier; "" leaves it out.
        embed_dim: Channels of the first stage; each later stage has twice as many.
        depths: Blocks per stage.
        mlp_ratio: Hidden width of the MLPs over the channels.
        n_div: One of so many channels moves in each of the four directions, rounded down.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout in the MLPs.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        out_norm: "layer" normalises every feature map that `features_only` returns; None returns them as they are.
        output_stride: 32, 16 or 8. Stages beyond it keep their map; patches are dilated and shifts longer instead.
        img_size: No effect, as for timm's models of any input size; accepted so that callers may always give it.

    Raises:
        ValueError: An `n_div` below 4, or an `output_stride` that does not fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (6, 8, 18, 6),
        mlp_ratio: float = 2.0,
        n_div: int = 12,
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
        if n_div < 4:
            raise ValueError(f"expected n_div of at least 4, one part for each direction, got {n_div}; try 12")
        dd = {"device": device, "dtype": dtype}
        self.patch_embed = PatchEmbed(in_chans, embed_dim, 4, **dd)
        self.stages = nn.Sequential()
        rates = drop_path_rates(drop_path_rate, depths)
        steps = plan_strides(4, (1, *[2] * (len(depths) - 1)), output_stride)
        for i, (reduction, stride, before, dilation) in enumerate(steps):
            dim = embed_dim * 2**i
            blocks = [
                ShiftBlock(dim, dim // n_div, dilation, mlp_ratio, proj_drop_rate, rate, **dd) for rate in rates[i]
            ]
            downsample = Downsample(dim // 2, stride, before, **dd) if i else nn.Identity()
            self.stages.append(layers.Stage(downsample, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self._build_head(drop_rate, out_norm, norm=SampleNorm(embed_dim * 2 ** (len(depths) - 1), **dd), **dd)

    def init_weights(self, needs_reset: bool = True) -> None:
        """As every family's; the convolution of the stem is initialised as linear layers are."""
        super().init_weights(needs_reset)
        proj = cast(PatchEmbed, self.patch_embed).proj
        trunc_normal_(proj.weight, std=0.02)
        nn.init.zeros_(cast(Tensor, proj.bias))


_cfg = partial(
    imagenet_cfg,
    first_conv="patch_embed.proj",
    license="mit",
    origin_url="https://github.com/microsoft/SPACH",
    paper_ids="arXiv:2201.10801",
)


def _file(name: str) -> dict[str, dict[str, Any]]:
    return {"in1k": _cfg(url=f"https://github.com/microsoft/SPACH/releases/download/v1.0/shiftvit_{name}.pth")}


_UNTRAINED = {"untrained": _cfg()}
_LIGHT = {"mlp_ratio": 4.0, "n_div": 12}  # and r4
_BASE = {"embed_dim": 128, "n_div": 16}

VARIANTS: dict[str, Variant] = {
    "shiftvit_light_tiny": Variant(
        {**_LIGHT, "depths": (2, 2, 6, 2), "drop_path_rate": 0.2}, _file("tiny_light"), doc="The paper's lightest."
    ),
    "shiftvit_light_small": Variant({**_LIGHT, "depths": (2, 2, 18, 2), "drop_path_rate": 0.4}, _file("small_light")),
    "shiftvit_light_base": Variant({**_LIGHT, **_BASE, "depths": (2, 2, 18, 2), "drop_path_rate": 0.5}, _UNTRAINED),
    "shiftvit_r4_tiny": Variant({**_LIGHT, "depths": (2, 2, 12, 3), "drop_path_rate": 0.2}, _UNTRAINED),
    "shiftvit_r4_small": Variant({**_LIGHT, "depths": (2, 6, 24, 4), "drop_path_rate": 0.4}, _UNTRAINED),
    "shiftvit_r4_base": Variant({**_LIGHT, **_BASE, "depths": (4, 6, 22, 4), "drop_path_rate": 0.5}, _UNTRAINED),
    "shiftvit_r2_tiny": Variant(
        {"depths": (6, 8, 18, 6), "drop_path_rate": 0.2}, _file("tiny_r2"), doc="The paper's Shift-T."
    ),
    "shiftvit_r2_small": Variant(
        {"depths": (10, 18, 36, 10), "drop_path_rate": 0.4}, _file("small_r2"), doc="The paper's Shift-S."
    ),
    "shiftvit_r2_base": Variant(
        {**_BASE, "depths": (10, 18, 36, 10), "drop_path_rate": 0.6}, _UNTRAINED, doc="The paper's Shift-B."
    ),
    "test_shiftvit": Variant(
        {"embed_dim": 28, "depths": (1, 1, 2, 1)}, {"untrained": _cfg(160)}, doc="Under 1M parameters, for tests."
    ),
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename official keys and make linear layers of convolutions; native keys pass unchanged."""

    def convert(key: str, value: Tensor) -> tuple[str, Tensor]:
        match = re.match(r"layers\.(\d+)\.(\w+)\.(.+)", key)
        if match is None:
            return key, value
        stage, rest = int(match[1]) + (match[2] == "downsample"), match[3].replace("norm2.", "norm.")
        value = value.permute(0, 2, 3, 1).flatten(1) if value.ndim == 4 else value  # [O, kh * kw * I]
        return f"stages.{stage}.{match[2]}.{rest}", value

    return convert_checkpoint(state_dict, model, convert)


def _create_shiftvit(variant: str, pretrained: bool = False, **kwargs: Any) -> ShiftViT:
    return build_model(ShiftViT, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3), **kwargs)


register_variants(__name__, VARIANTS, _create_shiftvit)
