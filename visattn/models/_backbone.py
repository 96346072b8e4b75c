"""What timm asks of every model, written once for networks of a stem, stages, a norm and a head."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, cast

from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates, get_device_dtype
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from visattn import layers
from visattn.models._build import NCHW_POOLS, NHWC_POOLS, check_classifier
from visattn.ops import resize_rel_pos
from visattn.weights import ChecksWeights, check_state_dict, rename_earlier

# B batch, H W map, C channels. Maps are [B, H, W, C] or [B, C, H, W] between the stem and the head: see `output_fmt`.

_OUT_NORMS = {
    "NHWC": {"layer": nn.LayerNorm},
    "NCHW": {"layer": partial(LayerNorm2d, eps=1e-5), "batch": nn.BatchNorm2d},
}


class Backbone(ChecksWeights):
    """Base class of the model families.

    A family's constructor calls `super().__init__(...)`, builds `patch_embed` (the stem: image to map) and `stages`
    (`nn.Sequential` of `layers.Stage`), appends to `feature_info` once per stage, and ends with `_build_head(...)`.
    A family whose stem output is a feature level of its own appends an entry for "patch_embed" first.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: Pooling before the classifier; "" leaves it out.
        output_fmt: Layout of the maps, "NHWC" or "NCHW".
        pools: Words for `global_pool`; "" among them if the classifier works without. Default: those of timm's
            `ClassifierHead` for the layout.

    Raises:
        ValueError: A classifier that would fail in forward; by `reset_classifier` too.
    """

    patch_embed: nn.Module
    stages: nn.Sequential
    norm: nn.Module
    head: Any  # with the interface of timm's heads

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        output_fmt: str = "NHWC",
        pools: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        self.pools = pools or (NCHW_POOLS if output_fmt == "NCHW" else NHWC_POOLS)
        check_classifier(num_classes, global_pool, self.pools)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.output_fmt = output_fmt
        self.feature_info = []

    def _build_head(
        self,
        drop_rate: float,
        out_norm: str | None,
        device: Any,
        dtype: Any,
        norm: nn.Module | None = None,
        head: nn.Module | None = None,
        num_features: int | None = None,
    ) -> None:
        """Final norm, classifier and norms of the feature levels; then initialise the whole model.

        Args:
            drop_rate: Dropout before the classifier.
            out_norm: "layer", for channels-first maps also "batch": one norm per feature level, applied to what
                `forward_intermediates` and `features_only` return and to nothing else; None leaves them out.
            device: Device of the new parameters.
            dtype: Dtype of the new parameters.
            norm: Norm of the last map; default LayerNorm.
            head: Classifier with timm's head interface; default `ClassifierHead`.
            num_features: Channels after `norm` where that is a projection for the classifier: no feature level passes
                through it, and it is pruned with the head. Default: those of the last level.
        """
        dd = {"device": device, "dtype": dtype}
        norms = _OUT_NORMS[self.output_fmt]
        if out_norm is not None and out_norm not in norms:
            raise ValueError(f"expected out_norm None or one of {sorted(norms)}, got {out_norm!r}")
        self.norm_projects = num_features is not None
        self.num_features = self.feature_info[-1]["num_chs"] if num_features is None else num_features
        self.norm = norms["layer"](self.num_features, **dd) if norm is None else norm
        if head is None:
            head = ClassifierHead(
                self.num_features,
                self.num_classes,
                pool_type=self.global_pool,
                drop_rate=drop_rate,
                input_fmt=self.output_fmt,
                **dd,
            )
        self.head = head
        self.head_hidden_size = self.head.num_features
        self.out_norms = nn.ModuleList()
        if out_norm is not None:
            self.out_norms.extend(norms[out_norm](level["num_chs"], **dd) for level in self.feature_info)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise all parameters in place; `needs_reset=True` also those that reset themselves on construction."""
        layers.init_weights(self, needs_reset)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Nothing to do: every model takes images of any size. Families with windows to set have more arguments."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters from stem to head, for layer-wise learning rates."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass instead of keeping them."""
        for stage in cast("Iterable[layers.Stage]", self.stages):
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Replace the classifier; `global_pool=None` keeps the pooling, `reset_other` drops the head's other layers."""
        check_classifier(num_classes, global_pool, self.pools)
        self.num_classes = num_classes
        self.head.reset(
            num_classes,
            pool_type=global_pool,
            reset_other=reset_other,
            in_features=self.num_features,
            **get_device_dtype(self),
        )
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def _number_of_stages(self, level: int) -> int:
        """How many stages feature level `level` needs."""
        return level if self.feature_info[0]["module"] == "patch_embed" else level + 1

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps, one per entry of `feature_info`; normalised by `out_norms` if the model was built with them.

        Args:
            x: Images [B, in_chans, H, W].
            indices: The last n levels if an int, all if None, else these levels.
            norm: Apply the final norm to the maps that have its width (no effect with `out_norm`, or if it projects).
            stop_early: Skip the stages after the last one asked for.
            output_fmt: "NCHW", "NHWC" or "NLC" (L = H * W), of the intermediate maps.
            intermediates_only: Return the maps alone.

        Returns:
            The maps, or (output of `forward_features`, maps).

        Raises:
            ValueError: Another output format.
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"expected output_fmt 'NCHW', 'NHWC' or 'NLC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        maps: list[Tensor] = []
        x = self.forward_features(x, maps=maps, number=self._number_of_stages(max_index) if stop_early else None)
        taken = []
        for i in take_indices:
            level = maps[i]
            if len(self.out_norms):
                level = self.out_norms[i](level)
            elif norm and not self.norm_projects and self._has_norm_width(i):
                level = self.norm(level)
            taken.append(self._to_format(level, output_fmt))
        if intermediates_only:
            return taken
        return (self.norm(x) if self._has_norm_width(len(maps) - 1) else x), taken

    def _to_format(self, x: Tensor, output_fmt: str) -> Tensor:
        if output_fmt == "NCHW":
            return x if self.output_fmt == "NCHW" else x.permute(0, 3, 1, 2).contiguous()  # [B, C, H, W]
        x = x.permute(0, 2, 3, 1) if self.output_fmt == "NCHW" else x  # [B, H, W, C]
        return x.flatten(1, 2) if output_fmt == "NLC" else x  # [B, L, C] or [B, H, W, C]

    def _has_norm_width(self, level: int) -> bool:
        """The norm is the last level's, and fits levels as wide as that."""
        return self.feature_info[level]["num_chs"] == self.feature_info[-1]["num_chs"]

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates(indices)` does not need; returns the absolute indices."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        prune_norm = prune_norm or not self._has_norm_width(max_index) or (self.norm_projects and prune_head)
        self.stages = self.stages[: self._number_of_stages(max_index)]
        self.feature_info = self.feature_info[: max_index + 1]
        for i in range(len(self.out_norms)):
            if i not in take_indices:
                self.out_norms[i] = nn.Identity()
        width = self.num_features
        if prune_norm:
            self.norm = nn.Identity()
            self.num_features = self.feature_info[-1]["num_chs"]
        if prune_head or self.num_features != width:
            self.reset_classifier(0, "", reset_other=True)
        return take_indices

    def forward_features(self, x: Tensor, *, maps: list[Tensor] | None = None, number: int | None = None) -> Tensor:
        """Image to features.

        Args:
            x: Images [B, in_chans, H, W].
            maps: The map of every feature level is appended to it.
            number: Stages to go through; None for all.

        Returns:
            The last map, [B, H', W', C'] or [B, C', H', W'], normalised unless `maps` is given.
        """
        x = self.patch_embed(x)
        if maps is not None and self.feature_info[0]["module"] == "patch_embed":
            maps.append(x)
        for stage in islice(self.stages, number):
            x = stage(x)
            if maps is not None:
                maps.append(x)
        return self.norm(x) if maps is None else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify the map of `forward_features`; `pre_logits` stops before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class TellsAttended:
    """Mixin of families whose attention layers have a method `attended`, which tells what the queries attend to."""

    def attended(self: Any, image: Tensor) -> dict[str, dict[str, Tensor]]:
        """What the queries of every attention layer attend to: {layer's name: what its own `attended` returns}.

        One pass, with gradients as usual.

        Args:
            image: Images [B, in_chans, H, W].
        """
        found = {}
        tellers = [(n, m) for n, m in self.named_modules() if m is not self and hasattr(m, "attended")]

        def ask(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            found[name] = cast(Any, module).attended(*args)

        handles = [module.register_forward_pre_hook(partial(ask, name)) for name, module in tellers]
        try:
            self(image)
        finally:
            for handle in handles:
                handle.remove()
        return found


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Per stage and block the rate of stochastic depth, growing linearly from 0 to `last`."""
    return cast("list[list[float]]", calculate_drop_path_rates(last, list(depths), stagewise=True))


def plan_strides(stem: int, strides: Sequence[int], output_stride: int) -> list[tuple[int, int, int, int]]:
    """Per stage (reduction, stride, dilation of what would stride, dilation of what follows it).

    Stages beyond `output_stride` keep their map, and what comes after a stride left out is dilated instead: it sees at
    every position what it saw at those that the stride kept.

    Args:
        stem: Stride of the stem.
        strides: Stride of every stage.
        output_stride: Stride of the last map: 8, 16, or 32 for that of the network.

    Raises:
        ValueError: Another `output_stride`.
    """
    if output_stride not in (8, 16, 32):
        raise ValueError(f"expected output_stride 8, 16 or 32, got {output_stride}")
    reduction, dilation, plan = stem, 1, []
    for stride in strides:
        before = dilation
        if output_stride < 32 and reduction * stride > output_stride:
            stride, dilation = 1, dilation * stride
        reduction *= stride
        plan.append((reduction, stride, before, dilation))
    return plan


def plan_stages(
    depths: Sequence[int], output_stride: int, drop_path_rate: float
) -> list[tuple[int, list[tuple[int, int, float]]]]:
    """Per stage its reduction, and per block (stride, dilation, drop path rate), where stem and stages halve the map.

    As `plan_strides`; the first block of a stage has its stride.

    Args:
        depths: Blocks per stage.
        output_stride: Stride of the last map, 8, 16 or 32.
        drop_path_rate: That of the last block, growing linearly from 0.

    Raises:
        ValueError: Another `output_stride`.
    """
    plan = []
    strides = plan_strides(2, [2] * len(depths), output_stride)
    for (reduction, stride, before, dilation), rates in zip(
        strides, drop_path_rates(drop_path_rate, depths), strict=True
    ):
        plan.append((reduction, [(1, dilation, r) if j else (stride, before, r) for j, r in enumerate(rates)]))
    return plan


def unwrap(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """The entries of a model in a checkpoint's content: averaged weights first; of a detector those of its backbone.

    Raises:
        WeightsError: Contents that are no tensors by name.
    """
    for key in ("state_dict_ema", "model", "state_dict"):
        state_dict = state_dict.get(key, state_dict) if isinstance(state_dict, Mapping) else state_dict
    check_state_dict(state_dict, "the checkpoint")
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    backbone = {k.removeprefix("backbone."): v for k, v in state_dict.items() if k.startswith("backbone.")}
    return backbone or state_dict


def convert_checkpoint(
    state_dict: dict[str, Any],
    model: nn.Module,
    convert: Callable[[str, Tensor], tuple[str, Tensor]],
    resize: str = "bicubic",
) -> dict[str, Tensor]:
    """The part of `checkpoint_filter_fn` that families share; keys of this package's own files pass unchanged.

    Leaves out position indices that are computed here, names layer scale and classifier as timm does, and fits relative
    position tables `rpb` to the model by `resize` interpolation. `convert` brings key and value of the family's
    official files to ours.
    """
    own = model.state_dict()
    converted = {}
    for official, official_value in unwrap(state_dict).items():
        if official.endswith(".relative_position_index"):
            continue
        key, value = convert(official, official_value)
        key = re.sub(r"\.gamma([12])$", r".ls\1.gamma", key)
        key = rename_earlier(re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key), own)
        if key.endswith(".rpb") and key in own:
            value = resize_rel_pos(value, own[key].shape[1:], resize)
        converted[key] = value
    return converted
