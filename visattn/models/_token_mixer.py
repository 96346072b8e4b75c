"""What backbones of interchangeable token mixers share: which block has which, configurations, other image sizes."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import resolve_pretrained_cfg
from torch import Tensor, nn

from visattn.layers import TOKEN_MIXERS
from visattn.models._build import M, build_model
from visattn.models._variants import imagenet_cfg
from visattn.ops import resize_rel_pos


def plan_attention(
    attention: str,
    depths: Sequence[int],
    attention_depths: Sequence[int] | None = None,
    attention_args: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
) -> list[list[dict[str, Any] | None]]:
    """Per stage and block, the arguments of the attention called `attention`; None where the backbone's own is used.

    Args:
        attention: A name of `layers.TOKEN_MIXERS`.
        depths: Blocks per stage.
        attention_depths: Per stage, how many of its first blocks use it. Default: all.
        attention_args: Own arguments of its layer: a dict, or one per stage.

    Raises:
        ValueError: Another name, or numbers that do not fit the stages.
    """
    if attention not in TOKEN_MIXERS:
        raise ValueError(f"expected attention of {', '.join(map(repr, TOKEN_MIXERS))}, got {attention!r}")
    numbers = depths if attention_depths is None else attention_depths
    if len(numbers) != len(depths) or any(not 0 <= n <= d for n, d in zip(numbers, depths, strict=True)):
        raise ValueError(f"expected attention_depths of 0 to {list(depths)} per stage, got {list(numbers)}")
    if attention_args is None or isinstance(attention_args, dict):
        attention_args = [attention_args or {}] * len(depths)
    if len(attention_args) != len(depths):
        raise ValueError(f"expected attention_args, a dict or {len(depths)} of them, got {len(attention_args)}")
    return [
        [args if j < number else None for j in range(depth)]
        for depth, number, args in zip(depths, numbers, attention_args, strict=True)
    ]


def fit_positions(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Position parameters of layers and backbones, resized to the image size of the model; others as they are.

    Agents' biases of rows and columns linear, positions of tokens bicubic. Where these lie in a row, as official ones
    do, they are of a square map.
    """
    own = model.state_dict()
    return {k: _fit(k, v, own[k].shape) if k in own and v.shape != own[k].shape else v for k, v in state_dict.items()}


def _fit(key: str, value: Tensor, shape: torch.Size) -> Tensor:
    name = key.rpartition(".")[2]
    if re.fullmatch("[ahw]{2}_bias", name):  # one axis of the map among others that agree
        return F.interpolate(value, shape[2:], mode="trilinear", align_corners=False)
    if name in ("pos_embed", "positional_encoding") and len(shape) == 4:
        side = math.isqrt(value.shape[1])
        table = value.unflatten(1, (side, side)) if value.ndim == 3 else value  # [1, h, w, C]
        return resize_rel_pos(table[0].permute(2, 0, 1), shape[1:3]).permute(1, 2, 0)[None]  # [1, H, W, C]
    return value


# Images for the networks of Agent-Attention, InLine and FLatten are squashed to squares of size / crop_pct.
_SQUASHED = {"crop_pct": 0.875, "crop_mode": "squash"}
_LEAPLAB = "https://github.com/LeapLabTHU"
_SOURCES = {
    "softmax": {},
    "agent": {**_SQUASHED, "origin_url": f"{_LEAPLAB}/Agent-Attention", "paper_ids": "arXiv:2312.08874"},
    "inline": {**_SQUASHED, "origin_url": f"{_LEAPLAB}/InLine", "paper_ids": "arXiv:2412.06590"},
    "focused": {**_SQUASHED, "paper_ids": "arXiv:2308.00442"},
    "efficient": {"paper_ids": "arXiv:1812.01243"},
    "relu_linear": {"paper_ids": "arXiv:2501.16182"},
    "flow": {"paper_ids": "arXiv:2202.06258"},
}


def token_mixer_cfg(attention: str, file: str = "", size: int = 224, **kwargs: Any) -> dict[str, Any]:
    """Pretrained configuration of a backbone with this attention; `file` is the id of one that its authors share."""
    # no slash before the question mark: torch.hub names the file after what is between them
    shared = {"url": f"https://cloud.tsinghua.edu.cn/f/{file}?dl=1"} if file else {}
    given = {"crop_pct": 0.9, "first_conv": "patch_embed.proj", **_SOURCES[attention], **shared, **kwargs}
    return imagenet_cfg(size, **given)


def create_token_mixer_backbone(
    cls: type[M],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[[dict[str, Any], M], dict[str, Tensor]],
    levels: int | tuple[int, ...] = (0, 1, 2, 3),
    **kwargs: Any,
) -> M:
    """The model, made for the image size of its pretrained tag unless `img_size` is given; `levels` as features."""
    if "img_size" not in kwargs:
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        kwargs["img_size"] = cfg.input_size[-2:]
    return build_model(cls, variant, pretrained, filter_fn, levels, **kwargs)
