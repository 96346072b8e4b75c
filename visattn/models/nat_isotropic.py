"""Isotropic NAT and DiNAT, and their baseline ViT with relative position bias (vitrpb).

Paper: Dilated Neighborhood Attention Transformer (arXiv:2209.15001), section on isotropic variants. Official code:
https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT).

What differs from the official code, and why:
    * Any image size (official: 224 x 224 only): images are padded to whole patches, maps smaller than
      kernel x dilation as in `visattn.models.nat`, and vitrpb interpolates its position table.
    * Every layer is a stage of one block, so that features are counted as in the other families.
      `checkpoint_filter_fn` renames official keys.
"""

import re
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from visattn import layers
from visattn.models._backbone import Backbone, convert_checkpoint, drop_path_rates
from visattn.models._build import build_model
from visattn.models._variants import Variant, imagenet_cfg, register_variants

__all__ = ["IsotropicNAT"]


class IsotropicNAT(Backbone):
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
        out_norm: "layer" normalises every feature map that `features_only` returns; None returns them as they are.
        img_size: No effect, as for timm's models of any input size; accepted so that callers may always give it.

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
        out_norm: str | None = None,
        img_size: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, num_classes, global_pool)
        dd = {"device": device, "dtype": dtype}
        presets = {"none": [1] * depth, "classification": [1 + i % 2 for i in range(depth)]}
        if isinstance(dilations, str) and dilations not in presets:
            raise ValueError(f"expected dilations of one of {sorted(presets)} or one int per block, got {dilations!r}")
        steps = presets[dilations] if isinstance(dilations, str) else list(dilations)
        if len(steps) != depth:
            raise ValueError(f"expected {depth} dilations, one per block, got {len(steps)}")

        self.patch_embed = layers.PatchTokenizer(in_chans, embed_dim, patch_size, **dd)
        self.stages = nn.Sequential()
        rates = drop_path_rates(drop_path_rate, [depth])[0]
        for i, (dilation, rate) in enumerate(zip(steps, rates, strict=True)):
            attn: nn.Module
            if kernel_size is None:
                attn = layers.GlobalAttention(embed_dim, num_heads, rel_pos_size, qkv_bias, proj_drop_rate, **dd)
            else:
                attn = layers.NeighborhoodAttention(
                    embed_dim, num_heads, kernel_size, dilation, qkv_bias, proj_drop=proj_drop_rate, **dd
                )
            block = layers.TransformerBlock(embed_dim, attn, mlp_ratio, proj_drop_rate, rate, layer_scale, **dd)
            self.stages.append(layers.Stage(nn.Identity(), [block]))
            self.feature_info.append({"num_chs": embed_dim, "reduction": patch_size, "module": f"stages.{i}"})
        self._build_head(drop_rate, out_norm, **dd)

    def no_weight_decay(self) -> set[str]:
        """Patterns of parameters that weight decay leaves alone."""
        return {"*.rpb"}


_cfg = partial(
    imagenet_cfg,
    url="",
    pool_size=(14, 14),
    first_conv="patch_embed.proj",
    license="mit",
    origin_url="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    paper_ids="arXiv:2209.15001",
)
_SIZES = {
    "small": {"embed_dim": 384, "num_heads": 12, "drop_path_rate": 0.1},
    "base": {"embed_dim": 768, "num_heads": 24, "drop_path_rate": 0.4},
}
_KINDS = {"nat_isotropic": {}, "dinat_isotropic": {"dilations": "classification"}, "vitrpb": {"kernel_size": None}}
_TEST = {"embed_dim": 64, "depth": 4, "num_heads": 2}
_TEST_TAGS = {"untrained": _cfg(160, pool_size=(10, 10))}
_FOR_TESTS = "Under 1M parameters, for tests."

VARIANTS: dict[str, Variant] = {
    "test_dinat_isotropic": Variant(
        {**_TEST, "kernel_size": 3, "dilations": "classification"}, _TEST_TAGS, doc=_FOR_TESTS
    ),
    "test_isotropic_vitrpb": Variant({**_TEST, "kernel_size": None, "rel_pos_size": 10}, _TEST_TAGS, doc=_FOR_TESTS),
}
for _name, _size in product(_KINDS, _SIZES):
    _url = f"https://shi-labs.com/projects/dinat/checkpoints/isotropic/{_name}_{_size}_in1k_224.pth"
    VARIANTS[f"{_name}_{_size}"] = Variant({**_SIZES[_size], **_KINDS[_name]}, {"in1k": _cfg(url=_url)})


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename official keys and fit relative position tables to the model's; native keys pass unchanged."""

    def convert(key: str, value: Tensor) -> tuple[str, Tensor]:
        return re.sub(r"^layers\.(\d+)\.", r"stages.\1.blocks.0.", key), value

    return convert_checkpoint(state_dict, model, convert)


def _create_isotropic(variant: str, pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    return build_model(IsotropicNAT, variant, pretrained, checkpoint_filter_fn, 3, **kwargs)


register_variants(__name__, VARIANTS, _create_isotropic)
