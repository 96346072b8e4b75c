"""OverLoCK: an overview of the image first, then a closer look that its context guides, with ContMix kernels.

Paper: OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels (CVPR 2025,
arXiv:2502.20087). Official code: https://github.com/LMMMEng/OverLoCK (Apache-2.0).

Three networks: a base network of three stages, an overview network behind it, whose last map is projected to a context,
and a focus network on the base network's last map, every block of which sees the context.

What differs from the official code, and why:
    * One class for classification, detection and segmentation; the two dense forms are values of `out_norm`.
    * `forward` gives logits. The auxiliary classifier of the overview is there, as the official files and counts have
      it, and takes part in training once `set_aux_training` says so.
    * The window sums need no index of every tap, and no natten.
    * Modules have this package's names. `checkpoint_filter_fn` renames official keys, and fuses the branches of large
      convolutions for a model that is built with `deploy`.
"""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from timm.layers import DropPath, LayerNorm2d, SqueezeExcite, get_device_dtype, trunc_normal_
from timm.models import checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from visattn import layers
from visattn.models._backbone import Backbone, TellsAttended, convert_checkpoint, drop_path_rates, unwrap
from visattn.models._build import NCHW_POOLS, build_model
from visattn.models._variants import Variant, imagenet_cfg, register_variants
from visattn.weights import check_fit

__all__ = ["OverLoCK"]

# B batch, H W map, C channels of a stage, Cx of the context; maps are [B, C, H, W].

_DENSE = ("segmentation", "detection")  # values of `out_norm`: the official backbones of these tasks


class RepConvBlock(nn.Module):
    """A block of the base and overview networks: [B, dim, H, W] -> [B, dim, H, W].

    A depthwise convolution with a shortcut; then, on one branch, a large depthwise convolution, squeeze and excitation,
    and an MLP.

    Args:
        dim: Channels.
        kernel_size: The large convolution, see `layers.DilatedReparam`.
        mlp_ratio: Hidden width of the MLP.
        scaled: The shortcut has factors and summands per channel.
        drop_path: Probability of dropping the branch, per sample.
        deploy: Build the large convolution as one.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        mlp_ratio: float,
        scaled: bool,
        drop_path: float,
        deploy: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dwconv = layers.ResDWConv(dim, **dd)
        self.norm1 = LayerNorm2d(dim, eps=1e-6, **dd)
        self.conv = layers.DilatedReparam(dim, kernel_size, deploy, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        # pyrefly: ignore[bad-argument-type]: timm takes the name of an activation too
        self.se = SqueezeExcite(dim, rd_channels=max(16, dim // 8), act_layer="gelu", **dd)
        self.mlp = layers.ConvMlp(dim, int(dim * mlp_ratio), **dd)
        self.ls = layers.ChannelScale(dim, **dd) if scaled else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        return self.ls(x) + self.drop_path(self.mlp(self.se(self.norm2(self.conv(self.norm1(x))))))


class FocusBlock(layers.ContMixBlock):
    """A block of the focus network: x [B, C + Cx, H, W] and context [B, Cx, H, W] -> [B, C + Cx, H, W].

    Args:
        first: The block's own context is the given one, which is then not added to it.
        **block: Arguments of `layers.ContMixBlock`.
    """

    def __init__(self, dim: int, context_dim: int, *args: Any, first: bool, **block: Any) -> None:
        super().__init__(dim, context_dim, *args, **block)
        dd = {key: block[key] for key in ("device", "dtype")}
        self.x_scale = None if first else layers.ChannelScale(context_dim, **dd)
        self.h_scale = None if first else layers.ChannelScale(context_dim, **dd)

    # pyrefly: ignore[bad-override]: it takes the context too
    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        if self.x_scale is not None and self.h_scale is not None:
            x, own = x.split([self.dim, self.context_dim], 1)
            x = torch.cat([x, self.x_scale(own) + self.h_scale(context)], 1)
        return super().forward(x)


class FocusDownsampler(nn.Module):
    """Strided convolutions of a map and of its context: [B, in_dim + Cx, H, W] -> [B, dim + Cx, H', W'].

    H' = ceil(H / 2), W' = ceil(W / 2).
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        context_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.split = [in_dim, context_dim]
        self.x_proj = layers.ConvNorm(in_dim, dim, 3, 2, device=device, dtype=dtype)
        self.h_proj = layers.ConvNorm(context_dim, context_dim, 3, 2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x, own = x.split(self.split, 1)
        return torch.cat([self.x_proj(x), self.h_proj(own)], 1)


class FocusStage(nn.Module):
    """A downsampler (or nn.Identity) and blocks: x [B, C' + Cx, H', W'], context [B, Cx, H, W] -> [B, C + Cx, H, W]."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = checkpoint(block, x, context) if self.grad_checkpointing else block(x, context)
        return x


class AuxHead(nn.Module):
    """The overview's own classifier, for training: [B, dim, H, W] -> [B, num_classes]."""

    def __init__(
        self,
        dim: int,
        num_classes: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim, device=device, dtype=dtype)
        self.fc = nn.Linear(dim, num_classes, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x).mean((2, 3)))


class DetectionNorm(nn.Module):
    """The last feature level of the official detectors, which add the overview's map.

    Shapes: both maps, one behind the other, [B, dim + overview_dim, H, W] -> [B, dim, H, W].
    """

    def __init__(
        self,
        dim: int,
        overview_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.split = [dim, overview_dim]
        self.norm = LayerNorm2d(dim, eps=1e-6, **dd)
        self.overview_norm = LayerNorm2d(overview_dim, eps=1e-6, **dd)
        self.overview_proj = nn.Conv2d(overview_dim, dim, 1, **dd)
        self.overview_scale = layers.ChannelScale(dim, 1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x, overview = x.split(self.split, 1)
        return self.norm(x) + self.overview_scale(self.overview_proj(self.overview_norm(overview)))


class OverLoCK(TellsAttended, Backbone):
    """OverLoCK for images of any size.

    Feature levels: the base network's first two stages (strides 4 and 8), and the focus network's two (16 and 32),
    whose last channels are their context. `stages` are those of the base network and, the fourth, the overview network;
    `focus` are the focus network's.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: Pooling before the classifier.
        depths: Blocks of the three base stages and of the overview.
        focus_depths: Blocks of the two focus stages.
        embed_dims: Channels of the same stages as `depths`; the focus stages have those of the last two, and a quarter
            of the last for the context besides.
        focus_heads: Per focus stage, half of the heads of either ContMix kernel.
        kernel_sizes: Large kernels of the same stages as `depths`; the focus stages have those of the last two.
        small_kernel: The small kernel of ContMix.
        mlp_ratio: Hidden width of MLPs in the base and overview networks.
        focus_mlp_ratio: Hidden width of MLPs in the focus network, over the channels without the context.
        final_dim: Channels of the last 1x1 convolution, before the classifier.
        aux_head: The overview has an auxiliary classifier, for training, see `set_aux_training`.
        deploy: Build every large convolution as one, see `layers.DilatedReparam`; for inference, or small changes.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0 over base, overview and focus.
        out_norm: "layer" or "batch" normalises every feature map that `features_only` returns; None returns them as
            they are. "segmentation" and "detection" are the official backbones of those tasks: LayerNorms, where the
            third stage goes on from the second level's normalised map; detectors add a projection of the overview's map
            to the last level.
        output_stride: 32; others are refused, as the overview lies at this stride.
        img_size: No effect, as for timm's models of any input size; accepted so that callers may always give it.

    Raises:
        ValueError: Numbers of stages, heads, kernels, norm or stride that do not fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 3, 2),
        focus_depths: Sequence[int] = (6, 2),
        embed_dims: Sequence[int] = (56, 112, 256, 336),
        focus_heads: Sequence[int] = (4, 6),
        kernel_sizes: Sequence[int] = (17, 15, 13, 7),
        small_kernel: int = 5,
        mlp_ratio: float = 4.0,
        focus_mlp_ratio: float = 3.0,
        final_dim: int = 1024,
        aux_head: bool = True,
        deploy: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: str | None = None,
        output_stride: int = 32,
        img_size: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, num_classes, global_pool, "NCHW", NCHW_POOLS)
        numbers = [len(x) for x in (depths, embed_dims, kernel_sizes, focus_depths, focus_heads)]
        if numbers != [4, 4, 4, 2, 2]:
            raise ValueError(
                "expected 4 depths, embed_dims and kernel_sizes, and 2 focus_depths and focus_heads, got "
                f"{numbers[0]}, {numbers[1]} and {numbers[2]}, and {numbers[3]} and {numbers[4]}"
            )
        if output_stride != 32:
            raise ValueError(f"expected output_stride 32, at which the overview lies, got {output_stride}")
        if out_norm not in (None, "batch", "layer", *_DENSE):
            raise ValueError(f"expected out_norm None, 'batch', 'layer' or one of {_DENSE}, got {out_norm!r}")
        dd = {"device": device, "dtype": dtype}
        dim = embed_dims[0]
        self.patch_embed = nn.Sequential(
            layers.ConvNorm(in_chans, dim // 2, 3, 2, "gelu", **dd),
            layers.ConvNorm(dim // 2, dim // 2, 3, act="gelu", **dd),
            layers.ConvNorm(dim // 2, dim, 3, 2, "gelu", **dd),
            layers.ConvNorm(dim, dim, 3, **dd),
        )
        rates = drop_path_rates(drop_path_rate, [*depths, *focus_depths])
        self.stages = nn.Sequential()
        for i, (dim, kernel_size) in enumerate(zip(embed_dims, kernel_sizes, strict=True)):
            blocks = [RepConvBlock(dim, kernel_size, mlp_ratio, i > 1, rate, deploy, **dd) for rate in rates[i]]
            downsample = layers.ConvNorm(embed_dims[i - 1], dim, 3, 2, **dd) if i else nn.Identity()
            self.stages.append(layers.Stage(downsample, blocks))
        self.overview_dim = embed_dims[-1]
        self.context_dim = self.overview_dim // 4
        self.context_proj: nn.Module = nn.Conv2d(self.overview_dim, self.context_dim, 1, **dd)
        self.focus = nn.Sequential()
        for i in range(2):
            dim, kernels = embed_dims[2 + i], (kernel_sizes[2 + i], small_kernel)
            blocks = []
            for j, rate in enumerate(rates[4 + i]):
                how = {"mlp_ratio": focus_mlp_ratio, "layer_scale": 1.0, "drop_path": rate, "deploy": deploy, **dd}
                first = i == j == 0
                blocks.append(FocusBlock(dim, self.context_dim, 2 * focus_heads[i], *kernels, first=first, **how))
            downsample = FocusDownsampler(embed_dims[2], dim, self.context_dim, **dd) if i else nn.Identity()
            self.focus.append(FocusStage(downsample, blocks))
        levels = [("stages.0", embed_dims[0]), ("stages.1", embed_dims[1])]
        levels += [(f"focus.{i}", embed_dims[2 + i] + self.context_dim) for i in range(2)]
        for i, (module, dim) in enumerate(levels):
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": module})
        self.has_aux_head, self.aux_training = aux_head, False
        self.aux_head = self._make_aux_head(**dd)
        dim = levels[-1][1]
        norm = layers.ConvNorm(dim, final_dim, act="silu", **dd)
        self.dense = out_norm if out_norm in _DENSE else None
        self._build_head(drop_rate, None if self.dense else out_norm, **dd, norm=norm, num_features=final_dim)
        if self.dense:
            self.out_norms.extend(LayerNorm2d(dim, eps=1e-6, **dd) for _, dim in levels)
        if self.dense == "detection":
            self.out_norms[-1] = DetectionNorm(dim, self.overview_dim, **dd)
            self.init_weights(needs_reset=False)

    def _make_aux_head(self, **dd: Any) -> AuxHead | None:
        """The auxiliary classifier, at rest; None where there is none."""
        if not self.has_aux_head or self.num_classes == 0:
            return None
        head = AuxHead(self.overview_dim, self.num_classes, **dd)
        return head.requires_grad_(self.aux_training).train(self.training)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Truncated normal (std 0.02) for linear and convolution weights, zero for their biases; others as they do."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif needs_reset:
                layers.reset_parameters(module)

    def set_aux_training(self, enable: bool = True) -> None:
        """In training mode, let `forward` return (logits, the auxiliary classifier's logits), for a loss of both.

        Until then the auxiliary classifier's parameters do not require gradients: call this before making an optimizer.

        Raises:
            ValueError: A model without an auxiliary classifier.
        """
        if enable and self.aux_head is None:
            raise ValueError("expected a model with an auxiliary classifier, got none; try aux_head=True and classes")
        self.aux_training = enable
        if self.aux_head is not None:
            self.aux_head.requires_grad_(enable)

    def reparameterize(self) -> None:
        """Turn every large convolution into one, in place; evaluation gives the same, and training starts elsewhere."""
        for module in self.modules():
            if isinstance(module, layers.DilatedReparam):
                module.reparameterize()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters from stem to head, for layer-wise learning rates: base, overview, then focus."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)", "focus": r"^focus\.(\d+)"}
        parts = [(r"^{}\.(\d+)\.downsample", (0,)), (r"^{}\.(\d+)\.blocks\.(\d+)", None)]
        blocks, focus = ([(p.format(name), group) for p, group in parts] for name in ("stages", "focus"))
        focus = [(r"^context_proj", (-1,)), *focus, (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": blocks, "focus": focus}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass instead of keeping them."""
        super().set_grad_checkpointing(enable)
        for stage in cast("Iterable[FocusStage]", self.focus):
            stage.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """See `Backbone`; the auxiliary classifier is replaced too."""
        super().reset_classifier(num_classes, global_pool, reset_other)
        self.aux_head = self._make_aux_head(**get_device_dtype(self))

    def _number_of_stages(self, level: int) -> int:
        """How many stages feature level `level` needs, those of `focus` after all of `stages`."""
        return level + 1 if level < 2 else level + 3

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """See `Backbone`."""
        inner_norm = self.out_norms[1] if self.dense else None
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.focus = self.focus[: max(0, len(self.feature_info) - 2)]
        if not len(self.focus):
            self.context_proj = nn.Identity()
        elif inner_norm is not None:
            self.out_norms[1] = inner_norm
        return taken

    def _forward_levels(
        self, x: Tensor, maps: list[Tensor] | None = None, number: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Image to the last map [B, C + Cx, H / 32, W / 32] and the overview's [B, C, H / 32, W / 32].

        Fewer stages, see `forward_features`, give the map of the last one, which is then the overview's too.
        """
        x = overview = self.patch_embed(x)
        for i, stage in enumerate(islice(self.stages, number)):
            overview = stage(overview)
            x = overview if i < 3 else x
            if maps is not None and i < 2:
                maps.append(overview)
            if self.dense and i == 1:
                overview = self.out_norms[1](overview)
        focus = list(islice(self.focus, None if number is None else max(0, number - 4)))
        if not focus:
            return overview, overview
        context = self.context_proj(overview)  # [B, Cx, H / 32, W / 32]
        nearer = F.interpolate(context, size=x.shape[2:], mode="bilinear", align_corners=False)
        x = torch.cat([x, nearer], 1)  # [B, C + Cx, H / 16, W / 16]
        for stage, guide in zip(focus, (nearer, context), strict=False):
            x = stage(x, guide)
            if maps is not None:
                with_overview = self.dense == "detection" and guide is context
                maps.append(torch.cat([x, overview], 1) if with_overview else x)
        return x, overview

    def forward_features(self, x: Tensor, *, maps: list[Tensor] | None = None, number: int | None = None) -> Tensor:
        """See `Backbone`; stages are counted those of `focus` after all of `stages`."""
        x, _ = self._forward_levels(x, maps, number)
        return self.norm(x) if maps is None else x

    # pyrefly: ignore[bad-override]: two results are asked for by a call
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images [B, in_chans, H, W] to logits [B, num_classes]; for two of them see `set_aux_training`."""
        x, overview = self._forward_levels(x)
        logits = self.forward_head(self.norm(x))
        if self.training and self.aux_training and self.aux_head is not None:
            return logits, self.aux_head(overview)
        return logits


_URL = "https://github.com/LMMMEng/OverLoCK/releases/download/v1"
_cfg = partial(
    imagenet_cfg,
    first_conv="patch_embed.0.conv",
    license="apache-2.0",
    origin_url="https://github.com/LMMMEng/OverLoCK",
    paper_ids="arXiv:2502.20087",
)

_XT = {"drop_path_rate": 0.1}
_TINY = {
    "depths": (4, 4, 6, 2),
    "focus_depths": (12, 2),
    "embed_dims": (64, 128, 256, 512),
    "focus_heads": (4, 8),
    "drop_path_rate": 0.15,
}
_SMALL = {
    "depths": (6, 6, 8, 3),
    "focus_depths": (16, 3),
    "embed_dims": (64, 128, 320, 512),
    "focus_heads": (8, 16),
    "drop_path_rate": 0.4,
}
_BASE = {
    "depths": (8, 8, 10, 4),
    "focus_depths": (20, 4),
    "embed_dims": (80, 160, 384, 576),
    "focus_heads": (6, 9),
    "drop_path_rate": 0.5,
}
_TEST = {
    "depths": (1, 1, 1, 1),
    "focus_depths": (1, 1),
    "embed_dims": (16, 32, 32, 64),
    "focus_heads": (1, 2),
    "kernel_sizes": (7, 7, 7, 5),
    "final_dim": 64,
    "aux_head": False,
}
# Per size its arguments and the share of a test image that is kept.
_SIZES = {"xt": (_XT, 0.925), "t": (_TINY, 0.95), "s": (_SMALL, 0.95), "b": (_BASE, 0.975)}


def _in1k(file: str, crop_pct: float) -> dict[str, dict[str, Any]]:
    classifiers = ("head.fc", "aux_head.fc")
    return {"in1k": _cfg(url=f"{_URL}/overlock_{file}.pth", crop_pct=crop_pct, classifier=classifiers)}


VARIANTS: dict[str, Variant] = {
    **{f"overlock_{size}": Variant(args, _in1k(f"{size}_in1k_224", crop)) for size, (args, crop) in _SIZES.items()},
    **{
        f"overlock_{size}_reparam": Variant(
            {**args, "deploy": True},
            _in1k(f"{size}_in1k_224_reparam", crop),
            doc="Large convolutions of one kernel, for inference.",
        )
        for size, (args, crop) in _SIZES.items()
    },
    "test_overlock": Variant(_TEST, {"untrained": _cfg(160)}, doc="Under 1M parameters, for tests."),
}

# Official names and ours, of modules and of single tensors; first those outside of blocks.
_NETWORK = {
    **{f"patch_embed1.{3 * i + j}": f"patch_embed.{i}.{('conv', 'bn')[j]}" for i in range(4) for j in range(2)},
    **{f"patch_embed{i}.{j}": f"stages.{i - 1}.downsample.{('conv', 'bn')[j]}" for i in (2, 3, 4) for j in range(2)},
    **{f"patch_embedx.{x}_proj.0": f"focus.1.downsample.{x}_proj.conv" for x in "xh"},
    **{f"patch_embedx.{x}_proj.1": f"focus.1.downsample.{x}_proj.bn" for x in "xh"},
    **{f"blocks{i}": f"stages.{i - 1}.blocks" for i in (1, 2, 3, 4)},
    **{f"sub_blocks{i}": f"focus.{i - 3}.blocks" for i in (3, 4)},
    "high_level_proj": "context_proj",
    "head.0": "norm.conv",
    "head.1": "norm.bn",
    "head.4": "head.fc",
    "aux_head.0": "aux_head.norm",
    "aux_head.2": "aux_head.fc",
    "extra_norm": "out_norms",
    "h_proj.0": "out_norms.3.overview_proj",
    "h_proj.1": "out_norms.3.overview_scale",
}
# Of the last level's norms in a detector; a segmenter has one.
_DETECTION = {"3": "out_norms.3.norm", "4": "out_norms.3.overview_norm"}
_REP_CONV_BLOCK = {
    "proj.0": "norm1",
    "proj.1": "conv",
    "proj.2": "norm2",
    "proj.3.proj.1": "se.fc1",
    "proj.3.proj.3": "se.fc2",
    "proj.4": "mlp.fc1",
    "proj.6": "mlp.dwconv",
    "proj.7": "mlp.grn",
    "proj.8": "mlp.fc2",
}
_FOCUS_BLOCK = {
    "weight_query.0": "mix.q.conv",
    "weight_query.1": "mix.q.bn",
    "weight_key.1": "mix.k.conv",
    "weight_key.2": "mix.k.bn",
    "weight_proj": "mix.weight_proj",
    "rpb1": "mix.rpb1",
    "rpb2": "mix.rpb2",
    "dyconv_proj.0": "mix_proj.conv",
    "dyconv_proj.1": "mix_proj.bn",
    "se_layer.proj.1": "se.fc1",
    "se_layer.proj.3": "se.fc2",
    "gate.0": "gate.conv",
    "gate.1": "gate.bn",
    "proj.0": "out.0",
    "proj.1": "out.1",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.dwconv",
    "mlp.3": "mlp.grn",
    "mlp.4": "mlp.fc2",
}


def _rename(name: str, table: Mapping[str, str]) -> str:
    """The name with its beginning as in the table; the longest entry that fits counts."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        if (beginning := ".".join(parts[:i])) in table:
            return ".".join([table[beginning], *parts[i:]])
    return name


def _convert(key: str, value: Tensor, official: Container[str], own: Container[str]) -> tuple[str, Tensor]:
    """Key and value, official to ours; `official` and `own` are all keys of the file and of the model."""
    origin = ".conv." if f"{key.rpartition('.')[0]}.bias" in official else ".branches.origin.conv."
    if match := re.match(r"((sub_)?blocks\d\.\d+)\.(.+)", key):
        key = f"{match[1]}.{_rename(match[3], _FOCUS_BLOCK if match[2] else _REP_CONV_BLOCK)}"
    key = _rename(key, _NETWORK)
    key = key.replace(".lk_origin.", origin).replace(".origin_bn.", ".branches.origin.bn.")
    key = re.sub(r"\.dil_(conv|bn)_(k\d+_\d+)\.", r".branches.\2.\1.", key)
    if "out_norms.3.norm.weight" in own:
        key = re.sub(r"^out_norms\.(4|3(?=\.\w+$))", lambda m: _DETECTION[m[1]], key)
    if key.endswith((".weight_proj.weight", "head.fc.weight")):
        value = value.flatten(1)
    return key, value


def _fuse(weights: dict[str, Tensor], model: nn.Module) -> None:
    """Replace, in place, branches of large convolutions by one kernel where the model has that."""
    for name, module in model.named_modules():
        if isinstance(module, layers.DilatedReparam) and f"{name}.branches.origin.conv.weight" in weights:
            if module.conv is None:
                continue
            twin = layers.DilatedReparam(module.dim, module.kernels[0][0])
            keys = [key for key in weights if key.startswith(f"{name}.branches.")]
            branches = {key.removeprefix(f"{name}."): weights.pop(key) for key in keys}
            check_fit(twin, branches, f"weights of {name}", "others")
            twin.load_state_dict(branches)
            twin.reparameterize()
            weights.update({f"{name}.{key}": value for key, value in twin.state_dict().items()})


def checkpoint_filter_fn(state_dict: dict[str, Any], model: OverLoCK) -> dict[str, Tensor]:
    """Official classifiers, and the backbones of official detectors and segmenters; native keys pass unchanged.

    What a model with `deploy` has fused is fused; the auxiliary classifier is left out where there is none.

    Raises:
        WeightsError: Contents that are no tensors by name, or branches that cannot be fused to the model's kernel.
    """
    state_dict, own = unwrap(state_dict), model.state_dict()
    weights = convert_checkpoint(
        state_dict, model, lambda key, value: _convert(key, value, state_dict.keys(), own.keys())
    )
    if model.aux_head is None:
        weights = {key: value for key, value in weights.items() if not key.startswith("aux_head.")}
    _fuse(weights, model)
    return weights


def _create_overlock(variant: str, pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    features = {"flatten_sequential": False}
    return build_model(OverLoCK, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3), features, **kwargs)


register_variants(__name__, VARIANTS, _create_overlock)
