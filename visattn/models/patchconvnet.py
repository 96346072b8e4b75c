"""PatchConvNet: a convolutional trunk of constant resolution, pooled by attention of a class token, or one per class.

Paper: Augmenting Convolutional networks with attention-based aggregation (arXiv:2112.13692).
Official code: https://github.com/facebookresearch/deit, patchconvnet_models.py (Apache-2.0).

What differs from the official code, and why:
    * Images of any size (official: square ones, as the grid is taken to be the root of the number of tokens).
    * Maps are channels-last and 1x1 convolutions linear layers; every block of the trunk is a stage of its own, so that
      features are counted as in the other families. Class attention, the final norm and the classifier are the head:
      `forward_features` gives the map of the trunk, and the norm sees class tokens alone: nothing else is classified.
    * With a token per class the official classifiers, one of one output for each, are the rows of one linear layer.
      `checkpoint_filter_fn` brings official keys to ours.
"""

import re
from typing import Any, cast

import torch
from timm.layers import DropPath, LayerScale, global_pool_nlc, trunc_normal_
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from visattn import layers
from visattn.layers.attention import weight_and_bias
from visattn.models._backbone import Backbone, TellsAttended, convert_checkpoint, unwrap
from visattn.models._build import TOKEN_POOLS, build_model
from visattn.models._variants import Variant, imagenet_cfg, register_variants

__all__ = ["PatchConvNet"]

# B batch, H W map, C channels, n class tokens. Maps are [B, H, W, C] between the stem and the head.


class Stem(nn.Module):
    """Four 3x3 convolutions of stride 2 without bias, GELUs between them: [B, I, H, W] -> [B, H/16, W/16, dim]."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Sequential()
        widths = [in_chans, dim // 8, dim // 4, dim // 2, dim]
        for i in range(4):
            if i:
                self.conv.append(nn.GELU())
            self.conv.append(nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1, bias=False, **dd))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).permute(0, 2, 3, 1)  # [B, H/16, W/16, C]


class ConvBlock(nn.Module):
    """x + f(norm(x)); f: linear, depthwise convolution, squeeze and excitation, linear: [B, H, W, dim] -> the same."""

    def __init__(self, dim: int, layer_scale: float, drop_path: float, **dd: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.fc = nn.Linear(dim, dim, **dd)
        self.act = nn.GELU()
        self.dwconv = layers.DepthwiseConv(dim, 3, **dd)
        self.se = SqueezeExcite(dim, rd_ratio=0.25, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.ls = LayerScale(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.dwconv(self.act(self.fc(self.norm(x)))))  # [B, H, W, C]
        y = self.se(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [B, H, W, C]
        return x + self.drop_path(self.ls(self.proj(y)))


class ClassAttentionHead(nn.Module):
    """Pooling by class attention, norm, classifier; with the interface of timm's heads: [B, H, W, C] -> [B, classes].

    Without pooling by "token" there are no class tokens: averages and maxima of timm pool the map instead, "" leaves it
    as it is. Class tokens stay when the classifier is taken away, which then gives their mean.

    Args:
        in_features: Channels.
        num_classes: Width of the classifier; 0 leaves it out.
        pool_type: One of `TOKEN_POOLS`.
        drop_rate: Dropout before the classifier.
        token_per_class: Every class has a token, which its row of the classifier alone sees.
        layer_scale: Initial value of the per-channel scales.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str,
        drop_rate: float = 0.0,
        token_per_class: bool = False,
        layer_scale: float = 1e-4,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.num_features = in_features
        self.token_per_class = token_per_class
        self.layer_scale = layer_scale
        self.register_parameter("cls_token", None)
        self.block: nn.Module | None = None
        self.norm: nn.Module = nn.LayerNorm(in_features, eps=1e-6, **dd)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, **dd)

    def reset_parameters(self) -> None:
        """Truncated normal (std 0.02) for the class tokens."""
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        reset_other: bool = False,
        in_features: int | None = None,
        **dd: Any,
    ) -> None:
        """Replace the classifier and, if classes have tokens, those; None keeps pooling or width.

        Class attention comes and goes with pooling by "token"; `reset_other` drops the norm.
        """
        self.num_features = in_features or self.num_features
        self.global_pool = self.global_pool if pool_type is None else pool_type
        if reset_other:
            self.norm = nn.Identity()
        if self.global_pool != "token":
            self.cls_token = self.block = None
        else:
            self._build_attention(num_classes, **dd)
        fc = nn.Linear(self.num_features, num_classes, **dd) if num_classes else nn.Identity()
        self.fc = fc.train(self.training)

    def _build_attention(self, num_classes: int, **dd: Any) -> None:
        """What there is not yet of it, new tokens if there are other classes."""
        if self.block is None:
            args = {"layer_scale": self.layer_scale, "attend_tokens": not self.token_per_class}
            block = layers.ClassAttentionBlock(self.num_features, **args, **dd)
            layers.init_weights(block, needs_reset=False)
            self.block = block.train(self.training)
        old = 0 if self.cls_token is None else self.cls_token.shape[1]
        number = (num_classes or old or 1) if self.token_per_class else 1
        if number != old:
            self.cls_token = nn.Parameter(torch.empty(1, number, self.num_features, **dd))
            self.reset_parameters()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.block is None:
            x = x if self.global_pool == "" else global_pool_nlc(x.flatten(1, 2), self.global_pool, 0)
            x = self.drop(self.norm(x))  # [B, C] or [B, H, W, C]
            return x if pre_logits else self.fc(x)
        # no view of the parameter: FlopCounterMode fails on one as a module's input in inference mode
        tokens = cast(Tensor, self.cls_token).repeat(x.shape[0], 1, 1)  # [B, n, C]
        tokens = self.block(tokens, x)
        tokens = self.drop(self.norm(tokens))
        if pre_logits or isinstance(self.fc, nn.Identity) or not self.token_per_class:
            tokens = tokens.mean(1)  # [B, C]
            return tokens if pre_logits else self.fc(tokens)
        weight, bias = weight_and_bias(self.fc, tokens)
        return (tokens * weight).sum(-1) + bias  # [B, n]


class PatchConvNet(TellsAttended, Backbone):
    """PatchConvNet for images of any size.

    `attended(image)["head.block"]` has the maps by which class tokens see: "patches" [B, 1, n, H', W'], and where there
    is one token for all classes also "tokens" [B, 1, 1, 1], its own weight.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: "token" for class attention; "avg" and others of timm pool without; "" leaves pooling out.
        embed_dim: Channels, divisible by 8.
        depth: Blocks of the trunk.
        layer_scale: Initial value of the per-channel scales.
        token_per_class: One class token for each class; otherwise one for all.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, the same in all blocks of the trunk.
        out_norm: "layer" normalises every feature map that `features_only` returns; None returns them as they are.
        img_size: No effect, as for timm's models of any input size; accepted so that callers may always give it.

    Raises:
        ValueError: Channels that 8 does not divide.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 60,
        layer_scale: float = 1e-6,
        token_per_class: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: str | None = None,
        img_size: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, num_classes, global_pool, pools=TOKEN_POOLS)
        if embed_dim % 8:
            raise ValueError(f"expected embed_dim divisible by 8, got {embed_dim}; try {embed_dim // 8 * 8 + 8}")
        dd = {"device": device, "dtype": dtype}
        self.patch_embed = Stem(in_chans, embed_dim, **dd)
        self.stages = nn.Sequential()
        for i in range(depth):
            block = ConvBlock(embed_dim, layer_scale, drop_path_rate, **dd)
            self.stages.append(layers.Stage(nn.Identity(), [block]))
            self.feature_info.append({"num_chs": embed_dim, "reduction": 16, "module": f"stages.{i}"})
        head = ClassAttentionHead(embed_dim, num_classes, global_pool, drop_rate, token_per_class, layer_scale, **dd)
        self._build_head(drop_rate, out_norm, norm=nn.Identity(), head=head, **dd)

    def init_weights(self, needs_reset: bool = True) -> None:
        """As every family's; the trunk's linear layers, convolutions of the official code, as PyTorch starts them."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, ConvBlock):
                module.fc.reset_parameters()
                module.proj.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        """Patterns of parameters that weight decay leaves alone."""
        return {"*.cls_token"}


_URL = "https://dl.fbaipublicfiles.com/deit"


def _cfg(file: str = "", size: int = 224, **kwargs: Any) -> dict[str, Any]:
    fixed = {
        "pool_size": (size // 16, size // 16),
        "first_conv": "patch_embed.conv.0",
        "license": "apache-2.0",
        "origin_url": "https://github.com/facebookresearch/deit",
        "paper_ids": "arXiv:2112.13692",
    }
    return imagenet_cfg(size, url=f"{_URL}/{file}.pth" if file else "", **fixed, **kwargs)


def _tags(name: str, *sizes: int) -> dict[str, dict[str, Any]]:
    """Trained on ImageNet-1k; and trained on ImageNet-21k, then fine-tuned on ImageNet-1k at these sizes."""
    tags = {"in1k": _cfg(f"{name}_224_1k")}
    for size in sizes:
        tags["in21k_ft_in1k" + f"_{size}" * (size != 224)] = _cfg(f"{name}_{size}_21k", size)
    return tags


_S60 = {"embed_dim": 384, "depth": 60, "layer_scale": 1e-4}
_TEST = {"embed_dim": 32, "depth": 3, "layer_scale": 0.1}
_FOR_TESTS = "Under 1M parameters, for tests."

VARIANTS: dict[str, Variant] = {
    "patchconvnet_s60": Variant(_S60, _tags("s60", 224, 384, 512)),
    "patchconvnet_s120": Variant({"embed_dim": 384, "depth": 120}, _tags("s120")),
    "patchconvnet_b60": Variant({"embed_dim": 768, "depth": 60}, _tags("b60", 224, 384)),
    "patchconvnet_b120": Variant({"embed_dim": 768, "depth": 120}, _tags("b120", 224, 384)),
    "patchconvnet_l60": Variant({"embed_dim": 1024, "depth": 60}, {"untrained": _cfg()}),
    "patchconvnet_l120": Variant({"embed_dim": 1024, "depth": 120}, {"untrained": _cfg()}),
    "patchconvnet_s60_multi": Variant(
        {**_S60, "token_per_class": True},
        {"finetune_in1k": _cfg("s60_multi_finetune_1k"), "scratch_in1k": _cfg("s60_multi_scratch_1k")},
        doc="One token, and so one map of attention, per class.",
    ),
    "test_patchconvnet": Variant(_TEST, {"untrained": _cfg(size=160)}, doc=_FOR_TESTS),
    "test_patchconvnet_multi": Variant(
        {**_TEST, "token_per_class": True}, {"untrained": _cfg(size=160)}, doc=_FOR_TESTS
    ),
}

_TRUNK = {"0": "fc", "2": "dwconv", "4": "se", "5": "proj"}  # places in the official `qkv_pos`


def _convert(key: str, value: Tensor) -> tuple[str, Tensor]:
    """Key and value, official to ours."""
    if match := re.match(r"blocks\.(\d+)\.(.+)", key):
        rest = match[2].replace("norm1.", "norm.").replace("gamma_1", "ls.gamma")
        rest = re.sub(r"^attn\.qkv_pos\.(\d)", lambda m: _TRUNK[m[1]], rest)
        value = value.flatten(1) if rest in ("fc.weight", "proj.weight") else value
        return f"stages.{match[1]}.blocks.0.{rest}", value
    key = re.sub(r"^patch_embed\.proj\.(\d)\.0\.", r"patch_embed.conv.\1.", key)
    key = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key.replace("blocks_token_only.0.", "head.block."))
    return re.sub(r"^(norm\.|cls_token)", r"head.\1", key), value


def _join(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official parameters of one layer each joined: keys and values, and the classifiers of class tokens."""
    state_dict, heads = dict(state_dict), {}
    for key in list(state_dict):
        if match := re.fullmatch(r"(blocks_token_only\.0\.attn)\.k\.(weight|bias)", key):
            parts = [state_dict.pop(f"{match[1]}.{part}.{match[2]}") for part in ("k", "v")]
            state_dict[f"{match[1]}.kv.{match[2]}"] = torch.cat(parts)
        elif match := re.fullmatch(r"head\.(\d+)\.(weight|bias)", key):
            heads.setdefault(match[2], {})[int(match[1])] = state_dict.pop(key)
    for kind, rows in heads.items():
        state_dict[f"head.{kind}"] = torch.cat([rows[i] for i in range(len(rows))])
    return state_dict


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename official keys, join official layers and leave out tokens of other classes; native keys pass unchanged."""
    converted = convert_checkpoint(_join(unwrap(state_dict)), model, _convert)
    tokens = cast(Any, model.head).cls_token
    if tokens is not None and "head.cls_token" in converted and converted["head.cls_token"].shape != tokens.shape:
        del converted["head.cls_token"]
    return converted


def _create_patchconvnet(variant: str, pretrained: bool = False, **kwargs: Any) -> PatchConvNet:
    return build_model(PatchConvNet, variant, pretrained, checkpoint_filter_fn, 3, **kwargs)


register_variants(__name__, VARIANTS, _create_patchconvnet)
