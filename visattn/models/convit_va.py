"""ConViT: a vision transformer whose first blocks start as convolutions and learn, head by head, to leave locality.

Paper: ConViT (ICML 2021, arXiv:2103.10697). Official repository: https://github.com/facebookresearch/convit, whose
licence file is Apache-2.0 and whose file headers say CC-BY-NC. No line is copied from it; weights, Facebook's and
timm's, load.

What differs from the official code, and why:
    * Any image size (official: the square one of the constructor). Images are zero-padded to whole patches, positions
      resized to the map at hand, and displacements are those of its true grid.
    * Attention to positions is two small products per head, with the same result: see `visattn.ops.gated_positional`.
    * Queries, keys and values come from one projection `qkv` everywhere.
    * Dropout of the attention weights, which no published model uses, is left out.
"""

from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import vision_transformer
from torch import Tensor, nn

from visattn import layers
from visattn.models._backbone import TellsAttended, unwrap
from visattn.models._build import build_model
from visattn.models._variants import Variant, imagenet_cfg, register_variants
from visattn.models._vit import TokenTransformer

__all__ = ["ConViT"]


class ConViT(TellsAttended, TokenTransformer):
    """ConViT.

    Args:
        img_size: Image size that positions are learned for. Images of any other size run as well.
        patch_size: Side of a patch in pixels.
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: What is classified: "token" (the class token), or "avg" and others of timm over the patches.
        embed_dim: Channels.
        depth: Number of blocks.
        num_heads: Heads per block.
        local_up_to: How many of the first blocks have gated positional attention, at least 1 and not all. The class
            token joins after them.
        locality_strength: How sharply their heads look at their place when they start.
        mlp_ratio: Hidden width of the MLPs over the channels.
        qkv_bias: Bias of the query, key and value projections.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embedding.
        proj_drop_rate: Dropout after attention and MLP projections.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: Heads or depths that do not fit.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        local_up_to: int = 10,
        locality_strength: float = 1.0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 1 <= local_up_to < depth:
            raise ValueError(f"expected local_up_to from 1 to {depth - 1} of {depth} blocks, got {local_up_to}")
        dd = {"device": device, "dtype": dtype}

        def create_attn(number: int, feat_size: tuple[int, int]) -> nn.Module:
            shared: dict[str, Any] = {"qkv_bias": qkv_bias, "proj_drop": proj_drop_rate, **dd}
            if number < local_up_to:
                strength = {"locality_strength": locality_strength}
                return layers.GatedPositionalAttention(embed_dim, num_heads, **strength, **shared)
            return layers.SoftmaxAttention(embed_dim, num_heads, feat_size, num_prefix_tokens=1, **shared)

        super().__init__(
            create_attn,
            img_size,
            patch_size,
            num_classes,
            global_pool,
            mlp_ratio,
            proj_drop_rate,
            class_token_at=local_up_to,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
        )

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's, with a class token like the other weights."""
        super().init_weights(mode, needs_reset)
        trunc_normal_(self.cls_token, std=0.02)


def _cfg(name: str = "", size: int = 224) -> dict[str, Any]:
    cfg: dict[str, Any] = {"pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head"}
    if name:
        cfg |= {"hf_hub_id": f"timm/{name}.fb_in1k", "license": "apache-2.0"}
        cfg["origin_url"] = "https://github.com/facebookresearch/convit"
    return imagenet_cfg(size, paper_ids="arXiv:2103.10697", **cfg)


def _variant(name: str, num_heads: int) -> Variant:
    args = {"embed_dim": 48 * num_heads, "num_heads": num_heads, "drop_path_rate": 0.1}
    return Variant(args, {"fb_in1k": _cfg(name)})


VARIANTS: dict[str, Variant] = {
    "convit_tiny_va": _variant("convit_tiny", 4),
    "convit_small_va": _variant("convit_small", 9),
    "convit_base_va": _variant("convit_base", 16),
    "test_convit_va": Variant(
        {"embed_dim": 32, "depth": 3, "num_heads": 4, "local_up_to": 2},
        {"untrained": _cfg(size=160)},
        doc="Under 1M parameters, for tests.",
    ),
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: ConViT) -> dict[str, Tensor]:
    """Facebook's and timm's files, whose `qk` and `v` become `qkv`; native keys pass unchanged.

    Positions learned for another image size are resized to the model's, bicubically.
    """
    state_dict = unwrap(state_dict)
    converted = {}
    for key, value in state_dict.items():
        name, dot, end = key.rpartition(".qk.")
        if dot:
            key, value = f"{name}.qkv.{end}", torch.cat([value, state_dict[f"{name}.v.{end}"]])
        if ".attn.v." not in key:
            converted[key] = value
    return vision_transformer.checkpoint_filter_fn(converted, model, antialias=False)


def _create_convit(variant: str, pretrained: bool = False, **kwargs: Any) -> ConViT:
    return build_model(ConViT, variant, pretrained, checkpoint_filter_fn, 3, **kwargs)


register_variants(__name__, VARIANTS, _create_convit)
