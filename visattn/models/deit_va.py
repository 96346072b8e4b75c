"""DeiT as a token mixer backbone: a plain vision transformer with a choice of attention, for images of any size.

Papers: DeiT (ICML 2021, arXiv:2012.12877), Agent Attention (ECCV 2024, arXiv:2312.08874), InLine (NeurIPS 2024,
arXiv:2412.06590), FLatten (ICCV 2023, arXiv:2308.00442), Efficient Attention (WACV 2021, arXiv:1812.01243).
The backbone is timm's. Where the other attentions go in it: https://github.com/LeapLabTHU/Agent-Attention and
https://github.com/LeapLabTHU/InLine, which state no licence; this file is written from the papers.

What differs from the official code, and why:
    * Any image size (official: the square one of the constructor). Images are zero-padded to whole patches, and
      position parameters resized to the map at hand, as the official loaders do for another resolution.
    * Dropout of the attention weights, which no published model uses, is left out.
"""

from functools import partial
from itertools import islice, product
from typing import Any, cast

import torch
from timm.layers import to_2tuple
from timm.models import checkpoint, vision_transformer
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from visattn import layers
from visattn.models._backbone import unwrap
from visattn.models._build import TOKEN_POOLS, check_classifier
from visattn.models._token_mixer import create_token_mixer_backbone, fit_positions, plan_attention, token_mixer_cfg
from visattn.models._variants import Variant, register_variants
from visattn.ops import resize_rel_pos
from visattn.ops.geometry import ceil_div
from visattn.weights import ChecksWeights

torch.fx.wrap("resize_rel_pos")

__all__ = ["DeiT"]

# B batch, H W map of patches, C channels. Tokens are [B, 1 + H * W, C], the class token first.


def _resize_positions(table: Tensor, learned: list[int], size: list[int]) -> Tensor:
    """[1, P + h * w, C] for maps of `learned` (h, w), P prefix tokens first -> [1, P + H * W, C] for maps of `size`."""
    prefix = table.shape[1] - learned[0] * learned[1]
    grid = table[0, prefix:].transpose(0, 1).unflatten(1, learned)  # [C, h, w]
    grid = resize_rel_pos(grid, size).flatten(1).transpose(0, 1)  # [H * W, C]
    return torch.cat([table[:, :prefix], grid[None]], 1)  # [1, P + H * W, C]


class DeiT(ChecksWeights, vision_transformer.VisionTransformer):
    """timm's VisionTransformer with other attention, whose blocks know the map that their tokens come from.

    Args:
        img_size: Image size that position parameters are made for. Images of any other size run as well.
        patch_size: Side of a patch in pixels.
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: What is classified: "token" (the class token), or "avg" and others of timm over the patches.
        embed_dim: Channels.
        depth: Number of blocks.
        num_heads: Heads per block.
        attention: Name of the attention, see `layers.TOKEN_MIXERS`.
        attention_depths: How many of the first blocks use it, the others softmax attention. Default: all.
        attention_args: Own arguments of that attention's layer.
        mlp_ratio: Hidden width of the MLPs over the channels.
        qkv_bias: Bias of the query, key and value projections.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embedding.
        proj_drop_rate: Dropout after attention and MLP projections.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: An unknown attention, or heads, depths or arguments that do not fit.
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
        num_heads: int = 3,
        attention: str = "softmax",
        attention_depths: int | None = None,
        attention_args: dict[str, Any] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_classifier(num_classes, global_pool, (*TOKEN_POOLS, "map", "prr"))
        numbers = None if attention_depths is None else [attention_depths]
        plan = plan_attention(attention, [depth], numbers, attention_args)[0]
        feat_size = tuple(ceil_div(n, patch_size) for n in to_2tuple(img_size))

        def create_block(dim: int, depth: int, proj_drop: float, drop_path: float, **_: Any) -> nn.Module:
            """Block number `depth`; timm hands over more than is used here."""
            dd = {"device": device, "dtype": dtype}
            args = plan[depth]
            name = "softmax" if args is None else attention
            shared = {"num_prefix_tokens": 1, "qkv_bias": qkv_bias, "proj_drop": proj_drop}
            attn = layers.create_token_mixer(name, dim, num_heads, feat_size, **shared, **(args or {}), **dd)
            return layers.TokenTransformerBlock(dim, attn, mlp_ratio, proj_drop, drop_path, eps=1e-6, **dd)

        super().__init__(
            img_size=tuple(n * patch_size for n in feat_size),
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=cast(Any, global_pool),
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            block_fn=cast(Any, create_block),
            device=device,
            dtype=dtype,
        )
        self.feat_size = list(feat_size)
        # pyrefly: ignore[bad-assignment]: timm runs a Sequential, this class each block with the size
        self.blocks = nn.ModuleList(self.blocks)  # whose own forward would hand over no size

    # pyrefly: ignore[bad-override]: there is no patch size to set
    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Nothing to do: the model takes images of any size."""

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's, which refuses what would fail in forward."""
        kept = () if self.attn_pool is None else (self.global_pool,)  # attention pooling cannot be added later
        check_classifier(num_classes, global_pool, (*TOKEN_POOLS, *kept))
        super().reset_classifier(num_classes, global_pool)

    def _embed(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """Tokens of images [B, in_chans, H, W], with positions, and the size of their map."""
        x = self.patch_embed(x)
        size = [x.shape[1], x.shape[2]]
        token, positions = cast(Tensor, self.cls_token), cast(Tensor, self.pos_embed)
        x = torch.cat([token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)  # [B, 1 + H * W, C]
        return self.pos_drop(x + _resize_positions(positions, self.feat_size, size)), size

    # pyrefly: ignore[bad-override]: no masks
    def forward_features(
        self, x: Tensor, *, taken: dict[int, Tensor] | None = None, number: int | None = None
    ) -> Tensor:
        """Image to tokens.

        Args:
            x: Images [B, in_chans, H, W].
            taken: The tokens after every block whose number is among its keys become the values.
            number: Blocks to go through; None for all.

        Returns:
            Tokens [B, 1 + H' * W', C], the class token first, normalised.
        """
        x, size = self._embed(x)
        for i, block in enumerate(islice(self.blocks, number)):
            x = checkpoint(block, x, size) if self.grad_checkpointing else block(x, size)
            if taken is not None and i in taken:
                taken[i] = x
        return self.norm(x)

    # pyrefly: ignore[bad-override]: no masks
    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    # pyrefly: ignore[bad-override]: no masks, and the class token has a place of its own
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        attn_mask: None = None,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Feature maps after the blocks.

        Args:
            x: Images [B, in_chans, H, W].
            indices: The last n blocks if an int, all if None, else these blocks.
            return_prefix_tokens: Return pairs (map, class token [B, 1, C]) in place of the maps.
            norm: Apply the final norm to the maps.
            stop_early: Skip the blocks after the last one asked for.
            output_fmt: "NCHW", "NHWC" or "NLC" (L = H' * W'), of the maps.
            intermediates_only: Return the maps alone.
            attn_mask: None, for callers that give timm's argument of this name.

        Returns:
            The maps, or (output of `forward_features`, maps).

        Raises:
            ValueError: Another output format, or a mask.
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"expected output_fmt 'NCHW', 'NHWC' or 'NLC', got {output_fmt!r}")
        if attn_mask is not None:
            raise ValueError("expected no attn_mask, got one; try timm's own vision transformers")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        tokens: dict[int, Any] = dict.fromkeys(take_indices)
        size = [ceil_div(n, p) for n, p in zip(x.shape[2:], self.patch_embed.patch_size, strict=True)]
        x = self.forward_features(x, taken=tokens, number=max_index + 1 if stop_early else None)
        levels = []
        for y in (self.norm(y) if norm else y for y in tokens.values()):
            level = y[:, 1:] if output_fmt == "NLC" else y[:, 1:].unflatten(1, size)  # [B, L, C] or [B, H', W', C]
            if output_fmt == "NCHW":
                level = level.permute(0, 3, 1, 2).contiguous()  # [B, C, H', W']
            levels.append((level, y[:, :1]) if return_prefix_tokens else level)
        return levels if intermediates_only else (x, levels)


def _cfg(attention: str, file: str = "", size: int = 224, **kwargs: Any) -> dict[str, Any]:
    return token_mixer_cfg(attention, file, size, **{"pool_size": None, "classifier": "head", **kwargs})


_PAPER = {"paper_ids": "arXiv:2012.12877"}


def _hub(name: str, size: int = 224, **kwargs: Any) -> dict[str, Any]:
    origin = {"license": "apache-2.0", "origin_url": "https://github.com/facebookresearch/deit", **_PAPER}
    return _cfg("softmax", "", size, hf_hub_id=f"timm/{name}_patch16_{size}.fb_in1k", **origin, **kwargs)


# `drop_path_rate` is as published for plain DeiTs and agent attention; InLine takes agent attention's.
_SIZES = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "base": {"embed_dim": 768, "num_heads": 12},
}
_AGENT_SMALL = {**_SIZES["small"], "attention": "agent", "drop_path_rate": 0.1}
_AGENT_BASE = {"attention": "agent", "attention_depths": 4, "attention_args": {"num_agents": 81}, "drop_path_rate": 0.3}
_TEST = {"embed_dim": 96, "depth": 4, "num_heads": 3}
_TEST_AGENT = {"attention": "agent", "attention_depths": 3, "attention_args": {"num_agents": 9}}

VARIANTS: dict[str, Variant] = {
    "deit_tiny_va": Variant({**_SIZES["tiny"], "drop_path_rate": 0.1}, {"fb_in1k": _hub("deit_tiny")}),
    "deit_small_va": Variant({**_SIZES["small"], "drop_path_rate": 0.1}, {"fb_in1k": _hub("deit_small")}),
    "deit_base_va": Variant(
        {**_SIZES["base"], "drop_path_rate": 0.1},
        {"fb_in1k": _hub("deit_base"), "fb_in1k_384": _hub("deit_base", 384, crop_pct=1.0)},
    ),
    "agent_deit_tiny": Variant(
        {**_SIZES["tiny"], "attention": "agent"}, {"in1k": _cfg("agent", "57e0904221824ee7b7af")}
    ),
    "agent_deit_small": Variant(_AGENT_SMALL, {"in1k": _cfg("agent", "fdd43304372541db8ea7")}),
    "agent_deit_small_448": Variant(_AGENT_SMALL, {"in1k": _cfg("agent", "a228f86241c445f1969b", 448)}),
    "agent_deit_base": Variant(
        {**_SIZES["base"], **_AGENT_BASE},
        {"in1k": _cfg("agent", "5115f15fdd7e4ab58fbc")},
        doc="81 agents in the first four blocks, softmax attention in the others.",
    ),
    "inline_deit_tiny": Variant(
        {"embed_dim": 192, "num_heads": 6, "attention": "inline"}, {"in1k": _cfg("inline", "1d6b8191ad6d4114b291")}
    ),
    "inline_deit_small": Variant(
        {"embed_dim": 320, "num_heads": 10, "attention": "inline", "drop_path_rate": 0.1},
        {"in1k": _cfg("inline", "2f3898b07e9247f3beb3", 288)},
    ),
    "inline_deit_base": Variant(
        {"embed_dim": 384, "num_heads": 12, "attention": "inline", "drop_path_rate": 0.3},
        {"in1k": _cfg("inline", "10bdd726d4b0435eb34e", 448)},
    ),
    "test_deit_va": Variant(
        _TEST, {"untrained": _cfg("softmax", "", 160, **_PAPER)}, doc="Under 1M parameters, for tests."
    ),
    "test_agent_deit": Variant(
        {**_TEST, **_TEST_AGENT},
        {"untrained": _cfg("agent", "", 160)},
        doc="Under 1M parameters, the last block with softmax attention, for tests.",
    ),
}
for _attention, _size in product(("focused", "efficient"), _SIZES):
    VARIANTS[f"{_attention}_deit_{_size}"] = Variant(
        {**_SIZES[_size], "attention": _attention}, {"untrained": _cfg(_attention)}
    )


def checkpoint_filter_fn(state_dict: dict[str, Any], model: DeiT) -> dict[str, Tensor]:
    """Official and timm's classifiers; native keys pass unchanged.

    Position parameters learned for another image size are resized to the model's: positions of tokens bicubic, agents'
    biases of rows and columns linear.
    """
    return fit_positions(vision_transformer.checkpoint_filter_fn(unwrap(state_dict), model, antialias=False), model)


def _create_deit(variant: str, pretrained: bool = False, **kwargs: Any) -> DeiT:
    return create_token_mixer_backbone(DeiT, variant, pretrained, checkpoint_filter_fn, levels=3, **kwargs)


register_variants(__name__, VARIANTS, _create_deit)
