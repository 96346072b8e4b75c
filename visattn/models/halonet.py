"""HaloNet: residual networks whose 3x3 convolutions are blocked local self-attention.

Paper: Scaling Local Self-Attention for Parameter Efficient Visual Backbones (CVPR 2021, arXiv:2103.12731). Its authors
published neither code nor weights. `halonet26t_va` and `halonet50ts_va` are timm's hybrids (Apache-2.0) and load timm's
trained weights.

What differs from timm's `halonet*`, and why:
    * The paper's H0 to H7 are complete: heads 4, 8, 8, 8, wider values (`value_ratio`), the last 1x1 convolution
      (`final_dim`), a projected shortcut in every stage, and keys outside the map left out (`mask_border`). This is the
      reading whose parameter counts equal the paper's (recalled: its table was not at hand).
    * Any image size: a block at the right or bottom border may be cut short; timm takes multiples of 256.
    * The last feature level is the last stage's map, before the final convolution.
    * Relative position tables are kept out of weight decay.

The paper's transfer models, H4 of base width 128 and the same with 3x3 convolutions in the first two stages, are
published with 85M and 87M parameters. H4's settings give 68.4M and 69.9M; what else was changed is not known, so the
variants here have H4's settings.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from visattn import layers
from visattn.models._backbone import Backbone, convert_checkpoint, plan_stages
from visattn.models._build import build_model
from visattn.models._variants import Variant, imagenet_cfg, register_variants
from visattn.ops.geometry import ceil_div

__all__ = ["HaloNet"]

# B batch, C channels, H W map; maps are [B, C, H, W].


class Stem(nn.Module):
    """One 7x7 convolution or three 3x3 ones, with batch norm: [B, in_chans, H, W] -> [B, dim, H/2, W/2], rounded up.

    Args:
        in_chans: Channels of the image.
        dim: Channels of the output.
        tiered: Three convolutions, to 3/8, 1/2 and all of the channels.
        act_layer: Activation, a name that timm knows.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        tiered: bool,
        act_layer: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        how = {"act": act_layer, "device": device, "dtype": dtype}
        if tiered:
            self.conv1 = layers.ConvNorm(in_chans, 3 * dim // 8, 3, stride=2, **how)
            self.conv2 = layers.ConvNorm(3 * dim // 8, dim // 2, 3, **how)
            self.conv3 = layers.ConvNorm(dim // 2, dim, 3, **how)
        else:
            self.conv1 = layers.ConvNorm(in_chans, dim, 7, stride=2, **how)
            self.conv2 = nn.Identity()
            self.conv3 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # channels-last in memory from here on, as attention wants it
        return self.conv3(self.conv2(self.conv1(x.contiguous(memory_format=torch.channels_last))))


class Bottleneck(nn.Module):
    """act(shortcut(x) + branch(x)), the branch: 1x1 convolution, `mixer`, 1x1 convolution, each with batch norm.

    Shapes: [B, in_dim, H, W] -> [B, out_dim, ceil(H / stride), ceil(W / stride)].

    Args:
        in_dim: Channels of the input.
        mixer: Attention or convolution, `dim` to `mixed_dim` channels; it holds the stride.
        dim: Channels before the mixer.
        mixed_dim: Channels after it.
        out_dim: Channels of the output.
        act_layer: Activation, a name that timm knows.
        project: Shortcut by a 1x1 convolution of stride `stride`; False: `x` itself.
        stride: Stride of the mixer.
        drop_path: Probability of dropping the branch, per sample.
    """

    def __init__(
        self,
        in_dim: int,
        mixer: nn.Module,
        dim: int,
        mixed_dim: int,
        out_dim: int,
        act_layer: str,
        project: bool,
        stride: int,
        drop_path: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.shortcut = layers.ConvNorm(in_dim, out_dim, 1, stride, **dd) if project else nn.Identity()
        self.conv1 = layers.ConvNorm(in_dim, dim, act=act_layer, **dd)
        self.mixer = mixer
        self.norm = nn.BatchNorm2d(mixed_dim, **dd)
        self.conv3 = layers.ConvNorm(mixed_dim, out_dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.act = layers.create_act(act_layer)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv3(self.act(self.norm(self.mixer(self.conv1(x)))))
        return self.act(self.drop_path(branch) + self.shortcut(x))


class HaloNet(Backbone):
    """HaloNet and its hybrids with convolutions.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: Pooling before the classifier; "" leaves it out.
        blocks: One string per stage, one letter per block: "a" halo attention, "c" 3x3 convolution.
        tiered_stem: Three 3x3 convolutions before the max pooling; False: one 7x7.
        base_dim: Channels of the stem and inside the blocks of the first stage; each later stage has twice as many.
        out_ratio: Channels of a block's output over the channels inside (the paper's r_b).
        value_ratio: Channels of the values over the channels inside (r_v).
        final_dim: Channels of a last 1x1 convolution (d_f); None leaves it out.
        num_heads: Heads per stage.
        block_size: Keys of a block per axis (b).
        halo_size: Keys around it on each side (h).
        mask_border: Keys outside the map take no part (the paper); False: they do, with zero key and value (timm).
        project_first: Shortcut by a convolution in every stage's first block, also where the shape stays (the paper).
        act_layer: Activation, a name that timm knows.
        zero_init_last: Start with a zero scale in the last norm of every branch.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        out_norm: "layer" or "batch" normalises every feature map that `features_only` returns; None returns them as
            they are.
        img_size: No effect, as for timm's models of any input size; accepted so that callers may always give it.
        output_stride: 32, 16 or 8. Below 32 the last stages have no stride; their convolutions are dilated instead, as
            in timm, and attention stays as it is.

    Raises:
        ValueError: Blocks, heads or output stride that do not fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        blocks: Sequence[str] = ("aaa", "aaa", "aaaaaaaaaa", "aaa"),
        tiered_stem: bool = False,
        base_dim: int = 64,
        out_ratio: float = 1.0,
        value_ratio: float = 1.0,
        final_dim: int | None = None,
        num_heads: Sequence[int] = (4, 8, 8, 8),
        block_size: int = 8,
        halo_size: int = 3,
        mask_border: bool = True,
        project_first: bool = True,
        act_layer: str = "relu",
        zero_init_last: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: str | None = None,
        img_size: int | tuple[int, int] | None = None,
        output_stride: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, num_classes, global_pool, output_fmt="NCHW")
        if len(blocks) != len(num_heads) or not all(blocks) or set("".join(blocks)) - {"a", "c"}:
            raise ValueError(
                f"expected blocks as one string of 'a' and 'c' for each of the {len(num_heads)} entries of num_heads, "
                f"got {tuple(blocks)}; try ('ccc', 'aaa', 'aaaa', 'aaa')"
            )
        plan = plan_stages([len(letters) for letters in blocks], output_stride, drop_path_rate)
        dd = {"device": device, "dtype": dtype}
        self.zero_init_last = zero_init_last

        self.patch_embed = Stem(in_chans, base_dim, tiered_stem, act_layer, **dd)
        self.feature_info.append({"num_chs": base_dim, "reduction": 2, "module": "patch_embed"})
        in_dim = base_dim
        self.stages = nn.Sequential()
        for i, letters in enumerate(blocks):
            dim = base_dim * 2**i
            value_dim, out_dim = int(dim * value_ratio), int(dim * out_ratio)
            reduction, steps = plan[i]
            stage = []
            for j, (letter, (step, dilation, rate)) in enumerate(zip(letters, steps, strict=True)):
                step = step if i else 1  # the first stage begins with the stem's pooling
                if letter == "a":
                    mixed_dim = value_dim
                    mixer = layers.HaloAttention(
                        dim, value_dim, num_heads[i], None, block_size, halo_size, step, mask_border, **dd
                    )
                else:
                    mixed_dim = dim
                    mixer = nn.Conv2d(dim, dim, 3, step, padding=dilation, dilation=dilation, bias=False, **dd)
                project = j == 0 and (project_first or i > 0 or in_dim != out_dim)
                stage.append(Bottleneck(in_dim, mixer, dim, mixed_dim, out_dim, act_layer, project, step, rate, **dd))
                in_dim = out_dim
            # the stem's map is a feature level of its own, so its pooling belongs to the first stage
            self.stages.append(layers.Stage(nn.Identity() if i else nn.MaxPool2d(3, stride=2, padding=1), stage))
            self.feature_info.append({"num_chs": in_dim, "reduction": reduction, "module": f"stages.{i}"})

        norm = nn.Identity()
        if final_dim is not None:
            norm = layers.ConvNorm(in_dim, final_dim, act=act_layer, **dd)
        self._build_head(drop_rate, out_norm, **dd, norm=norm, num_features=final_dim)

    def init_weights(self, needs_reset: bool = True) -> None:
        """He initialisation of the convolutions, as timm; attention as its module does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
            elif needs_reset:
                layers.reset_parameters(module)
        for module in self.modules():
            if isinstance(module, layers.HaloAttention):
                module.reset_parameters()
            elif isinstance(module, Bottleneck) and self.zero_init_last:
                nn.init.zeros_(module.conv3.bn.weight)

    def no_weight_decay(self) -> set[str]:
        """Patterns of parameters that weight decay leaves alone."""
        return {"*.rel_h", "*.rel_w"}


def _cfg(size: int = 256, **kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        size,
        **{
            "url": "",
            "pool_size": (ceil_div(size, 32), ceil_div(size, 32)),
            "first_conv": "patch_embed.conv1.conv",
            "license": "apache-2.0",
            "paper_ids": "arXiv:2103.12731",
            **kwargs,
        },
    )


def _timm(name: str, crop_pct: float) -> dict[str, dict[str, Any]]:
    origin = "https://github.com/huggingface/pytorch-image-models"
    return {"a1h_in1k": _cfg(hf_hub_id=f"timm/{name}.a1h_in1k", crop_pct=crop_pct, origin_url=origin)}


def _paper(depth: int, b: int, h: int, rv: float, rb: float, df: int | None = None) -> dict[str, Any]:
    """A row of the paper's table: blocks of the third stage, b, h, r_v, r_b and d_f."""
    blocks = ("aaa", "aaa", "a" * depth, "aaa")
    return {
        "blocks": blocks,
        "block_size": b,
        "halo_size": h,
        "value_ratio": rv,
        "out_ratio": rb,
        "final_dim": df,
    }


_H4 = _paper(12, 12, 2, 1.0, 3.0, 1280)
# timm's hybrids: a deep stem, a ResNet's widths, attention in the later stages
_TIMM_HYBRID = {"tiered_stem": True, "out_ratio": 4.0, "mask_border": False}
_TEST = {
    "blocks": ("c", "ca", "aa", "a"),
    "base_dim": 16,
    "out_ratio": 2.0,
    "value_ratio": 1.5,
    "final_dim": 96,
    "num_heads": (1, 2, 4, 4),
    "block_size": 4,
    "halo_size": 1,
    "zero_init_last": False,
}

VARIANTS: dict[str, Variant] = {
    "halonet_h0_va": Variant(_paper(7, 8, 3, 1.0, 0.5), {"untrained": _cfg()}),
    "halonet_h1_va": Variant(
        _paper(10, 8, 3, 1.0, 1.0),
        {"untrained": _cfg()},
        doc="timm's halonet_h1: `num_heads=(8, 8, 8, 8), mask_border=False, project_first=False`.",
    ),
    "halonet_h2_va": Variant(_paper(11, 8, 3, 1.0, 1.25), {"untrained": _cfg()}),
    "halonet_h3_va": Variant(_paper(12, 10, 3, 1.0, 1.5, 1024), {"untrained": _cfg(320)}),
    "halonet_h4_va": Variant(_H4, {"untrained": _cfg(384)}),
    "halonet_h4_base128_va": Variant(
        {**_H4, "base_dim": 128},
        {"untrained": _cfg(384)},
        doc="H4 of base width 128: 68.4M parameters by H4's settings, published with 85M.",
    ),
    "halonet_h4_base128_conv12_va": Variant(
        {**_H4, "base_dim": 128, "blocks": ("ccc", "ccc", "a" * 12, "aaa")},
        {"untrained": _cfg(384)},
        doc="With 3x3 convolutions in stages 1 and 2: 69.9M parameters by H4's settings, published with 87M.",
    ),
    "halonet_h5_va": Variant(_paper(23, 14, 2, 2.5, 2.0, 1536), {"untrained": _cfg(448)}),
    "halonet_h6_va": Variant(_paper(24, 8, 4, 3.0, 2.75, 1536), {"untrained": _cfg(512)}),
    "halonet_h7_va": Variant(_paper(26, 10, 3, 4.0, 3.5, 2048), {"untrained": _cfg(600)}),
    "halonet26t_va": Variant(
        {**_TIMM_HYBRID, "blocks": ("cc", "cc", "ca", "aa"), "halo_size": 2},
        _timm("halonet26t", 0.95),
        doc="timm's halonet26t: ResNet-26-T, three of its last four blocks with attention.",
    ),
    "halonet50ts_va": Variant(
        {**_TIMM_HYBRID, "blocks": ("ccc", "ccca", "cacaca", "cac"), "num_heads": (4, 4, 8, 8), "act_layer": "silu"},
        _timm("halonet50ts", 0.94),
        doc="timm's halonet50ts: ResNet-50-T with SiLU, attention in five of the last thirteen blocks.",
    ),
    "test_halonet_va": Variant(
        _TEST,
        {"untrained": _cfg(160)},
        doc="Under 1M parameters; both kinds of block, wide values and the final convolution, for tests.",
    ),
}


_RENAMED = {
    "conv1_1x1": "conv1",
    "conv2_kxk.conv": "mixer",
    "conv2_kxk.bn": "norm",
    "self_attn.kv": "mixer.kv_per_head",
    "self_attn.pos_embed.height_rel": "mixer.rel_h",
    "self_attn.pos_embed.width_rel": "mixer.rel_w",
    "self_attn": "mixer",
    "post_attn": "norm",
    "conv3_1x1": "conv3",
}


def _rename(key: str) -> str:
    if key.startswith("stem."):
        return "patch_embed." + key.removeprefix("stem.")
    if not re.match(r"stages\.\d+\.\d+\.", key):
        return key
    key = re.sub(r"^stages\.(\d+)\.", r"stages.\1.blocks.", key)
    return re.sub(r"(?<=\.)(" + "|".join(map(re.escape, _RENAMED)) + r")(?=\.|$)", lambda m: _RENAMED[m[1]], key)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename timm's keys and sort its keys and values, which alternate head by head; native keys pass unchanged."""
    converted = convert_checkpoint(state_dict, model, lambda key, value: (_rename(key), value))
    for name in [name for name in converted if name.endswith(".kv_per_head.weight")]:
        attn: Any = model.get_submodule(name.removesuffix(".kv_per_head.weight"))
        weight = converted.pop(name).unflatten(0, (attn.num_heads, -1))
        k, v = weight.split([width // attn.num_heads for width in attn.kv_split], dim=1)
        converted[name.replace(".kv_per_head", ".kv")] = torch.cat([k.flatten(0, 1), v.flatten(0, 1)])
    return converted


def _create_halonet(variant: str, pretrained: bool = False, **kwargs: Any) -> HaloNet:
    return build_model(HaloNet, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3, 4), **kwargs)


register_variants(__name__, VARIANTS, _create_halonet)
