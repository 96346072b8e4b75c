"""BiFormer: Vision Transformer with Bi-Level Routing Attention.

Paper: BiFormer: Vision Transformer with Bi-Level Routing Attention (CVPR 2023, arXiv:2303.08810). Official code:
https://github.com/rayleizhu/BiFormer (MIT).

What differs from the official code, and why:
    * Any image size: official models take multiples of 112 only, or pad with tokens that become keys (`auto_pad`). Here
      border regions are cut short by default (`padding="mask"`); the official rules are `padding="project"` and, for
      the STL model in channels-first layout, `padding="zero"`. All agree where regions divide the map.
    * `topks` larger than the number of regions mean all regions, where the official code fails.
    * Blocks work channels-last; 1x1 convolutions of the official models are linear layers. Names are this package's;
      `checkpoint_filter_fn` renames official keys.
    * The swin layout pads maps smaller than a patch or a merge. Otherwise its convolutions drop what is left over of
      ragged maps, as the official ones do.
    * Only what runs in the official code is there: not its `pe` and `representation_size`, which fail, nor hard
      differentiable routing and the pooling modes that raise `NotImplementedError`.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visattn import layers
from visattn.models._backbone import Backbone, TellsAttended, convert_checkpoint, drop_path_rates, plan_strides
from visattn.models._build import build_model
from visattn.models._variants import Variant, imagenet_cfg, register_variants

__all__ = ["BiFormer"]

# B batch, H W map, C channels. Maps between blocks are [B, C, H, W], channels-last in memory: permuting costs nothing.

# Regions per axis, of the official configurations of each task.
N_WIN_PRESETS = {"classification": 7, "detection": 16, "segmentation": 8}


def resolve_n_win(n_win: int | str | Sequence[int], stages: int) -> list[int]:
    """Regions per axis of every stage.

    Args:
        n_win: A name in `N_WIN_PRESETS`, one int, or one per stage.
        stages: Number of stages.

    Raises:
        ValueError: An unknown name, or ints that do not fit.
    """
    if isinstance(n_win, str):
        if n_win not in N_WIN_PRESETS:
            raise ValueError(f"expected n_win of {sorted(N_WIN_PRESETS)}, an int or one per stage, got {n_win!r}")
        n_win = N_WIN_PRESETS[n_win]
    resolved = [n_win] * stages if isinstance(n_win, int) else list(n_win)
    if len(resolved) != stages or min(resolved) < 1:
        raise ValueError(f"expected n_win of at least 1, one int or one per each of {stages} stages, got {n_win}")
    return resolved


class Stem(nn.Module):
    """[B, I, H, W] -> [B, C, H/4, W/4], channels-last in memory: whatever `modules` compute one after the other."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.contiguous(memory_format=torch.channels_last))


class BiFormerBlock(layers.TransformerBlock):
    """Position, attention and MLP, each with a shortcut: [B, C, H, W] -> [B, C, H, W].

    x + dwconv(x), then x + attn(norm(x)), then x + mlp(norm(x)); with `pre_norm` False norm(x + attn(x)) and
    norm(x + mlp(x)) instead.

    Args:
        dim: C.
        attn: Token mixer on maps [B, H, W, C].
        before_attn_dwconv: Kernel of the first, depthwise convolution; 0 leaves it out with its shortcut.
        pre_norm: Norm before attention and MLP.
        **block: Further arguments of `layers.TransformerBlock`.
    """

    def __init__(self, dim: int, attn: nn.Module, before_attn_dwconv: int, pre_norm: bool, **block: Any) -> None:
        super().__init__(dim, attn, eps=1e-6, **block)
        dd = {"device": block["device"], "dtype": block["dtype"]}
        self.pos_embed = layers.DepthwiseConv(dim, before_attn_dwconv, **dd) if before_attn_dwconv else None
        self.pre_norm = pre_norm

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # [B, H, W, C]
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        if self.pre_norm:
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        else:
            x = self.norm1(x + self.drop_path1(self.ls1(self.attn(x))))
            x = self.norm2(x + self.drop_path2(self.ls2(self.mlp(x))))
        return x.permute(0, 3, 1, 2)  # [B, C, H, W]


def _conv_mixer(dim: int, **dd: Any) -> nn.Module:
    """The stand-in for attention of topk 0: depthwise 5x5 convolution between two linear layers."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            proj_in=nn.Linear(dim, dim, **dd),
            dwconv=layers.DepthwiseConv(dim, 5, **dd),
            proj_out=nn.Linear(dim, dim, **dd),
        )
    )


def _dwconv_mlp(dim: int, hidden: int, **dd: Any) -> nn.Module:
    """MLP with a depthwise 3x3 convolution of the hidden channels, before the activation."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            fc1=nn.Linear(dim, hidden, **dd),
            dwconv=layers.DepthwiseConv(hidden, 3, **dd),
            act=nn.GELU(),
            fc2=nn.Linear(hidden, dim, **dd),
        )
    )


class BiFormer(TellsAttended, Backbone):
    """BiFormer, and its "STL" variants in the layout of Swin-T.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: Pooling before the classifier; "" leaves it out.
        embed_dims: Channels of each stage.
        depths: Blocks per stage.
        layout: "biformer", overlapping convolutions for stem and downsamplers; "swin", 4x4 patches and, after a norm,
            2x2 merges.
        topks: Token mixer of each stage. Above 0: bi-level routing attention to this many regions. Attention over the
            whole map, always with 8 heads: -1, without position; -2, plus a depthwise convolution of its normalised
            input (LePE); -3, plus one of its values (the official channels-first model calls this -1). 0: a
            convolution in place of attention.
        n_win: Regions per axis: an int, one per stage, or a preset of `N_WIN_PRESETS`. It changes no parameter.
        padding: What happens where `n_win` does not divide the map: "mask", "project" or "zero", see
            `layers.BiLevelRoutingAttention`.
        head_dim: Channels of each head of the routing attention.
        qk_dims: Channels of its queries and keys in each stage; default `embed_dims`.
        qk_scale: Factor of its q.k; default `qk_dim ** -0.5`.
        side_dwconv: Kernel of LePE in all attention; 0 leaves it out.
        kv_downsample_mode: Pooling of keys and values inside regions, see `layers.BiLevelRoutingAttention`.
        kv_downsample_ratios: Of "avgpool" and "maxpool", one per stage.
        kv_per_wins: Of "ada_avgpool" and "ada_maxpool", one per stage.
        param_attention: "qkvo", or "qkv" without the output projection of the routing attention.
        param_routing: A linear layer in the routing.
        diff_routing: Gradients flow through the routing weights.
        soft_routing: The routing weights multiply keys and values.
        before_attn_dwconv: Kernel of the depthwise convolution that begins a block; 0 leaves it out.
        mlp_ratio: Hidden width of the MLPs over the channels.
        mlp_dwconv: A depthwise 3x3 convolution inside the MLPs.
        pre_norm: Norms before attention and MLP; False: after their shortcuts.
        layer_scale: Initial value of layer scale; None leaves it out.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        out_norm: "layer" (as the official dense models) or "batch" normalises every feature map that `features_only`
            returns; None returns them as they are.
        output_stride: 32, 16 or 8. Stages beyond it keep their map; convolutions are dilated instead, there are as many
            regions as ever, of more tokens.
        img_size: No effect, as for timm's models of any input size; accepted so that callers may always give it.

    Raises:
        ValueError: Names, widths or numbers that do not fit.
        NotImplementedError: Options that the official code names but does not have either.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        layout: str = "biformer",
        topks: Sequence[int] = (1, 4, 16, -2),
        n_win: int | str | Sequence[int] = 7,
        padding: str = "mask",
        head_dim: int = 32,
        qk_dims: Sequence[int] | None = None,
        qk_scale: float | None = None,
        side_dwconv: int = 5,
        kv_downsample_mode: str = "identity",
        kv_downsample_ratios: Sequence[int] = (4, 2, 1, 1),
        kv_per_wins: Sequence[int] = (2, 2, 2, 1),
        param_attention: str = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        before_attn_dwconv: int = 3,
        mlp_ratio: float = 3.0,
        mlp_dwconv: bool = False,
        pre_norm: bool = True,
        layer_scale: float | None = None,
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
        qk_dims = embed_dims if qk_dims is None else qk_dims
        for name, values in (("embed_dims", embed_dims), ("topks", topks), ("qk_dims", qk_dims)):
            if len(values) != len(depths):
                raise ValueError(f"expected one of {name} for each of {len(depths)} stages, got {values}")
        n_wins = resolve_n_win(n_win, len(depths))
        routing = {
            "qk_scale": qk_scale,
            "side_dwconv": side_dwconv,
            "kv_downsample_mode": kv_downsample_mode,
            "param_attention": param_attention,
            "param_routing": param_routing,
            "diff_routing": diff_routing,
            "soft_routing": soft_routing,
            "padding": padding,
        }

        def create_mixer(stage: int, dim: int) -> nn.Module:
            topk, qk_dim = topks[stage], qk_dims[stage]
            if topk == 0:
                return _conv_mixer(dim, **dd)
            if topk in (-1, -2, -3):
                kernel = 0 if topk == -1 else side_dwconv
                return layers.LePEAttention(dim, 8, kernel, "value" if topk == -3 else "input", **dd)
            return layers.BiLevelRoutingAttention(
                dim,
                qk_dim // head_dim,
                n_wins[stage],
                topk,
                qk_dim,
                kv_downsample_ratio=kv_downsample_ratios[stage],
                kv_per_win=kv_per_wins[stage],
                **routing,
                **dd,
            )

        self.patch_embed = Stem(*_create_stem(layout, in_chans, embed_dims[0], **dd))
        self.stages = nn.Sequential()
        rates = drop_path_rates(drop_path_rate, depths)
        steps = plan_strides(4, (1, *[2] * (len(depths) - 1)), output_stride)
        for i, dim in enumerate(embed_dims):
            reduction, stride, before, dilation = steps[i]
            downsample = (
                _create_downsampler(layout, embed_dims[i - 1], dim, stride, before, **dd) if i else nn.Identity()
            )
            blocks = []
            for rate in rates[i]:
                mlp = _dwconv_mlp(dim, int(mlp_ratio * dim), **dd) if mlp_dwconv else None
                block = {"mlp_ratio": mlp_ratio, "mlp": mlp, "drop_path": rate, "layer_scale": layer_scale, **dd}
                blocks.append(BiFormerBlock(dim, create_mixer(i, dim), before_attn_dwconv, pre_norm, **block))
            self.stages.append(layers.Stage(downsample, blocks, dilation=dilation))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self._build_head(drop_rate, out_norm, **dd, norm=nn.BatchNorm2d(embed_dims[-1], **dd))
        for norm in self.out_norms:
            if isinstance(norm, nn.LayerNorm):
                norm.eps = 1e-6  # as the official dense models


def _create_stem(layout: str, in_chans: int, dim: int, **dd: Any) -> list[nn.Module]:
    if layout == "swin":
        return [layers.PatchConv(in_chans, dim, 4, 4, **dd), nn.BatchNorm2d(dim, **dd)]
    if layout != "biformer":
        raise ValueError(f"expected layout 'biformer' or 'swin', got {layout!r}")
    return [
        nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
        nn.BatchNorm2d(dim // 2, **dd),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        nn.BatchNorm2d(dim, **dd),
    ]


def _create_downsampler(layout: str, dim: int, out_dim: int, stride: int, dilation: int, **dd: Any) -> nn.Module:
    if layout == "swin":
        conv = layers.PatchConv(dim, out_dim, 2, stride, dilation=dilation, **dd)
        return nn.Sequential(nn.BatchNorm2d(dim, **dd), conv)
    conv = nn.Conv2d(dim, out_dim, 3, stride, dilation, dilation, **dd)
    return nn.Sequential(conv, nn.BatchNorm2d(out_dim, **dd))


_cfg = partial(
    imagenet_cfg,
    url="",
    first_conv="patch_embed.conv.0",
    license="mit",
    origin_url="https://github.com/rayleizhu/BiFormer",
    paper_ids="arXiv:2303.08810",
)

_SMALL = {"depths": (4, 4, 18, 4)}
_WIDE = {"embed_dims": (96, 192, 384, 768)}
_STL = {**_WIDE, "depths": (2, 2, 6, 2), "layout": "swin", "mlp_ratio": 4.0, "before_attn_dwconv": 0}
_TEST = {
    "embed_dims": (16, 32, 64, 96),
    "depths": (1, 2, 2, 1),
    "topks": (1, 2, 4, -2),
    "n_win": 4,
    "head_dim": 16,
    "mlp_ratio": 2.0,
}
# The links of the official weights are dead (issue 53 of the official repository, 2026).
_UNTRAINED = {"untrained": _cfg()}

VARIANTS: dict[str, Variant] = {
    "biformer_tiny": Variant({}, _UNTRAINED),
    "biformer_small": Variant(_SMALL, _UNTRAINED),
    "biformer_base": Variant({**_SMALL, **_WIDE}, _UNTRAINED),
    "biformer_stl": Variant(_STL, _UNTRAINED, doc="The network of the ablation study: layout of Swin-T."),
    "biformer_stl_nchw": Variant(
        {**_STL, "topks": (1, 4, 16, -3), "padding": "zero"},
        _UNTRAINED,
        doc="`biformer_stl` as the authors trained it again, channels-first: other padding, LePE always on values.",
    ),
    "test_biformer": Variant(_TEST, {"untrained": _cfg(160)}, doc="Under 1M parameters, for tests."),
}


_RENAMED = (
    (r"^downsample_layers\.0\.", "patch_embed.conv."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^extra_norms\.", "out_norms."),
    (r"\.attn\.(qkv\.qkv|qkv_linear)\.", ".attn.qkv."),
    (r"\.attn\.(wo|output_linear)\.", ".attn.proj."),
    (r"\.attn\.router\.emb\.", ".attn.router."),
    (r"\.attn\.1\.", ".attn.proj_in."),
    (r"\.attn\.2\.", ".attn.dwconv."),
    (r"\.attn\.3\.", ".attn.proj_out."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.1\.dwconv\.", ".mlp.dwconv."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
)
_LINEAR = re.compile(r"\.(qkv|proj|proj_in|proj_out|fc1|fc2)\.weight$")


def _convert(key: str, value: Tensor) -> tuple[str, Tensor]:
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    # 1x1 convolutions of the official code, linear layers here
    return key, value.flatten(1) if _LINEAR.search(key) and value.ndim == 4 else value


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of official checkpoints, of classification and dense models; native keys pass unchanged."""
    return convert_checkpoint(state_dict, model, _convert)


def _create_biformer(variant: str, pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return build_model(BiFormer, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3), **kwargs)


register_variants(__name__, VARIANTS, _create_biformer)
