"""Neighborhood Attention Transformer: NAT, DiNAT and DiNAT_s.

Papers: Neighborhood Attention Transformer (CVPR 2023, arXiv:2204.07143), Dilated Neighborhood Attention Transformer
(arXiv:2209.15001). Official code: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT).

What differs from the official code, and why:
    * A stage begins with its downsampler (official: ends with it), so that a stage's output is its feature map;
      layers are called `stages` in every variant. `checkpoint_filter_fn` renames official keys.
    * Any image size: maps smaller than kernel x dilation are padded as natten 0.14 did (the natten that the weights
      were trained with); later natten versions refuse them.
    * Dilations are an argument. They do not change the parameters, so one checkpoint serves all tasks.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from visattn import layers
from visattn.ops import resize_rel_pos

__all__ = ["NAT"]

# B batch, H W map, C channels, N heads, D head dim. Maps are [B, H, W, C] between the stem and the head.

# Dilations of the odd blocks of each stage (even blocks have 1). They are repeated to the depth of the stage; a stage
# with fewer odd blocks than entries takes the last ones. "classification" is map size // 7 at 224 x 224.
DILATION_PRESETS = {
    "none": ((1,), (1,), (1,), (1,)),
    "classification": ((8,), (4,), (2,), (1,)),
    "classification_384": ((13,), (6,), (3,), (1,)),
    "detection": ((28,), (7, 14), (3, 5, 7), (3,)),
    "segmentation": ((16,), (4, 8), (2, 3, 4), (2,)),
    "segmentation_640": ((20,), (5, 10), (2, 3, 4, 5, 2, 3, 4, 5, 5), (2,)),
    "mask2former_k11": ((14,), (4, 7), (2, 3, 2, 3, 2, 3, 2, 3, 3), (1,)),
}


def resolve_dilations(dilations: str | Sequence[Sequence[int]], depths: Sequence[int]) -> list[list[int]]:
    """The dilation of every block of every stage.

    Args:
        dilations: A name in `DILATION_PRESETS`, or one list per stage with one entry per block.
        depths: Blocks per stage.

    Raises:
        ValueError: An unknown name, or lists that do not fit the depths.
    """
    if isinstance(dilations, str):
        if dilations not in DILATION_PRESETS or len(depths) != 4:
            raise ValueError(
                f"expected dilations of one of {sorted(DILATION_PRESETS)} for a model of 4 stages, got {dilations!r} "
                f"for {len(depths)}; try one list per stage"
            )
        resolved = []
        for depth, preset in zip(depths, DILATION_PRESETS[dilations], strict=True):
            odd = preset[-(depth // 2) :]
            resolved.append([odd[i // 2 % len(odd)] if i % 2 else 1 for i in range(depth)])
        return resolved
    resolved = [list(stage) for stage in dilations]
    if [len(stage) for stage in resolved] != list(depths):
        raise ValueError(f"expected dilations for depths {tuple(depths)}, one per block, got {resolved}")
    return resolved


class NATStage(nn.Module):
    """An optional downsampler, then blocks of neighborhood attention: [B, H, W, C] -> [B, H', W', C']."""

    def __init__(
        self,
        downsample: nn.Module,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilations: list[int],
        mlp_ratio: float,
        qkv_bias: bool,
        proj_drop: float,
        drop_path: list[float],
        layer_scale: float | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential()
        for dilation, rate in zip(dilations, drop_path, strict=True):
            attn = layers.NeighborhoodAttention(
                dim, num_heads, kernel_size, dilation, qkv_bias, proj_drop=proj_drop, **dd
            )
            self.blocks.append(layers.TransformerBlock(dim, attn, mlp_ratio, proj_drop, rate, layer_scale, **dd))

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class NAT(nn.Module):
    """NAT, DiNAT (overlapping convolutions between stages) and DiNAT_s (Swin's patch layout).

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: Pooling before the classifier; "" leaves it out.
        embed_dim: Channels of the first stage; each later stage has twice as many.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        kernel_size: Neighborhood size per axis, odd.
        dilations: A preset of `DILATION_PRESETS` ("classification", "detection", "segmentation", ...) or one list per
            stage with the dilation of every block.
        mlp_ratio: Hidden width of the MLPs over the channels.
        qkv_bias: Bias of the query, key and value projections.
        layer_scale: Initial value of layer scale; None leaves it out.
        overlapped: Convolutions for stem and downsamplers (NAT, DiNAT); False: patch embedding and merging (DiNAT_s).
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after attention and MLP projections.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: Dilations or heads that do not fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: str | Sequence[Sequence[int]] = "none",
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        overlapped: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        self.feature_info: list[dict[str, Any]] = []

        if overlapped:
            self.patch_embed = layers.ConvTokenizer(in_chans, embed_dim, **dd)
        else:
            self.patch_embed = layers.PatchTokenizer(in_chans, embed_dim, 4, **dd)
        downsampler = layers.ConvDownsampler if overlapped else layers.PatchMerging
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.Sequential()
        for i, stage_dilations in enumerate(resolve_dilations(dilations, depths)):
            dim = embed_dim * 2**i
            self.stages.append(
                NATStage(
                    downsampler(dim // 2, **dd) if i else nn.Identity(),
                    dim,
                    num_heads[i],
                    kernel_size,
                    stage_dilations,
                    mlp_ratio,
                    qkv_bias,
                    proj_drop_rate,
                    rates[i],
                    layer_scale,
                    **dd,
                )
            )
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"})

        self.num_features = self.feature_info[-1]["num_chs"]
        self.norm = nn.LayerNorm(self.num_features, **dd)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt, **dd
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise all parameters in place; `needs_reset=True` also those that reset themselves on construction."""
        layers.init_weights(self, needs_reset)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Patterns of parameters that weight decay leaves alone."""
        return {"*.rpb"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters from stem to head, for layer-wise learning rates."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass instead of keeping them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; `global_pool=None` keeps the pooling."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def _forward_stages(self, x: Tensor, number: int) -> list[Tensor]:
        """The outputs of the first `number` stages for an image."""
        x = self.patch_embed(x)
        outputs = []
        for i, stage in enumerate(self.stages):
            if i < number:
                x = stage(x)
                outputs.append(x)
        return outputs

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of stages.

        Args:
            x: Images [B, in_chans, H, W].
            indices: The last n stages if an int, all if None, else these stages.
            norm: Apply the final norm to the last stage's map.
            stop_early: Skip the stages after the last one asked for.
            output_fmt: "NCHW" or "NHWC", of the intermediate maps.
            intermediates_only: Return the maps alone.

        Returns:
            The maps, or (output of `forward_features`, maps).
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"expected output_fmt 'NCHW' or 'NHWC', got {output_fmt!r}")
        number = len(self.stages)
        take_indices, max_index = feature_take_indices(number, indices)
        maps = self._forward_stages(x, max_index + 1 if stop_early else number)
        final = self.norm(maps[-1]) if len(maps) == number else maps[-1]
        taken = [final if norm and i == number - 1 else maps[i] for i in take_indices]
        if output_fmt == "NCHW":
            taken = [t.permute(0, 3, 1, 2).contiguous() for t in taken]
        return taken if intermediates_only else (final, taken)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates(indices)` does not need; returns the absolute indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shortened = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()  # it is sized for the last stage
        if shortened:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> normalised map [B, H/32, W/32, num_features]."""
        return self.norm(self._forward_stages(x, len(self.stages))[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify the map of `forward_features`; `pre_logits` stops before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


_URL = "https://shi-labs.com/projects/"


def _cfg(path: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": _URL + path if path else "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "paper_ids": ("arXiv:2204.07143", "arXiv:2209.15001"),
        **kwargs,
    }


_SIZE_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
_PATCH = {"first_conv": "patch_embed.proj"}
_IN22K = {"num_classes": 21841}

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": _cfg("nat/checkpoints/CLS/nat_mini.pth"),
        "nat_tiny.in1k": _cfg("nat/checkpoints/CLS/nat_tiny.pth"),
        "nat_small.in1k": _cfg("nat/checkpoints/CLS/nat_small.pth"),
        "nat_base.in1k": _cfg("nat/checkpoints/CLS/nat_base.pth"),
        "dinat_mini.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_mini_in1k_224.pth"),
        "dinat_tiny.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_tiny_in1k_224.pth"),
        "dinat_small.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_small_in1k_224.pth"),
        "dinat_base.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_base_in1k_224.pth"),
        "dinat_large.in22k_ft_in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_224.pth"),
        "dinat_large_384.in22k_ft_in1k": _cfg(
            "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384.pth", **_SIZE_384
        ),
        "dinat_large_384_11x11.in22k_ft_in1k": _cfg(
            "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384_11x11.pth", **_SIZE_384
        ),
        "dinat_large_21k.in22k": _cfg("dinat/checkpoints/imagenet22k/dinat_large_in22k_224.pth", **_IN22K),
        "dinat_large_21k_11x11.in22k": _cfg(
            "dinat/checkpoints/imagenet22k/dinat_large_in22k_224_11x11interp.pth", **_IN22K
        ),
        "dinat_s_tiny.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_s_tiny_in1k_224.pth", **_PATCH),
        "dinat_s_small.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_s_small_in1k_224.pth", **_PATCH),
        "dinat_s_base.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_s_base_in1k_224.pth", **_PATCH),
        "dinat_s_large.in22k_ft_in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_s_large_in1k_224.pth", **_PATCH),
        "dinat_s_large_384.in22k_ft_in1k": _cfg(
            "dinat/checkpoints/imagenet1k/dinat_s_large_in1k_384.pth", **_PATCH, **_SIZE_384
        ),
        "dinat_s_large_21k.in22k": _cfg(
            "dinat/checkpoints/imagenet22k/dinat_s_large_in22k_224.pth", **_PATCH, **_IN22K
        ),
        "test_dinat.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
    }
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename official keys and fit relative position tables to the model's kernel; native keys pass unchanged."""
    state_dict = state_dict.get("model", state_dict)
    state_dict = state_dict.get("state_dict", state_dict)
    own = model.state_dict()
    filtered = {}
    for key, value in state_dict.items():
        if re.match(r"(levels|layers)\.\d+\.", key):
            key = re.sub(r"^(levels|layers)\.", "stages.", key)
            key = re.sub(r"^stages\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", key)
            key = re.sub(r"\.gamma([12])$", r".ls\1.gamma", key)
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        if key.endswith(".rpb") and key in own:
            value = resize_rel_pos(value, own[key].shape[1:])
        filtered[key] = value
    return filtered


def _create_nat(variant: str, pretrained: bool = False, **kwargs: Any) -> NAT:
    return build_model_with_cfg(
        NAT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **kwargs,
    )


_MINI = {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0, "drop_path_rate": 0.2}
_TINY = {**_MINI, "depths": (3, 4, 18, 5)}
_SMALL = {
    "embed_dim": 96,
    "depths": (3, 4, 18, 5),
    "num_heads": (3, 6, 12, 24),
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.3,
}
_BASE = {**_SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "layer_scale": 1e-5, "drop_path_rate": 0.5}
_LARGE = {**_SMALL, "embed_dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35}
_DILATED = {"dilations": "classification"}
_S_TINY = {
    **_DILATED,
    "embed_dim": 96,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "mlp_ratio": 4.0,
    "overlapped": False,
    "drop_path_rate": 0.2,
}
_S_SMALL = {**_S_TINY, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
_S_BASE = {**_S_SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}
_S_LARGE = {**_S_SMALL, "embed_dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35}


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("nat_mini", pretrained, **{**_MINI, **kwargs})


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("nat_tiny", pretrained, **{**_TINY, **kwargs})


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("nat_small", pretrained, **{**_SMALL, "layer_scale": 1e-5, **kwargs})


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("nat_base", pretrained, **{**_BASE, **kwargs})


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_mini", pretrained, **{**_MINI, **_DILATED, **kwargs})


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_tiny", pretrained, **{**_TINY, **_DILATED, **kwargs})


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_small", pretrained, **{**_SMALL, **_DILATED, **kwargs})


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_base", pretrained, **{**_BASE, **_DILATED, **kwargs})


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_large", pretrained, **{**_LARGE, **_DILATED, **kwargs})


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_large_384", pretrained, **{**_LARGE, "dilations": "classification_384", **kwargs})


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_large_384_11x11", pretrained, **{**_LARGE, **_DILATED, "kernel_size": 11, **kwargs})


@register_model
def dinat_large_21k(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_large_21k", pretrained, **{**_LARGE, **_DILATED, "drop_path_rate": 0.2, **kwargs})


@register_model
def dinat_large_21k_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat(
        "dinat_large_21k_11x11",
        pretrained,
        **{**_LARGE, **_DILATED, "kernel_size": 11, "drop_path_rate": 0.2, **kwargs},
    )


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_s_tiny", pretrained, **{**_S_TINY, **kwargs})


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_s_small", pretrained, **{**_S_SMALL, **kwargs})


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_s_base", pretrained, **{**_S_BASE, **kwargs})


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_s_large", pretrained, **{**_S_LARGE, **kwargs})


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_s_large_384", pretrained, **{**_S_LARGE, "dilations": "classification_384", **kwargs})


@register_model
def dinat_s_large_21k(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_s_large_21k", pretrained, **{**_S_LARGE, "drop_path_rate": 0.2, **kwargs})


@register_model
def test_dinat(pretrained: bool = False, **kwargs: Any) -> NAT:
    """Under 1M parameters; head dim 20 and a dilation per stage, for tests and first runs."""
    args = {"embed_dim": 20, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 4, 8), "kernel_size": 3, "mlp_ratio": 2.0}
    return _create_nat("test_dinat", pretrained, **{**args, "dilations": ((1, 4), (1, 2), (1, 2), (1,)), **kwargs})
