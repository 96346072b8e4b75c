"""Isotropic NAT and DiNAT, and their baseline ViT with relative position bias (vitrpb).

Paper: Dilated Neighborhood Attention Transformer (arXiv:2209.15001), section on isotropic variants. Official code:
https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT).

What differs from the official code, and why:
    * Any image size (official: 224 x 224 only): images are padded to whole patches, maps smaller than
      kernel x dilation as in `visattn.models.nat`, and vitrpb interpolates its position table.
    * Layers are called `blocks`. `checkpoint_filter_fn` renames official keys.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from visattn import layers
from visattn.ops import resize_rel_pos

__all__ = ["IsotropicNAT"]

# B batch, H W map, C channels. Maps are [B, H, W, C] between the stem and the head.


class IsotropicNAT(nn.Module):
    """One patch embedding, then blocks of equal width: NAT, DiNAT or, without a kernel size, a ViT.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: Pooling before the classifier; "" leaves it out.
        patch_size: Side of a patch in pixels.
        embed_dim: Channels.
        depth: Number of blocks.
        num_heads: Heads per block.
        kernel_size: Neighborhood size per axis, odd; None is global attention.
        dilations: "none", "classification" (1 and 2 in turn), or one dilation per block.
        rel_pos_size: Side in patches of the maps for which global attention learns its position table.
        mlp_ratio: Hidden width of the MLPs over the channels.
        qkv_bias: Bias of the query, key and value projections.
        layer_scale: Initial value of layer scale; None leaves it out.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after attention and MLP projections.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: Dilations that do not fit the depth.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        kernel_size: int | None = 7,
        dilations: str | Sequence[int] = "none",
        rel_pos_size: int = 14,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
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
        self.num_features = embed_dim
        self.output_fmt = "NHWC"
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]

        presets = {"none": [1] * depth, "classification": [1 + i % 2 for i in range(depth)]}
        if isinstance(dilations, str) and dilations not in presets:
            raise ValueError(f"expected dilations of one of {sorted(presets)} or one int per block, got {dilations!r}")
        steps = presets[dilations] if isinstance(dilations, str) else list(dilations)
        if len(steps) != depth:
            raise ValueError(f"expected {depth} dilations, one per block, got {len(steps)}")

        self.patch_embed = layers.PatchTokenizer(in_chans, embed_dim, patch_size, **dd)
        self.blocks = nn.Sequential()
        for dilation, rate in zip(steps, calculate_drop_path_rates(drop_path_rate, depth), strict=True):
            attn: nn.Module
            if kernel_size is None:
                attn = layers.GlobalAttention(embed_dim, num_heads, rel_pos_size, qkv_bias, proj_drop_rate, **dd)
            else:
                attn = layers.NeighborhoodAttention(
                    embed_dim, num_heads, kernel_size, dilation, qkv_bias, proj_drop=proj_drop_rate, **dd
                )
            block = layers.TransformerBlock(embed_dim, attn, mlp_ratio, proj_drop_rate, rate, layer_scale, **dd)
            self.blocks.append(block)
        self.norm = nn.LayerNorm(embed_dim, **dd)
        self.head = ClassifierHead(
            embed_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt, **dd
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
        return {"stem": r"^patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; `global_pool=None` keeps the pooling."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def _forward_blocks(self, x: Tensor, number: int) -> list[Tensor]:
        """The outputs of the first `number` blocks for an image."""
        x = self.patch_embed(x)
        outputs = []
        for i, block in enumerate(self.blocks):
            if i < number:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x)
                else:
                    x = block(x)
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
        """Feature maps of blocks.

        Args:
            x: Images [B, in_chans, H, W].
            indices: The last n blocks if an int, all if None, else these blocks.
            norm: Apply the final norm to all maps (they have one width).
            stop_early: Skip the blocks after the last one asked for.
            output_fmt: "NCHW" or "NHWC", of the intermediate maps.
            intermediates_only: Return the maps alone.

        Returns:
            The maps, or (output of `forward_features`, maps).
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"expected output_fmt 'NCHW' or 'NHWC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        maps = self._forward_blocks(x, max_index + 1 if stop_early else len(self.blocks))
        taken = [self.norm(maps[i]) if norm else maps[i] for i in take_indices]
        if output_fmt == "NCHW":
            taken = [t.permute(0, 3, 1, 2).contiguous() for t in taken]
        return taken if intermediates_only else (self.norm(maps[-1]), taken)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates(indices)` does not need; returns the absolute indices."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> normalised map [B, H/patch, W/patch, embed_dim]."""
        return self.norm(self._forward_blocks(x, len(self.blocks))[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify the map of `forward_features`; `pre_logits` stops before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _cfg(name: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": f"https://shi-labs.com/projects/dinat/checkpoints/isotropic/{name}_in1k_224.pth" if name else "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (14, 14),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "paper_ids": "arXiv:2209.15001",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "nat_isotropic_small.in1k": _cfg("nat_isotropic_small"),
        "nat_isotropic_base.in1k": _cfg("nat_isotropic_base"),
        "dinat_isotropic_small.in1k": _cfg("dinat_isotropic_small"),
        "dinat_isotropic_base.in1k": _cfg("dinat_isotropic_base"),
        "vitrpb_small.in1k": _cfg("vitrpb_small"),
        "vitrpb_base.in1k": _cfg("vitrpb_base"),
        "test_dinat_isotropic.untrained": _cfg(input_size=(3, 160, 160), pool_size=(10, 10)),
        "test_isotropic_vitrpb.untrained": _cfg(input_size=(3, 160, 160), pool_size=(10, 10)),
    }
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename official keys and fit relative position tables to the model's; native keys pass unchanged."""
    state_dict = state_dict.get("model", state_dict)
    state_dict = state_dict.get("state_dict", state_dict)
    own = model.state_dict()
    filtered = {}
    for key, value in state_dict.items():
        if key.endswith(".relative_position_index"):
            continue
        key = re.sub(r"^layers\.", "blocks.", key)
        key = re.sub(r"\.gamma([12])$", r".ls\1.gamma", key)
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        if key.endswith(".rpb") and key in own:
            value = resize_rel_pos(value, own[key].shape[1:])
        filtered[key] = value
    return filtered


def _create_isotropic(variant: str, pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        IsotropicNAT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


_TEST = {"embed_dim": 64, "depth": 4, "num_heads": 2}
_SMALL = {"embed_dim": 384, "num_heads": 12, "drop_path_rate": 0.1}
_BASE = {"embed_dim": 768, "num_heads": 24, "drop_path_rate": 0.4}


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    return _create_isotropic("nat_isotropic_small", pretrained, **{**_SMALL, **kwargs})


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    return _create_isotropic("nat_isotropic_base", pretrained, **{**_BASE, **kwargs})


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    return _create_isotropic("dinat_isotropic_small", pretrained, **{**_SMALL, "dilations": "classification", **kwargs})


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    return _create_isotropic("dinat_isotropic_base", pretrained, **{**_BASE, "dilations": "classification", **kwargs})


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    return _create_isotropic("vitrpb_small", pretrained, **{**_SMALL, "kernel_size": None, **kwargs})


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    return _create_isotropic("vitrpb_base", pretrained, **{**_BASE, "kernel_size": None, **kwargs})


@register_model
def test_dinat_isotropic(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """Under 1M parameters, for tests."""
    args = {**_TEST, "kernel_size": 3, "dilations": "classification"}
    return _create_isotropic("test_dinat_isotropic", pretrained, **{**args, **kwargs})


@register_model
def test_isotropic_vitrpb(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """Under 1M parameters, for tests."""
    return _create_isotropic(
        "test_isotropic_vitrpb", pretrained, **{**_TEST, "kernel_size": None, "rel_pos_size": 10, **kwargs}
    )
