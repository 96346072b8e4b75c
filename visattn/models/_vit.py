"""timm's vision transformer for images of any size, of blocks that know the map that their tokens come from."""

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from timm.layers import to_2tuple
from timm.models import checkpoint, vision_transformer
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from visattn import layers
from visattn.models._build import TOKEN_POOLS, check_classifier
from visattn.ops import resize_rel_pos
from visattn.ops.geometry import ceil_div
from visattn.weights import ChecksWeights

torch.fx.wrap("resize_rel_pos")

# B batch, H W map of patches, C channels. Tokens are [B, P + H * W, C], P = 1 if the class token is among them: first.


def _resize_positions(table: Tensor, learned: list[int], size: list[int]) -> Tensor:
    """[1, P + h * w, C] for maps of `learned` (h, w), P prefix tokens first -> [1, P + H * W, C] for maps of `size`."""
    prefix = table.shape[1] - learned[0] * learned[1]
    grid = table[0, prefix:].transpose(0, 1).unflatten(1, learned)  # [C, h, w]
    grid = resize_rel_pos(grid, size).flatten(1).transpose(0, 1)  # [H * W, C]
    return torch.cat([table[:, :prefix], grid[None]], 1)  # [1, P + H * W, C]


class TokenTransformer(ChecksWeights, vision_transformer.VisionTransformer):
    """timm's VisionTransformer with other attention; base class of families.

    Args:
        create_attn: From a block's number and the map (h, w) of `img_size` to its attention, which takes tokens and the
            size of their map.
        img_size: Image size that position parameters are made for. Images of any other size run as well.
        patch_size: Side of a patch in pixels.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: What is classified: "token" (the class token), or "avg" and others of timm over the patches.
        mlp_ratio: Hidden width of the MLPs over the channels.
        proj_drop_rate: Dropout after attention and MLP projections.
        class_token_at: Number of the block before which the class token joins. If not 0, it has no position.
        args: Further arguments of timm's VisionTransformer.

    Raises:
        ValueError: A classifier that would fail in forward.
    """

    def __init__(
        self,
        create_attn: Callable[[int, tuple[int, int]], nn.Module],
        img_size: int | tuple[int, int],
        patch_size: int,
        num_classes: int,
        global_pool: str,
        mlp_ratio: float,
        proj_drop_rate: float,
        class_token_at: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **args: Any,
    ) -> None:
        check_classifier(num_classes, global_pool, (*TOKEN_POOLS, "map", "prr"))
        height, width = (ceil_div(n, patch_size) for n in to_2tuple(img_size))

        def create_block(dim: int, depth: int, drop_path: float, **_: Any) -> nn.Module:
            """Block number `depth`; timm hands over more than is used here."""
            how: dict[str, Any] = {"eps": 1e-6, "device": device, "dtype": dtype}
            attn = create_attn(depth, (height, width))
            return layers.TokenTransformerBlock(dim, attn, mlp_ratio, proj_drop_rate, drop_path, **how)

        super().__init__(
            img_size=(height * patch_size, width * patch_size),
            patch_size=patch_size,
            num_classes=num_classes,
            global_pool=cast(Any, global_pool),
            no_embed_class=class_token_at > 0,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            block_fn=cast(Any, create_block),
            device=device,
            dtype=dtype,
            **args,
        )
        self.feat_size = [height, width]
        self.class_token_at = class_token_at
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

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's, which leaves out the class token, and the head, where the blocks that are kept do without it."""
        _, last = feature_take_indices(len(self.blocks), indices)
        if last < self.class_token_at:
            self.register_parameter("cls_token", None)
            prune_head = True
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def _with_class_token(self, x: Tensor) -> Tensor:
        token = cast(Tensor, self.cls_token)
        return torch.cat([token.expand(x.shape[0], -1, -1), x], 1)  # [B, 1 + H * W, C]

    def _embed(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """Tokens of images [B, in_chans, H, W], with positions, and the size of their map."""
        x = self.patch_embed(x)
        size = [x.shape[1], x.shape[2]]
        x = x.flatten(1, 2)  # [B, H * W, C]
        x = x if self.class_token_at else self._with_class_token(x)
        return self.pos_drop(x + _resize_positions(cast(Tensor, self.pos_embed), self.feat_size, size)), size

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
            Tokens [B, 1 + H' * W', C], the class token first if it has joined, normalised.
        """
        x, size = self._embed(x)
        for i, block in enumerate(islice(self.blocks, number)):
            if i and i == self.class_token_at:
                x = self._with_class_token(x)
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
            ValueError: Another output format, a mask, or the class token of blocks before it joins.
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"expected output_fmt 'NCHW', 'NHWC' or 'NLC', got {output_fmt!r}")
        if attn_mask is not None:
            raise ValueError("expected no attn_mask, got one; try timm's own vision transformers")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        if return_prefix_tokens and min(take_indices) < self.class_token_at:
            expected = (
                f"blocks from {self.class_token_at}, before which the class token joins, for return_prefix_tokens"
            )
            raise ValueError(f"expected {expected}, got {take_indices}; try without it")
        tokens: dict[int, Any] = dict.fromkeys(take_indices)
        size = [ceil_div(n, p) for n, p in zip(x.shape[2:], self.patch_embed.patch_size, strict=True)]
        x = self.forward_features(x, taken=tokens, number=max_index + 1 if stop_early else None)
        levels = []
        for i, y in tokens.items():
            y, prefix = self.norm(y) if norm else y, int(i >= self.class_token_at)
            level = y[:, prefix:]  # [B, L, C]
            level = level if output_fmt == "NLC" else level.unflatten(1, size)  # [B, H', W', C]
            if output_fmt == "NCHW":
                level = level.permute(0, 3, 1, 2).contiguous()  # [B, C, H', W']
            levels.append((level, y[:, :prefix]) if return_prefix_tokens else level)
        return levels if intermediates_only else (x, levels)
