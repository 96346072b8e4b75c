"""PVT as a token mixer backbone: a pyramid of plain transformer stages with a choice of attention, for any image size.

Papers: PVT (ICCV 2021, arXiv:2102.12122), Agent Attention (ECCV 2024, arXiv:2312.08874), InLine (NeurIPS 2024,
arXiv:2412.06590), FLatten (ICCV 2023, arXiv:2308.00442), Efficient Attention (WACV 2021, arXiv:1812.01243).
Official code: https://github.com/whai362/PVT (Apache-2.0) for the backbone. Where the other attentions go in it:
https://github.com/LeapLabTHU/Agent-Attention and https://github.com/LeapLabTHU/InLine, which state no licence; this
file is written from the papers.

What differs from the official code, and why:
    * Positions are resized wherever height or width differ from the trained ones. The official code looks at the number
      of tokens, and compares every stage's with stage 1's: 448 x 448 fails, other shapes get positions of wrong places.
    * Agents' biases and positions of focused attention are resized too, as in agent attention's dense code.
    * An image smaller than a patch is zero-padded to one (official: fails). Larger ones are cropped, as there.
    * `checkpoint_filter_fn` renames official keys: one `qkv` where keys are not reduced, and the position of the class
      token apart from those of the map.
    * Dropout of the attention weights and after the positions, which no published model uses, is left out.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import to_2tuple, trunc_normal_
from timm.models import checkpoint
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn

from visattn import layers
from visattn.models._backbone import Backbone, convert_checkpoint, drop_path_rates, plan_strides, unwrap
from visattn.models._build import NHWC_POOLS, TOKEN_POOLS
from visattn.models._token_mixer import create_token_mixer_backbone, fit_positions, plan_attention, token_mixer_cfg
from visattn.models._variants import Variant, deprecate_infix, register_variants

__all__ = ["PVT"]

# B batch, H W map, C channels.


class ClassTokenStage(nn.Module):
    """As `layers.Stage`, with a class token before those of the map: [B, H, W, C] -> [B, 1 + H' * W', C'].

    `blocks` are `layers.TokenTransformerBlock`s; `grad_checkpointing` recomputes their activations when training.
    """

    def __init__(
        self,
        downsample: nn.Module,
        blocks: list[nn.Module],
        dim: int,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, device=device, dtype=dtype))
        self.cls_pos_embed = nn.Parameter(torch.empty(1, 1, dim, device=device, dtype=dtype))
        self.blocks = nn.ModuleList(blocks)
        if dilation > 1:
            layers.dilate_convs(self.blocks, dilation)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal (std 0.02) for the class token and its position."""
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.cls_pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        size = [x.shape[1], x.shape[2]]
        token = (self.cls_token + self.cls_pos_embed).expand(x.shape[0], -1, -1)
        x = torch.cat([token, x.flatten(1, 2)], 1)  # [B, 1 + H' * W', C']
        for block in self.blocks:
            x = checkpoint(block, x, size) if self.grad_checkpointing else block(x, size)
        return x


class TokenHead(nn.Module):
    """timm's pooling of tokens, with the interface of its `ClassifierHead`: [B, 1 + L, C] -> [B, num_classes]."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str,
        drop_rate: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = in_features
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, device=device, dtype=dtype)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        reset_other: bool = False,
        in_features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Replace the classifier; None keeps the pooling or the width, `reset_other` has nothing else to reset."""
        if pool_type is not None:
            self.global_pool = pool_type
        self.num_features = in_features or self.num_features
        fc = nn.Linear(self.num_features, num_classes, device=device, dtype=dtype) if num_classes else nn.Identity()
        self.fc = fc.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(global_pool_nlc(x, self.global_pool))
        return x if pre_logits else self.fc(x)


class PVT(Backbone):
    """Pyramid Vision Transformer for images of any size, with a choice of attention.

    Feature maps are those of the patches. With a class token, `forward_features` returns tokens [B, 1 + H * W, C].

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: What is classified: "token" (the class token), or "avg" and others of timm over the patches; ""
            leaves the features as they are. Default: the class token if there is one, else "avg".
        img_size: Image size that position parameters are made for. Images of any other size run as well.
        patch_size: Side in pixels of the first stage's patches; each later stage has patches of twice the side.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        mlp_ratios: Hidden width of the MLPs over the channels, per stage.
        sr_ratios: Per stage, the factor per axis by which the map of keys and values is reduced.
        attention: Name of the attention, see `layers.TOKEN_MIXERS`.
        attention_depths: Per stage, how many of its first blocks use it, the others softmax attention. Default: all.
        attention_args: Own arguments of that attention's layer: a dict, or one per stage.
        class_token: Give the last stage a class token, and normalise its output.
        qkv_bias: Bias of the query, key and value projections.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after attention and MLP projections.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        out_norm: "layer" normalises every feature map that `features_only` returns; None returns them as they are.
        output_stride: 32, 16 or 8. Stages beyond it keep their map; convolutions are dilated instead, and keys and
            values are reduced by the same factors.

    Raises:
        ValueError: An unknown attention or pooling, or heads, sizes, depths, arguments or `output_stride` that do not
            fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (1, 1, 1, 1),
        attention: str = "softmax",
        attention_depths: Sequence[int] | None = None,
        attention_args: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        class_token: bool = False,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: str | None = None,
        output_stride: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if global_pool is None:
            global_pool = "token" if class_token else "avg"
        super().__init__(in_chans, num_classes, global_pool, pools=TOKEN_POOLS if class_token else NHWC_POOLS)
        dd = {"device": device, "dtype": dtype}
        plan = plan_attention(attention, depths, attention_depths, attention_args)
        if class_token and len(depths) < 2:
            raise ValueError(f"expected at least 2 stages with a class token, got {len(depths)}")
        self.class_level = len(depths) - 1 if class_token else None
        grids = _grids(img_size, patch_size, len(depths))
        rates = drop_path_rates(drop_path_rate, depths)
        steps = plan_strides(patch_size, (1, *[2] * (len(depths) - 1)), output_stride)
        self.last_stride = steps[-1][1]
        self.patch_embed = layers.PositionedTokenizer(in_chans, embed_dims[0], patch_size, grids[0], "NCHW", **dd)
        projections = {"qkv_bias": qkv_bias, "proj_drop": proj_drop_rate, **dd}
        self.stages = nn.Sequential()
        for i, (dim, mlp_ratio) in enumerate(zip(embed_dims, mlp_ratios, strict=True)):
            reduction, stride, before, dilation = steps[i]
            patches = {"stride": stride, "dilation": before, **dd}
            downsample = (
                layers.PositionedTokenizer(embed_dims[i - 1], dim, 2, grids[i], **patches) if i else nn.Identity()
            )
            has_token = i == self.class_level
            shared = {"num_prefix_tokens": int(has_token), "sr_ratio": sr_ratios[i], **projections}
            block_type = layers.TokenTransformerBlock if has_token else layers.TransformerBlock
            blocks: list[nn.Module] = []
            for rate, args in zip(rates[i], plan[i], strict=True):
                name = "softmax" if args is None else attention
                attn = layers.create_token_mixer(name, dim, num_heads[i], grids[i], **shared, **(args or {}))
                blocks.append(block_type(dim, attn, mlp_ratio, proj_drop_rate, rate, eps=1e-6, **dd))
            stage = partial(ClassTokenStage, dim=dim, **dd) if has_token else layers.Stage
            self.stages.append(stage(downsample, blocks, dilation=dilation))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        norm = nn.LayerNorm(dim, eps=1e-6, **dd) if class_token else nn.Identity()
        head = TokenHead(dim, num_classes, global_pool, drop_rate, **dd) if class_token else None
        self._build_head(drop_rate, out_norm, norm=norm, head=head, **dd)

    def no_weight_decay(self) -> set[str]:
        """Patterns of parameters that weight decay leaves alone; as in the official code, positions decay."""
        return {"*.cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters from stem to head, for layer-wise learning rates; a class token with its patches."""
        groups = super().group_matcher(coarse)
        if not coarse:
            groups["blocks"] = [(r"^stages\.(\d+)\.cls_", (0,)), *groups["blocks"]]
        return groups

    def forward_features(self, x: Tensor, *, maps: list[Tensor] | None = None, number: int | None = None) -> Tensor:
        """See `Backbone`; with a class token the result is tokens [B, 1 + H' * W', C'], and `maps` gets their map."""
        x = super().forward_features(x, maps=maps, number=number)
        if maps is not None and len(maps) - 1 == self.class_level:
            size = [torch.sym_max(1, n // self.last_stride) for n in maps[-2].shape[1:3]]
            maps[-1] = x[:, 1:].unflatten(1, size)  # [B, H', W', C']
        return x


def _grids(img_size: int | tuple[int, int], patch_size: int, number: int) -> list[tuple[int, int]]:
    """Maps (H, W) of the stages."""
    height, width = (max(1, n // patch_size) for n in to_2tuple(img_size))
    return [(max(1, height >> i), max(1, width >> i)) for i in range(number)]


_PVT = {"pool_size": None, "crop_pct": 0.875, "paper_ids": "arXiv:2102.12122"}


def _official(size: str) -> dict[str, Any]:
    origin = "https://github.com/whai362/PVT"
    url = f"{origin}/releases/download/v2/pvt_{size}.pth"
    return token_mixer_cfg("softmax", url=url, license="apache-2.0", origin_url=origin, **_PVT)


_SIZES = {
    "tiny": {"depths": (2, 2, 2, 2), "drop_path_rate": 0.1},
    "small": {"depths": (3, 4, 6, 3), "drop_path_rate": 0.1},
    "medium": {"depths": (3, 4, 18, 3), "drop_path_rate": 0.3},
    "large": {"depths": (3, 8, 27, 3), "drop_path_rate": 0.3},
}
_PLAIN = {"sr_ratios": (8, 4, 2, 1), "class_token": True}
_AGENT = {"attention": "agent", "attention_args": tuple({"num_agents": n} for n in (9, 16, 49, 49))}
_INLINE = {"attention": "inline", "num_heads": (2, 4, 10, 16)}
_TEST = {"patch_size": 2, "embed_dims": (24, 48, 72, 96), "depths": (1, 2, 1, 2), "num_heads": (1, 2, 3, 4)}
# Ids of the authors' files.
_AGENT_FILES = {
    "tiny": "13fdf0e0a7c5498c934f",
    "small": "36b8be9a8863456685a3",
    "medium": "4d00ecacf18b45f9b88c",
    "large": "040cfe0cfbbe4762ad09",
}
_INLINE_FILES = {
    "tiny": "90ac52b1555b401eb5e6",
    "small": "1ab953b2479d433080a3",
    "medium": "a72aec31e6084bc0a280",
    "large": "efd91318ba964f01b288",
}

VARIANTS: dict[str, Variant] = {
    "agent_pvt_medium_256": Variant(
        {**_SIZES["medium"], **_AGENT}, {"in1k": token_mixer_cfg("agent", "654df734121643b19c52", 256)}
    )
}
for _size, _args in _SIZES.items():
    VARIANTS |= {
        f"pvt_{_size}": Variant({**_args, **_PLAIN}, {"in1k": _official(_size)}),
        f"agent_pvt_{_size}": Variant({**_args, **_AGENT}, {"in1k": token_mixer_cfg("agent", _AGENT_FILES[_size])}),
        f"inline_pvt_{_size}": Variant({**_args, **_INLINE}, {"in1k": token_mixer_cfg("inline", _INLINE_FILES[_size])}),
        f"focused_pvt_{_size}": Variant({**_args, "attention": "focused"}, {"untrained": token_mixer_cfg("focused")}),
        f"efficient_pvt_{_size}": Variant(
            {**_args, "attention": "efficient"}, {"untrained": token_mixer_cfg("efficient")}
        ),
    }
VARIANTS |= {
    "test_pvt": Variant({**_TEST, **_PLAIN}, {"untrained": token_mixer_cfg("softmax", "", 160, **_PVT)}),
    "test_inline_pvt": Variant(
        {**_TEST, "attention": "inline"}, {"untrained": token_mixer_cfg("inline", "", 160, pool_size=(10, 10))}
    ),
}


def _convert(key: str, value: Tensor, number: int) -> tuple[str, Tensor]:
    """Key and value of a network of `number` stages, official to ours."""
    if key == "cls_token":
        return f"stages.{number - 1}.cls_token", value
    match = re.match(r"(patch_embed|pos_embed|block)(\d+)\.?(.*)", key)
    if match is None:
        return key, value
    part, stage, rest = match[1], int(match[2]) - 1, match[3]
    if part == "block":
        return f"stages.{stage}.blocks.{rest}", value
    if part == "pos_embed":  # of a square map
        side = math.isqrt(value.shape[1])
        rest, value = part, value.unflatten(1, (side, side))
    return (f"stages.{stage}.downsample.{rest}" if stage else f"patch_embed.{rest}"), value


def _rearrange(state_dict: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Official parameters joined to one `qkv` where keys are not reduced, and the class token's position parted."""
    state_dict = dict(state_dict)
    for key in list(state_dict):
        match = re.fullmatch(r"(block\d+\.\d+\.attn)\.q\.(weight|bias)", key)
        if match and f"{match[1]}.sr.weight" not in state_dict:
            parts = [state_dict.pop(f"{match[1]}.{part}.{match[2]}") for part in ("q", "kv")]
            state_dict[f"{match[1]}.qkv.{match[2]}"] = torch.cat(parts)
    positions = f"pos_embed{number}"
    if "cls_token" in state_dict and positions in state_dict:
        token, state_dict[positions] = state_dict[positions].tensor_split([1], 1)
        state_dict[f"stages.{number - 1}.cls_pos_embed"] = token
    return state_dict


def checkpoint_filter_fn(state_dict: dict[str, Any], model: PVT) -> dict[str, Tensor]:
    """Official classifiers, and the backbones of official detectors; native keys pass unchanged.

    Position parameters learned for another image size are resized to the model's: positions of tokens bicubic, agents'
    biases of rows and columns linear.
    """
    number = len(model.stages)
    official = _rearrange(unwrap(state_dict), number)
    return fit_positions(convert_checkpoint(official, model, lambda key, value: _convert(key, value, number)), model)


def _create_pvt(variant: str, pretrained: bool = False, **kwargs: Any) -> PVT:
    return create_token_mixer_backbone(PVT, variant, pretrained, checkpoint_filter_fn, **kwargs)


register_variants(__name__, VARIANTS, _create_pvt)
deprecate_infix(__name__, [name for name in VARIANTS if name.startswith(("pvt", "test_pvt"))])
