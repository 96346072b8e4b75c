"""What timm asks of every model, written once for networks of a stem, stages, a norm and a head."""

import re
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import ClassifierHead, get_device_dtype
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from visattn import layers
from visattn.ops import resize_rel_pos

# B batch, H W map, C channels. Maps are [B, H, W, C] between the stem and the head.


class Backbone(nn.Module):
    """Base class of the model families.

    A family's constructor calls `super().__init__(...)`, builds `patch_embed` (image to map) and `stages`
    (`nn.Sequential` of `layers.Stage`), appends to `feature_info` once per stage, and ends with `_build_head(...)`.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: Pooling before the classifier; "" leaves it out.
    """

    def __init__(self, in_chans: int, num_classes: int, global_pool: str) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        self.feature_info = []

    def _build_head(self, drop_rate: float, device: Any, dtype: Any) -> None:
        """Final norm and classifier for the last stage; then initialise the whole model."""
        dd = {"device": device, "dtype": dtype}
        self.num_features = self.feature_info[-1]["num_chs"]
        self.norm = nn.LayerNorm(self.num_features, **dd)
        self.head = ClassifierHead(
            self.num_features,
            self.num_classes,
            pool_type=self.global_pool,
            drop_rate=drop_rate,
            input_fmt=self.output_fmt,
            **dd,
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise all parameters in place; `needs_reset=True` also those that reset themselves on construction."""
        layers.init_weights(self, needs_reset)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters from stem to head, for layer-wise learning rates."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass instead of keeping them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; `global_pool=None` keeps the pooling."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def _forward_stages(self, x: Tensor, number: int) -> list[Tensor]:
        """The outputs of the first `number` stages for an image."""
        x = self.patch_embed(x)
        outputs = []
        for i, stage in enumerate(self.stages):
            if i < number:
                x = stage(x)
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
        """Feature maps of stages.

        Args:
            x: Images [B, in_chans, H, W].
            indices: The last n stages if an int, all if None, else these stages.
            norm: Apply the final norm to the maps that have its width.
            stop_early: Skip the stages after the last one asked for.
            output_fmt: "NCHW" or "NHWC", of the intermediate maps.
            intermediates_only: Return the maps alone.

        Returns:
            The maps, or (output of `forward_features`, maps).

        Raises:
            ValueError: Another output format.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"expected output_fmt 'NCHW' or 'NHWC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        maps = self._forward_stages(x, max_index + 1 if stop_early else len(self.stages))
        taken = [self.norm(maps[i]) if norm and self._has_norm_width(i) else maps[i] for i in take_indices]
        if output_fmt == "NCHW":
            taken = [t.permute(0, 3, 1, 2).contiguous() for t in taken]
        if intermediates_only:
            return taken
        return (self.norm(maps[-1]) if self._has_norm_width(len(maps) - 1) else maps[-1]), taken

    def _has_norm_width(self, stage: int) -> bool:
        return self.feature_info[stage]["num_chs"] == self.num_features

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates(indices)` does not need; returns the absolute indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        narrower = not self._has_norm_width(max_index)
        self.stages = self.stages[: max_index + 1]
        if prune_norm or narrower:
            self.norm = nn.Identity()
        self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or narrower:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> normalised map of the last stage [B, H', W', num_features]."""
        return self.norm(self._forward_stages(x, len(self.stages))[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify the map of `forward_features`; `pre_logits` stops before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def convert_checkpoint(state_dict: dict[str, Any], model: nn.Module, rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The part of `checkpoint_filter_fn` that families share; keys of this package's own files pass unchanged.

    Unwraps the file, leaves out position indices that are computed here, names layer scale and classifier as timm does,
    and fits relative position tables to the model. `rename` does what is special to the family's official files.
    """
    state_dict = state_dict.get("model", state_dict)
    state_dict = state_dict.get("state_dict", state_dict)
    own = model.state_dict()
    converted = {}
    for key, value in state_dict.items():
        if key.endswith(".relative_position_index"):
            continue
        key = re.sub(r"\.gamma([12])$", r".ls\1.gamma", rename(key))
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        if key.endswith(".rpb") and key in own:
            value = resize_rel_pos(value, own[key].shape[1:])
        converted[key] = value
    return converted
