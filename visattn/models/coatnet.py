"""CoAtNet: MBConv stages, then transformer stages with relative attention over the whole map.

Paper: CoAtNet: Marrying Convolution and Attention for All Data Sizes (NeurIPS 2021, arXiv:2106.04803). The authors
published neither code nor weights. PyTorch weights: timm's own networks of the family (`coatnet_*_rw_va`, Apache-2.0).

What the paper leaves open, and what is taken here:
    * From google-research/maxvit (Apache-2.0), the authors' later code: the epsilons and BatchNorm's momentum, squeeze
      and excitation to 0.25 of the output width. An attention that changes the width works in the new one.
    * LayerNorm of the last map before the global pooling, as networks of pre-norm blocks need it, then the classifier.
      The published parameter counts are met more closely with one more linear layer, as MaxViT's head has
      (`head_hidden_size` the last width); the paper mentions none.
    * CoAtNet-6: with the printed width of 2048 in the last stage it has 1.34 B parameters, against the 1.47 B of the
      same table; a width of 3072 gives 1.46 B. The printed width is the default.

What differs, and why:
    * Any image size: the position table of the checkpoint stays the parameter and is resized, bilinear as in the
      paper's fine-tuning, to the map at hand. Odd maps are rounded up in every branch. timm's networks have one size.
    * `output_stride` 16 and 8, for dense prediction.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm2d, NormMlpClassifierHead, to_2tuple
from torch import Tensor, nn

from visattn import layers
from visattn.models._backbone import Backbone, convert_checkpoint, plan_stages, unwrap
from visattn.models._build import NCHW_POOLS, NORM_MLP_POOLS, build_model
from visattn.models._variants import Variant, imagenet_cfg, register_variants
from visattn.ops.geometry import ceil_div

__all__ = ["CoAtNet"]

# B batch, H W map, C channels. Maps between blocks are [B, C, H, W], channels-last in memory: permuting costs nothing.

_NORMS = {"layer": LayerNorm2d, "batch": nn.BatchNorm2d}


def resolve_blocks(
    depths: Sequence[int | Sequence[int]],
    block_types: Sequence[str | Sequence[str]],
    embed_dims: Sequence[int | Sequence[int]],
) -> list[list[tuple[str, int]]]:
    """Kind ("C" or "T") and width of every block of every stage.

    Args:
        depths: Blocks per stage; where a stage has parts, a sequence with the blocks of each part.
        block_types: "C" or "T" per stage or part.
        embed_dims: Channels per stage or part.

    Raises:
        ValueError: Another kind, or arguments of different lengths.
    """
    stages = []
    try:
        for stage in zip(depths, block_types, embed_dims, strict=True):
            parts = zip(*((x,) if isinstance(x, (int, str)) else x for x in stage), strict=True)
            stages.append([(kind, dim) for depth, kind, dim in parts for _ in range(depth)])
    except ValueError as error:
        raise ValueError(
            "expected depths, block_types and embed_dims with equally many stages and parts, got "
            f"{depths}, {block_types} and {embed_dims}"
        ) from error
    kinds = {kind for stage in stages for kind, _ in stage}
    if not kinds <= {"C", "T"} or not all(stages):
        raise ValueError(f"expected block_types 'C' and 'T' and a block in every stage, got {block_types}, {depths}")
    return stages


class CoAtNet(Backbone):
    """CoAtNet.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: Pooling before the classifier; "" leaves it out.
        img_size: Image size that the position tables are learned for. Images of any other size run as well.
        stem_width: Channels of both convolutions of the stem, or of each.
        embed_dims: Channels of each stage; of each part where a stage has several, as ((768, 1536)).
        depths: Blocks of each stage, or part. The first block of a stage halves the map.
        block_types: "C" (MBConv) or "T" (transformer) of each stage, or part.
        head_dim: Channels of each head.
        stride_mode: Where the main branch of an MBConv strides: "conv1", the first 1x1 convolution (the paper's
            default), "dw", the depthwise convolution (the paper's "strided DConv"), or "pool".
        pool: Pooling where a stage begins, in the shortcut of an MBConv and in both branches of a transformer block:
            "max2" (the paper's), "avg2", "max3" or "avg3", see `layers.create_pool`.
        act: Activation of the convolutional part, as in timm.
        bn_eps: Epsilon of the convolutional part's BatchNorm.
        bn_momentum: Momentum of the convolutional part's BatchNorm.
        conv_options: Other options of `layers.MBConv`, such as {"pre_act": True}.
        expand_first: An attention that changes the width works in the new one; False: in the old one, and its output
            projection expands.
        shortcut_bias: Bias of the linear shortcuts of transformer blocks.
        norm: "layer" or "batch", the norm of the transformer part and of the last map.
        norm_eps: Its epsilon.
        layer_scale: Initial value of the transformer blocks' layer scale; None leaves it out.
        rel_pos_dim: Compute the position tables by an MLP of this hidden width; None: learn them.
        head_hidden_size: Width of a linear layer and tanh before the classifier, as in MaxViT; None leaves them out.
            With it the norm comes after the pooling.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after attention and MLP projections.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        out_norm: "layer" or "batch" normalises every feature map that `features_only` returns; None returns them as
            they are.
        output_stride: 32, 16 or 8. Stages beyond it keep their map: their first blocks neither stride nor pool, and
            the depthwise convolutions after a stride left out are dilated.

    Raises:
        ValueError: Names, lengths, heads or `output_stride` that do not fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        stem_width: int | tuple[int, int] = 64,
        embed_dims: Sequence[int | Sequence[int]] = (96, 192, 384, 768),
        depths: Sequence[int | Sequence[int]] = (2, 3, 5, 2),
        block_types: Sequence[str | Sequence[str]] = ("C", "C", "T", "T"),
        head_dim: int = 32,
        stride_mode: str = "conv1",
        pool: str = "max2",
        act: str = "gelu",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.01,
        conv_options: Mapping[str, Any] | None = None,
        expand_first: bool = True,
        shortcut_bias: bool = True,
        norm: str = "layer",
        norm_eps: float = 1e-5,
        layer_scale: float | None = None,
        rel_pos_dim: int | None = None,
        head_hidden_size: int | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: str | None = None,
        output_stride: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        pools = NCHW_POOLS if head_hidden_size is None else NORM_MLP_POOLS
        super().__init__(in_chans, num_classes, global_pool, "NCHW", pools)
        if norm not in _NORMS:
            raise ValueError(f"expected norm 'layer' or 'batch', got {norm!r}")
        dd = {"device": device, "dtype": dtype}
        self.head_dim, self.expand_first, self.rel_pos_dim = head_dim, expand_first, rel_pos_dim
        norm_layer = partial(_NORMS[norm], eps=norm_eps)
        options: dict[str, Any]
        conv_args: dict[str, Any] = {"act": act, "norm_eps": bn_eps, "norm_momentum": bn_momentum, **dd}
        block_args = {"norm_layer": norm_layer, "layer_scale": layer_scale, "shortcut_bias": shortcut_bias, **dd}

        self.patch_embed = layers.ConvStem(in_chans, stem_width, **conv_args)
        dim = to_2tuple(stem_width)[1]
        self.feature_info.append({"num_chs": dim, "reduction": 2, "module": "patch_embed"})
        stages = resolve_blocks(depths, block_types, embed_dims)
        plan = plan_stages([len(stage) for stage in stages], output_stride, drop_path_rate)
        self.stages = nn.Sequential()
        for i, (stage, (reduction, steps)) in enumerate(zip(stages, plan, strict=True)):
            height, width = (ceil_div(size, 2 ** (i + 2)) for size in to_2tuple(img_size))
            blocks: list[nn.Module] = []
            for (kind, out_dim), (stride, dilation, rate) in zip(stage, steps, strict=True):
                if kind == "C":
                    options = {"stride_mode": stride_mode, "pool": pool, **(conv_options or {}), **conv_args}
                    block = layers.MBConv(dim, out_dim, stride, dilation, drop_path=rate, **options)
                else:
                    attn = self._attention(dim, out_dim, (height, width), proj_drop_rate, **dd)
                    down = layers.create_pool(pool) if stride == 2 else None
                    block = layers.PooledTransformerBlock(
                        dim, out_dim, attn, down, proj_drop=proj_drop_rate, drop_path=rate, **block_args
                    )
                blocks.append(block)
                dim = out_dim
            self.stages.append(layers.Stage(nn.Identity(), blocks))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        if head_hidden_size is None:
            self._build_head(drop_rate, out_norm, **dd, norm=norm_layer(dim, **dd))
        else:
            head = NormMlpClassifierHead(dim, num_classes, head_hidden_size, global_pool, drop_rate, norm_layer, **dd)
            self._build_head(drop_rate, out_norm, **dd, norm=nn.Identity(), head=head)

    def _attention(self, dim: int, out_dim: int, feat_size: tuple[int, int], proj_drop: float, **dd: Any) -> nn.Module:
        attn_dim = out_dim if self.expand_first else dim
        num_heads = attn_dim // self.head_dim
        rel_pos = None if self.rel_pos_dim is None else layers.LogRelPos(num_heads, self.rel_pos_dim, **dd)
        return layers.GlobalAttention(
            dim,
            num_heads,
            feat_size,
            proj_drop=proj_drop,
            attn_dim=attn_dim,
            out_dim=out_dim,
            resize="bilinear",
            rel_pos=rel_pos,
            **dd,
        )

    def init_weights(self, needs_reset: bool = True) -> None:
        """Truncated normal (std 0.02) for linear weights, normal by fan-out for convolutions (as EfficientNet)."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Patterns of parameters that weight decay leaves alone."""
        return {"*.rpb", "*.rel_pos.*"}


_cfg = partial(
    imagenet_cfg,
    url="",
    first_conv="patch_embed.conv1",
    license="apache-2.0",
    origin_url="https://arxiv.org/abs/2106.04803",
    paper_ids="arXiv:2106.04803",
)
_HALF = (0.5, 0.5, 0.5)


def _timm(name: str, **tags: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Weights of timm's `coatnet_{name}_{size}` by tag, each with what its configuration has of its own."""
    shared: dict[str, Any] = {
        "crop_pct": 0.95,
        "mean": _HALF,
        "std": _HALF,
        "origin_url": "https://github.com/huggingface/pytorch-image-models",
    }
    cfgs = {}
    for tag, cfg in tags.items():
        size = cfg.get("size", 224)
        hub = f"timm/coatnet_{name}_{size}.{tag.replace(f'_{size}', '')}"
        given: dict[str, Any] = {"hf_hub_id": hub, **shared, **cfg}
        cfgs[tag] = _cfg(**given)
    return cfgs


_IN12K = {"num_classes": 11821}
_SIZE_384 = {"size": 384, "crop_pct": 1.0, "crop_mode": "squash"}

# timm's coatnet_{0,1,2,...}_224, with head_hidden_size the width of the last stage.
TIMM_OPTIONS = {"stride_mode": "dw", "pool": "avg2", "bn_eps": 1e-5, "bn_momentum": 0.1, "norm_eps": 1e-6}


def _rw(stride_mode: str, conv_options: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """timm's `rw` networks: expansion of the input's width, SiLU, attention in the input's width."""
    conv_options = {"expand_input": True, **conv_options}
    shape = {"stem_width": (32, 64), "act": "silu", "expand_first": False}
    return {**TIMM_OPTIONS, **shape, "stride_mode": stride_mode, "conv_options": conv_options, **kwargs}


_2 = {"stem_width": 128, "embed_dims": (128, 256, 512, 1024), "depths": (2, 6, 14, 2), "drop_path_rate": 0.5}
_3 = {**_2, "stem_width": 192, "embed_dims": (192, 384, 768, 1536), "drop_path_rate": 0.7}
_4 = {**_3, "depths": (2, 12, 28, 2)}
_SPLIT = {"stem_width": 192, "depths": (2, 4, (8, 42), 2), "block_types": ("C", "C", ("C", "T"), "T"), "head_dim": 128}
_PAPER = (
    {"drop_path_rate": 0.2},
    {"depths": (2, 6, 14, 2), "drop_path_rate": 0.3},
    _2,
    _3,
    _4,
    {**_4, "embed_dims": (256, 512, 1280, 2048), "head_dim": 64},
    {**_SPLIT, "embed_dims": (192, 384, (768, 1536), 2048)},
    {**_SPLIT, "embed_dims": (256, 512, (1024, 2048), 3072)},
)

_NANO = {"embed_dims": (64, 128, 256, 512), "depths": (3, 4, 6, 3)}
_RW_0 = {"depths": (2, 3, 7, 2)}
_RW_1 = {"depths": (2, 6, 14, 2)}
_RW_2 = {**_RW_1, "embed_dims": (128, 256, 512, 1024), "stem_width": (64, 128)}
_RW_3 = {**_RW_1, "embed_dims": (192, 384, 768, 1536), "stem_width": (96, 192)}
_SILU = {"pre_act": True, "bias": False}
_RELU = {**_SILU, "se_act": "relu"}
_EARLY = {**_RELU, "se_early": True}
_TEST = {
    "img_size": 160,
    "stem_width": 16,
    "embed_dims": (16, 32, (48, 64), 96),
    "depths": (1, 1, (1, 2), 1),
    "block_types": ("C", "C", ("C", "T"), "T"),
    "head_dim": 16,
}

VARIANTS: dict[str, Variant] = {
    **{f"coatnet_{i}_va": Variant(args, {"untrained": _cfg()}) for i, args in enumerate(_PAPER)},
    "coatnet_nano_rw_va": Variant(_rw("pool", {}, **_NANO), _timm("nano_rw", sw_in1k={"crop_pct": 0.9})),
    "coatnet_0_rw_va": Variant(_rw("pool", _EARLY, shortcut_bias=False, **_RW_0), _timm("0_rw", sw_in1k={})),
    "coatnet_1_rw_va": Variant(_rw("dw", _EARLY, shortcut_bias=False, **_RW_1), _timm("1_rw", sw_in1k={})),
    "coatnet_2_rw_va": Variant(_rw("dw", _SILU, **_RW_2), _timm("2_rw", sw_in12k_ft_in1k={}, sw_in12k=_IN12K)),
    "coatnet_3_rw_va": Variant(_rw("dw", _SILU, layer_scale=1e-6, **_RW_3), _timm("3_rw", sw_in12k=_IN12K)),
    "coatnet_bn_0_rw_va": Variant(
        _rw("dw", _EARLY, shortcut_bias=False, norm="batch", **_RW_0),
        _timm("bn_0_rw", sw_in1k={"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}),
    ),
    "coatnet_rmlp_nano_rw_va": Variant(
        _rw("dw", {}, rel_pos_dim=384, **_NANO), _timm("rmlp_nano_rw", sw_in1k={"crop_pct": 0.9})
    ),
    "coatnet_rmlp_1_rw_va": Variant(
        _rw("pool", _EARLY, pool="max3", shortcut_bias=False, rel_pos_dim=384, **_RW_1), _timm("rmlp_1_rw", sw_in1k={})
    ),
    "coatnet_rmlp_1_rw2_va": Variant(
        _rw("dw", _RELU, rel_pos_dim=512, **_RW_1), _timm("rmlp_1_rw2", sw_in12k_ft_in1k={}, sw_in12k=_IN12K)
    ),
    "coatnet_rmlp_2_rw_va": Variant(
        _rw("dw", _SILU, layer_scale=1e-6, rel_pos_dim=512, **_RW_2),
        _timm("rmlp_2_rw", sw_in12k_ft_in1k={}, sw_384_in12k_ft_in1k=_SIZE_384, sw_in1k={}, sw_in12k=_IN12K),
    ),
    "test_coatnet_va": Variant(
        _TEST, {"untrained": _cfg(160)}, doc="Under 1M parameters, with a stage of both kinds of blocks, for tests."
    ),
}


_RENAMED = {
    r"^stem\.": "patch_embed.",
    r"\.conv1_1x1\.": ".conv1.",
    r"\.conv2_kxk\.": ".conv2.",
    r"\.conv3_1x1\.": ".conv3.",
    r"\.norm1\.norm\.": ".norm1.",
    r"\.rel_pos\.relative_position_bias_table$": ".rpb",
}


def _from_timm(key: str, value: Tensor, own: dict[str, Tensor], head_dim: int) -> tuple[str, Tensor]:
    """Key and value of timm's MaxxVit in our layouts."""
    if ".shortcut.expand." in key:
        ours = key.replace(".shortcut.expand.", ".shortcut.proj.")
        key = ours if ours in own else key.replace(".shortcut.expand.", ".shortcut.")
    for pattern, name in _RENAMED.items():
        key = re.sub(pattern, name, key)
    if key.endswith(".rpb"):  # [(2H-1)(2W-1), N] by query - key
        size = own[key].shape[1:] if key in own and len(value) == own[key][0].numel() else [math.isqrt(len(value))] * 2
        value = value.T.reshape(-1, *size).flip(1, 2)  # [N, 2H-1, 2W-1]
    elif ".attn.qkv." in key:  # rows [N, 3, head_dim]
        value = value.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(0, 2)  # [3 * N * head_dim, ...]
    if key in own and value.ndim == 4 and own[key].ndim == 2:
        value = value.flatten(1)
    return key, value


def checkpoint_filter_fn(state_dict: dict[str, Any], model: CoAtNet) -> dict[str, Tensor]:
    """Bring timm's keys and layouts into ours and fit position tables to the model; native keys pass unchanged."""
    own = model.state_dict()
    is_timm = any(key.startswith("stem.") for key in unwrap(state_dict))

    def convert(key: str, value: Tensor) -> tuple[str, Tensor]:
        return _from_timm(key, value, own, model.head_dim) if is_timm else (key, value)

    return convert_checkpoint(state_dict, model, convert, "bilinear")


def _create_coatnet(variant: str, pretrained: bool = False, **kwargs: Any) -> CoAtNet:
    return build_model(CoAtNet, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3, 4), **kwargs)


register_variants(__name__, VARIANTS, _create_coatnet)
