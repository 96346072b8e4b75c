"""ResNeSt: ResNet-D with split attention.

Paper: ResNeSt: Split-Attention Networks (arXiv:2004.08955). Official code: https://github.com/zhanghang1989/ResNeSt
(Apache-2.0). timm has the same networks without five of the fast variants; its file names and keys are the official
ones, so files of both load here.

What differs from the official code, and why:
    * The stem is `patch_embed`, the max pool behind it begins the first stage, later stages are `stages.1` to
      `stages.3`, the classifier is `head.fc`. `checkpoint_filter_fn` renames official keys.
    * Stochastic depth (the official code has none) drops the residual branch and keeps the shortcut. timm 1.0.31 drops
      the input of the shortcut instead, and nothing in blocks whose shortcut is the identity.
    * The last norm of every block starts at zero, as in the official training command (`--last-gamma`) and in timm.
      The constructor of the official PyTorch network sets these weights back to one after that option zeroed them.
    * No DropBlock. The official Gluon training code has it; in the official PyTorch code it is not implemented.

With `output_stride` 8 or 16 stages are dilated as in the official code: the 3x3 convolution of their first block has
the dilation of the stage before, the average pool next to it stays with stride 1, and the shortcut does not pool. timm
leaves that pool out and puts a 2x2 average into the shortcut, so that the same weights give other maps there.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from visattn import layers
from visattn.models._backbone import Backbone, convert_checkpoint, plan_stages
from visattn.models._build import build_model
from visattn.models._variants import Variant, imagenet_cfg, register_variants

__all__ = ["ResNeSt"]

# B batch, H W map, C channels. Maps are [B, C, H, W].


class DeepStem(nn.Module):
    """Three 3x3 convolutions, the first of stride 2, with norm and ReLU: [B, I, H, W] -> [B, 2 * width, H/2, W/2]."""

    def __init__(
        self,
        in_chans: int,
        width: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, width, 3, stride=2, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(width, **dd)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(2 * width, **dd)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)))
        return self.act(self.bn3(self.conv3(x)))


class Bottleneck(nn.Module):
    """1x1 convolution, split attention, 1x1 convolution, plus shortcut: [B, C, H, W] -> [B, out_dim, H/s, W/s].

    Args:
        dim: Channels of the input.
        width: Channels of the split attention.
        out_dim: Channels of the output.
        radix: Splits of the attention.
        cardinality: Cardinal groups of the attention.
        stride: Stride s, 1 or 2.
        dilation: Dilation of the 3x3 convolution.
        first: The block begins a stage and has a shortcut with a convolution.
        pool: A 3x3 average pool of this stride next to the attention ("avd" in the paper), which then has stride 1.
        pool_first: The pool precedes the attention.
        drop_path: Probability of dropping the residual branch, per sample.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        out_dim: int,
        radix: int = 2,
        cardinality: int = 1,
        stride: int = 1,
        dilation: int = 1,
        first: bool = False,
        pool: bool = False,
        pool_first: bool = False,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(dim, width, 1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.avd_first = nn.AvgPool2d(3, stride, padding=1) if pool and pool_first else nn.Identity()
        self.conv2 = layers.SplAt(width, radix, cardinality, dilation, **dd)
        self.avd_last = nn.AvgPool2d(3, stride, padding=1) if pool and not pool_first else nn.Identity()
        self.conv3 = nn.Conv2d(width, out_dim, 1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(out_dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.downsample = nn.Identity()
        if first:
            down = layers.create_pool("avg2") if stride > 1 else nn.Identity()
            conv = nn.Conv2d(dim, out_dim, 1, bias=False, **dd)
            self.downsample = nn.Sequential(down, conv, nn.BatchNorm2d(out_dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        x = self.avd_first(self.act(self.bn1(self.conv1(x))))
        x = self.avd_last(self.conv2(x))
        return self.act(self.drop_path(self.bn3(self.conv3(x))) + shortcut)


class ResNeSt(Backbone):
    """ResNeSt; maps of any size, ceil(size / stride) per stage.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: Pooling before the classifier; "" leaves it out.
        depths: Blocks per stage.
        channels: A quarter of each stage's channels.
        stem_width: Half of the stem's channels.
        radix: Splits per cardinal group.
        cardinality: Cardinal groups.
        base_width: Channels of a cardinal group, per 64 of `channels`.
        avd_first: The average pool of a stage's first block precedes the attention (the "fast" variants).
        zero_init_last: Start the last norm of every block at zero.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        out_norm: "layer" or "batch" normalises every feature map that `features_only` returns; None returns them as
            they are.
        output_stride: Stride of the last map: 32, or 16 or 8 by dilation instead of stride.
        img_size: No effect, as for timm's models of any input size; accepted so that callers may always give it.

    Raises:
        ValueError: Another output stride, or groups that do not divide the channels.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (3, 4, 6, 3),
        channels: Sequence[int] = (64, 128, 256, 512),
        stem_width: int = 32,
        radix: int = 2,
        cardinality: int = 1,
        base_width: int = 64,
        avd_first: bool = False,
        zero_init_last: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: str | None = None,
        output_stride: int = 32,
        img_size: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, num_classes, global_pool, output_fmt="NCHW")
        dd = {"device": device, "dtype": dtype}
        self.zero_init_last = zero_init_last
        dim = 2 * stem_width
        self.patch_embed = DeepStem(in_chans, stem_width, **dd)
        self.feature_info.append({"num_chs": dim, "reduction": 2, "module": "patch_embed"})
        self.stages = nn.Sequential()
        plan = plan_stages(depths, output_stride, drop_path_rate)
        for i, stage_channels in enumerate(channels):
            width = int(stage_channels * base_width / 64) * cardinality
            reduction, steps = plan[i]
            blocks = []
            for j, (stride, dilation, rate) in enumerate(steps):
                block = Bottleneck(
                    dim,
                    width,
                    4 * stage_channels,
                    radix,
                    cardinality,
                    stride=stride if i else 1,
                    dilation=dilation,
                    first=j == 0,
                    pool=i > 0 and j == 0,
                    pool_first=avd_first,
                    drop_path=rate,
                    **dd,
                )
                blocks.append(block)
                dim = 4 * stage_channels
            self.stages.append(layers.Stage(nn.Identity() if i else nn.MaxPool2d(3, 2, padding=1), blocks))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self._build_head(drop_rate, out_norm, **dd, norm=nn.Identity())

    def init_weights(self, needs_reset: bool = True) -> None:
        """He initialisation by fan-out for convolutions; other modules, and biases, as they reset themselves."""
        for module in self.modules():
            if needs_reset:
                layers.reset_parameters(module)
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if self.zero_init_last:
            for module in self.modules():
                if isinstance(module, Bottleneck):
                    nn.init.zeros_(module.bn3.weight)


_URL = "https://github.com/zhanghang1989/ResNeSt/releases/download/weights_step1"
_cfg = partial(
    imagenet_cfg,
    url="",
    interpolation="bilinear",
    first_conv="patch_embed.conv1",
    license="apache-2.0",
    origin_url="https://github.com/zhanghang1989/ResNeSt",
    paper_ids="arXiv:2004.08955",
)


def _in1k(file: str, **kwargs: Any) -> dict[str, dict[str, Any]]:
    return {"in1k": _cfg(url=f"{_URL}/{file}.pth", **kwargs)}


_BICUBIC = {"interpolation": "bicubic"}
# Radix, cardinality and width of a group: the variant is called after them. Endings of the authors' files.
_FAST = {
    (1, 1, 64): "d8fbf808",
    (2, 1, 64): "44938639",
    (4, 1, 64): "f74f3fc3",
    (1, 2, 40): "32830b84",
    (2, 2, 40): "9d126481",
    (4, 2, 40): "41d14ed0",
    (1, 4, 24): "d4a4f76f",
}
_TEST = {
    "depths": (1, 1, 2, 2),
    "channels": (16, 24, 32, 40),
    "stem_width": 8,
    "cardinality": 2,
    "zero_init_last": False,
}

VARIANTS: dict[str, Variant] = {
    "resnest14_va": Variant({"depths": (1, 1, 1, 1)}, {"gluon_in1k": _cfg(hf_hub_id="timm/resnest14d.gluon_in1k")}),
    "resnest26_va": Variant({"depths": (2, 2, 2, 2)}, {"gluon_in1k": _cfg(hf_hub_id="timm/resnest26d.gluon_in1k")}),
    "resnest50_va": Variant({}, _in1k("resnest50-528c19ca")),
    "resnest101_va": Variant({"depths": (3, 4, 23, 3), "stem_width": 64}, _in1k("resnest101-22405ba7", size=256)),
    "resnest200_va": Variant(
        {"depths": (3, 24, 36, 3), "stem_width": 64},
        _in1k("resnest200-75117900", size=320, crop_pct=0.909, **_BICUBIC),
    ),
    "resnest269_va": Variant(
        {"depths": (3, 30, 48, 8), "stem_width": 64},
        _in1k("resnest269-0cc87c48", size=416, crop_pct=0.928, **_BICUBIC),
    ),
    "test_resnest_va": Variant(
        _TEST,
        {"untrained": _cfg(160)},
        doc="Under 1M parameters; two cardinal groups, and residual branches that contribute from the start.",
    ),
}
for (_radix, _cardinality, _width), _hash in _FAST.items():
    _name = f"resnest50_fast_{_radix}s{_cardinality}x{_width}d"
    VARIANTS[f"{_name}_va"] = Variant(
        {"radix": _radix, "cardinality": _cardinality, "base_width": _width, "avd_first": True},
        _in1k(f"{_name}-{_hash}", **_BICUBIC),
    )


# Official stem: convolutions conv1.{0,3,6}, norms conv1.{1,4} and bn1.
_STEM = {"conv1.0": "conv1", "conv1.1": "bn1", "conv1.3": "conv2", "conv1.4": "bn2", "conv1.6": "conv3", "bn1": "bn3"}


def _rename(key: str) -> str:
    key = re.sub(r"^(conv1\.\d|bn1)\.", lambda m: f"patch_embed.{_STEM[m[1]]}.", key)
    key = re.sub(r"^layer(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", key)
    return re.sub(r"^fc\.", "head.fc.", key)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename official keys, which are timm's too; native keys pass unchanged."""
    return convert_checkpoint(state_dict, model, lambda key, value: (_rename(key), value))


def _create_resnest(variant: str, pretrained: bool = False, **kwargs: Any) -> ResNeSt:
    return build_model(ResNeSt, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3, 4), **kwargs)


register_variants(__name__, VARIANTS, _create_resnest)
