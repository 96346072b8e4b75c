"""Neighborhood Attention Transformer: NAT, DiNAT and DiNAT_s.

Papers: Neighborhood Attention Transformer (CVPR 2023, arXiv:2204.07143), Dilated Neighborhood Attention Transformer
(arXiv:2209.15001). Official code: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT).

What differs from the official code, and why:
    * A stage begins with its downsampler (official: ends with it), so that a stage's output is its feature map;
      layers are called `stages` in every variant. `checkpoint_filter_fn` renames official keys, and transformers'.
    * Any image size: maps smaller than kernel x dilation are padded as natten 0.14 did (the natten that the weights
      were trained with); later natten versions refuse them.
    * Dilations are an argument. They do not change the parameters, so one checkpoint serves all tasks.
    * `output_stride` 16 and 8, for dense prediction.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visattn import layers
from visattn.models._backbone import Backbone, convert_checkpoint, drop_path_rates, plan_strides, unwrap
from visattn.models._build import build_model
from visattn.models._variants import Variant, imagenet_cfg, register_variants

__all__ = ["NAT"]

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


class NAT(Backbone):
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
        out_norm: "layer" normalises every feature map that `features_only` returns; None returns them as they are.
        output_stride: 32, 16 or 8. Stages beyond it keep their map, and their dilations are multiplied by the strides
            left out: at every 2nd (4th) position the last map is that of the network of stride 32, exactly.
        img_size: No effect, as for timm's models of any input size; accepted so that callers may always give it.

    Raises:
        ValueError: Dilations, heads or `output_stride` that do not fit.
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
        out_norm: str | None = None,
        output_stride: int = 32,
        img_size: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, num_classes, global_pool)
        dd = {"device": device, "dtype": dtype}
        if overlapped:
            self.patch_embed = layers.ConvTokenizer(in_chans, embed_dim, **dd)
        else:
            self.patch_embed = layers.PatchTokenizer(in_chans, embed_dim, 4, **dd)
        downsampler = layers.ConvDownsampler if overlapped else layers.PatchMerging
        rates = drop_path_rates(drop_path_rate, depths)
        plan = plan_strides(4, (1, *[2] * (len(depths) - 1)), output_stride)
        self.stages = nn.Sequential()
        for i, stage_dilations in enumerate(resolve_dilations(dilations, depths)):
            dim = embed_dim * 2**i
            reduction, stride, before, factor = plan[i]
            blocks = []
            for dilation, rate in zip(stage_dilations, rates[i], strict=True):
                attn = layers.NeighborhoodAttention(
                    dim, num_heads[i], kernel_size, factor * dilation, qkv_bias, proj_drop=proj_drop_rate, **dd
                )
                blocks.append(layers.TransformerBlock(dim, attn, mlp_ratio, proj_drop_rate, rate, layer_scale, **dd))
            downsample = downsampler(dim // 2, stride=stride, dilation=before, **dd) if i else nn.Identity()
            self.stages.append(layers.Stage(downsample, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self._build_head(drop_rate, out_norm, **dd)

    def no_weight_decay(self) -> set[str]:
        """Patterns of parameters that weight decay leaves alone."""
        return {"*.rpb"}


_cfg = partial(
    imagenet_cfg,
    url="",
    first_conv="patch_embed.conv.0",
    license="mit",
    origin_url="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    paper_ids=("arXiv:2204.07143", "arXiv:2209.15001"),
)
_URL = "https://shi-labs.com/projects"


def _in1k(file: str, **kwargs: Any) -> dict[str, Any]:
    return _cfg(url=f"{_URL}/dinat/checkpoints/imagenet1k/{file}.pth", **kwargs)


def _in22k(file: str, **kwargs: Any) -> dict[str, Any]:
    return _cfg(url=f"{_URL}/dinat/checkpoints/imagenet22k/{file}.pth", num_classes=21841, **kwargs)


_SIZE_384 = {"size": 384, "crop_pct": 1.0}
_PATCH = {"first_conv": "patch_embed.proj"}
_DILATED = {"dilations": "classification"}
_DILATED_384 = {"dilations": "classification_384"}

_SMALL = {
    "embed_dim": 96,
    "depths": (3, 4, 18, 5),
    "num_heads": (3, 6, 12, 24),
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.3,
}
_MINI = {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0, "drop_path_rate": 0.2}
_BASE = {**_SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "layer_scale": 1e-5, "drop_path_rate": 0.5}
_SIZES = {"mini": _MINI, "tiny": {**_MINI, "depths": (3, 4, 18, 5)}, "small": _SMALL, "base": _BASE}
_LARGE = {**_SMALL, "embed_dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35}
_LARGE_21K = {**_LARGE, **_DILATED, "drop_path_rate": 0.2}

_S_TINY = {**_SMALL, **_DILATED, "depths": (2, 2, 6, 2), "mlp_ratio": 4.0, "overlapped": False, "drop_path_rate": 0.2}
_S_SMALL = {**_S_TINY, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
_S_BASE = {**_S_SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}
_S_SIZES = {"tiny": _S_TINY, "small": _S_SMALL, "base": _S_BASE}
_S_LARGE = {**_S_SMALL, "embed_dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35}

_TEST = {
    "embed_dim": 20,
    "depths": (2, 2, 2, 1),
    "num_heads": (1, 2, 4, 8),
    "kernel_size": 3,
    "mlp_ratio": 2.0,
    "dilations": ((1, 4), (1, 2), (1, 2), (1,)),
}

# Maps of images of 32 pixels have 8, 4, 2 and 1 per axis: kernels of 7 would see mostly their border.
_ATTO = {**_TEST, "embed_dim": 24, "dilations": ((1, 2), (1, 2), (1, 2), (1,))}

VARIANTS: dict[str, Variant] = {
    "dinat_atto": Variant(
        _ATTO, {"untrained": _cfg(160)}, doc="Not of the paper: under 1M parameters, for small images and first runs."
    ),
    **{
        f"nat_{size}": Variant(
            args,
            {"in1k": _cfg(url=f"{_URL}/nat/checkpoints/CLS/nat_{size}.pth", hf_hub_id=f"shi-labs/nat-{size}-in1k-224")},
        )
        for size, args in {**_SIZES, "small": {**_SMALL, "layer_scale": 1e-5}}.items()
    },
    **{
        f"dinat_{size}": Variant(
            {**args, **_DILATED}, {"in1k": _in1k(f"dinat_{size}_in1k_224", hf_hub_id=f"shi-labs/dinat-{size}-in1k-224")}
        )
        for size, args in _SIZES.items()
    },
    **{
        f"dinat_s_{size}": Variant(args, {"in1k": _in1k(f"dinat_s_{size}_in1k_224", **_PATCH)})
        for size, args in _S_SIZES.items()
    },
    "dinat_large": Variant(
        {**_LARGE, **_DILATED},
        {"in22k_ft_in1k": _in1k("dinat_large_in22k_in1k_224", hf_hub_id="shi-labs/dinat-large-in22k-in1k-224")},
    ),
    "dinat_large_384": Variant(
        {**_LARGE, **_DILATED_384},
        {
            "in22k_ft_in1k": _in1k(
                "dinat_large_in22k_in1k_384", hf_hub_id="shi-labs/dinat-large-in22k-in1k-384", **_SIZE_384
            )
        },
    ),
    "dinat_large_384_11x11": Variant(
        {**_LARGE, **_DILATED, "kernel_size": 11},
        {
            "in22k_ft_in1k": _in1k(
                "dinat_large_in22k_in1k_384_11x11", hf_hub_id="shi-labs/dinat-large-11x11-in22k-in1k-384", **_SIZE_384
            )
        },
    ),
    "dinat_large_21k": Variant(_LARGE_21K, {"in22k": _in22k("dinat_large_in22k_224")}),
    "dinat_large_21k_11x11": Variant(
        {**_LARGE_21K, "kernel_size": 11}, {"in22k": _in22k("dinat_large_in22k_224_11x11interp")}
    ),
    "dinat_s_large": Variant(_S_LARGE, {"in22k_ft_in1k": _in1k("dinat_s_large_in1k_224", **_PATCH)}),
    "dinat_s_large_384": Variant(
        {**_S_LARGE, **_DILATED_384}, {"in22k_ft_in1k": _in1k("dinat_s_large_in1k_384", **_PATCH, **_SIZE_384)}
    ),
    "dinat_s_large_21k": Variant(
        {**_S_LARGE, "drop_path_rate": 0.2}, {"in22k": _in22k("dinat_s_large_in22k_224", **_PATCH)}
    ),
    "test_dinat": Variant(
        _TEST,
        {"untrained": _cfg(160)},
        doc="Under 1M parameters; head dim 20 and a dilation per stage, for tests.",
    ),
}


# Parts of transformers' keys, and what the official ones have there.
_TRANSFORMERS = {
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.": "patch_embed.",
    r"^encoder\.(levels\.\d+)\.layers\.": r"\1.blocks.",
    r"^encoder\.": "",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.attention\.self\.": ".attn.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
    r"^layernorm\.": "norm.",
    r"^classifier\.": "head.",
}


def _rename(key: str) -> str:
    key = re.sub(r"^norm(\d)\.", r"out_norms.\1.", key)  # of the official dense backbones
    if not re.match(r"(levels|layers)\.\d+\.", key):
        return key
    key = re.sub(r"^(levels|layers)\.", "stages.", key)
    return re.sub(r"^stages\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", key)


def _from_transformers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring transformers' layout of NAT and DiNAT to the official one: joins q, k and v, and splits layer scale."""
    official = {}
    for key, value in state_dict.items():
        key = re.sub(r"^(nat|dinat)\.", "", key)
        for theirs, ours in _TRANSFORMERS.items():
            key = re.sub(theirs, ours, key)
        if key.endswith(".layer_scale_parameters"):  # [2, C]
            official |= {key.replace("layer_scale_parameters", f"gamma{i + 1}"): row for i, row in enumerate(value)}
        else:
            official[key] = value
    for key in [key for key in official if ".attn.query." in key]:
        parts = [official.pop(key.replace("query", name)) for name in ("query", "key", "value")]
        official[key.replace("query", "qkv")] = torch.cat(parts)  # [3 * C, C] or [3 * C]
    return official


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename official keys, or transformers', and fit position tables to the model's kernel; native keys pass."""
    state_dict = unwrap(state_dict)
    if any(key.endswith(".attention.self.rpb") for key in state_dict):
        state_dict = _from_transformers(state_dict)
    return convert_checkpoint(state_dict, model, lambda key, value: (_rename(key), value))


def _create_nat(variant: str, pretrained: bool = False, **kwargs: Any) -> NAT:
    return build_model(NAT, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3), **kwargs)


register_variants(__name__, VARIANTS, _create_nat)
