"""Class activation maps with pytorch-grad-cam and captum, which take features to be [B, C, H, W].

Most families here compute on other layouts, of which those libraries make wrong pictures without a word.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from visattn.models._backbone import Backbone
from visattn.models._vit import TokenTransformer
from visattn.models.pvt import PVT
from visattn.models.resnet_ea import ResNetEA


def cam_layers(model: nn.Module) -> list[nn.Module]:
    """The layer to look at, as pytorch-grad-cam's `target_layers`: its output is the last map before the pooling.

    Where a class token is classified, that is the input of the last attention: behind it patches have no gradient.

    Raises:
        TypeError: A model of another package, or one inside a wrapper.
    """
    return [_find(model).layer]


def reshape_transform(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What pytorch-grad-cam asks for under this name: output of the model's `cam_layers` -> [B, C, H, W].

    `GradCAM(model, visattn.cam_layers(model), visattn.reshape_transform(model))`, for images of any size. Tokens do not
    say of what map they are: a hook, which stays on the layer that makes them, notes that. A copy of the model needs
    its own.

    Raises:
        TypeError: As `cam_layers`.
    """
    features = _find(model)
    if features.embed is not None:
        hooks: Any = features.embed._forward_hooks
        for hook in hooks.values():
            if getattr(hook, "__func__", None) is _Features.note_size:  # of an earlier call
                return hook.__self__.to_nchw
        features.embed.register_forward_hook(features.note_size)
    return features.to_nchw


class NCHWFeatures(nn.Module):
    """A model whose last features are to be had as [B, C, H, W]: they pass through the layer `features`.

    For captum, `LayerGradCam(wrapped, wrapped.features)` with `wrapped = visattn.NCHWFeatures(model)`. Results and
    parameters are the model's, which has hooks while it runs.

    Args:
        model: A model of this package.

    Raises:
        TypeError: As `cam_layers`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _find(model)
        self.model = model
        self.features = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        found = _find(self.model)

        def show(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return found.from_nchw(self.features(found.to_nchw(output)), output)

        handles = [found.layer.register_forward_hook(show)]
        if found.embed is not None:
            handles.append(found.embed.register_forward_hook(found.note_size))
        try:
            return self.model(x)
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class _Features:
    """Where a model's last map is: [B, C, H, W], [B, H, W, C], or tokens [B, 1 + H * W, C], the class token first.

    Attributes:
        layer: Has them as its output.
        channels_first: They are of the first kind.
        embed: If tokens, has their map [B, H, W, C] as its output.
        size: Of that map.
    """

    layer: nn.Module
    channels_first: bool = False
    embed: nn.Module | None = None
    size: list[int] = field(default_factory=list)

    def note_size(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.size = [*output.shape[1:3]]

    def to_nchw(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            if x.shape[1] != 1 + math.prod(self.size):
                tokens = f"a class token and those of the last map {self.size}"
                raise ValueError(f"expected {tokens}, got {x.shape[1]}; try reshape_transform of the model that ran")
            x = x[:, 1:].unflatten(1, self.size)  # [B, H, W, C]
        return x if self.channels_first else x.permute(0, 3, 1, 2)  # [B, C, H, W]

    def from_nchw(self, x: Tensor, old: Tensor) -> Tensor:
        """Undo `to_nchw(old)` for [B, C, H, W]."""
        if self.channels_first:
            return x
        x = x.permute(0, 2, 3, 1)  # [B, H, W, C]
        return x if self.embed is None else torch.cat([old[:, :1], x.flatten(1, 2)], 1)  # [B, 1 + H * W, C]


def _find(model: nn.Module) -> _Features:
    if isinstance(model, ResNetEA):
        return _Features(cast(nn.Module, model.layer4), channels_first=True)
    if isinstance(model, TokenTransformer):
        embed, blocks = model.patch_embed, model.blocks
    elif isinstance(model, PVT) and model.class_level is not None:
        stage: Any = model.stages[-1]
        embed, blocks = stage.downsample, stage.blocks
    elif isinstance(model, Backbone):
        return _Features(model.norm, channels_first=model.output_fmt == "NCHW")
    else:
        raise TypeError(f"expected a model of visattn, got {type(model).__name__}; try the model inside a wrapper")
    layer = blocks[-1].norm1 if model.global_pool == "token" else model.norm
    return _Features(cast(nn.Module, layer), embed=embed)
