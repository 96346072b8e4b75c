"""The one adapter that mmdet and mmsegmentation configs name, for every model of visattn and of timm."""

from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import Registry
from timm.layers import LayerNorm2d
from timm.models import PretrainedCfg, group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import visattn.models  # noqa: F401 - registers the models
from visattn.published import check_published, fetch
from visattn.weights import (
    ChecksWeights,
    WeightsError,
    check_fit,
    convert_weights,
    first_line,
    load_fitting,
    load_weights,
)

MODELS = Registry("model", parent=ROOT_MODELS, scope="visattn")
TYPES = ("visattn.TimmBackbone", "TimmBackboneVA")  # the second is the name in older configs


@ROOT_MODELS.register_module("TimmBackboneVA")
@MODELS.register_module()
class TimmBackbone(ChecksWeights):
    """A timm model as backbone: [B, C, H, W] images of any size -> a tuple of [B, C', H', W'] maps.

    The attributes `out_channels` and `out_strides` say what a neck gets. Checkpoints of detectors and segmentors whose
    backbone was the official one of a visattn family load too: keys are brought to the model's while they load.

    Args:
        model_name: A model's name, with or without a tag.
        out_indices: Feature levels, as in the model's `feature_info`; None for the last four.
        out_norm: "layer" or "batch" gives every map a norm that nothing else sees, as most official backbones for dense
            tasks do; "own" is the model's final norm, on the maps of its width (TransNeXt's last; its other maps are
            normalised by their stages); None leaves the maps as they are. Others are the model's, as OverLoCK's
            "detection" and "segmentation".
        frozen_stages: -1 trains everything, 0 freezes the stem, n also the first n stages (of timm's models: groups of
            `group_matcher(coarse=True)`).
        norm_eval: Batch norms use and keep their running statistics in training.
        checkpoint: Path or URL of weights, of the model itself or of a detector or segmentor with it; in any layout
            that the family's `checkpoint_filter_fn` knows. Read when `init_weights` is called, as a Runner does before
            training; nothing in it is ever unpickled. `out_norm` may be new, nothing else may be missing.
        pretrained: Fetch the published weights of the name, likewise.
        with_cp: Recompute activations in the backward pass instead of keeping them (activation checkpointing).
        **options: Of the model's constructor, such as `drop_path_rate` or `dilations="detection"`.

    Raises:
        TypeError: An option that the model does not know, a model that cannot return its maps, or `init_cfg`.
        ValueError: An unknown model, level or norm.
        visattn.weights.WeightsError: By `init_weights`, for weights that are missing, unsafe or of another model.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] | None = None,
        out_norm: str | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        checkpoint: str | None = None,
        pretrained: bool = False,
        with_cp: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if not timm.is_model(model_name):
            close = ", ".join(timm.list_models(f"*{model_name.partition('.')[0]}*")[:5]) or "timm.list_models()"
            raise ValueError(f"expected a model of visattn or timm, got {model_name!r}; try {close}")
        if options.pop("init_cfg", None) is not None:
            raise TypeError("expected no init_cfg, because timm models initialise themselves; try checkpoint=FILE")
        self.model_name = model_name
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.checkpoint = checkpoint
        self.pretrained = pretrained
        self._options = options
        self.own_norm = out_norm == "own"
        separate_norm = None if self.own_norm else out_norm
        self.model = self._create()
        has_norms = hasattr(self.model, "out_norms")
        if has_norms and separate_norm is not None:
            self.model = self._create(out_norm=separate_norm)
        if not hasattr(self.model, "forward_intermediates"):
            raise TypeError(f"expected a model with forward_intermediates, got {model_name}; try another")
        levels = self.model.feature_info
        levels = levels if isinstance(levels, list) else levels.info
        self.out_indices = self._check_levels(out_indices, len(levels))
        self.out_channels = [levels[i]["num_chs"] for i in self.out_indices]
        self.out_strides = [levels[i]["reduction"] for i in self.out_indices]
        everything = set(self.model.state_dict())
        self.model.prune_intermediate_layers(list(self.out_indices), prune_norm=not self.own_norm)
        self._pruned = frozenset(everything - set(self.model.state_dict()))
        self.norms = nn.ModuleList()
        if separate_norm is not None and not has_norms:
            norms = {"layer": partial(LayerNorm2d, eps=1e-5), "batch": nn.BatchNorm2d}
            if separate_norm not in norms:
                raise ValueError(f"expected out_norm None, 'own' or one of {sorted(norms)}, got {out_norm!r}")
            self.norms.extend(norms[separate_norm](channels) for channels in self.out_channels)
        if with_cp:
            self.model.set_grad_checkpointing(True)
        self._frozen = self._freeze()
        self.register_load_state_dict_pre_hook(_convert_official)

    def _create(self, **kwargs: Any) -> Any:  # no class of timm's declares what its models have in common
        return timm.create_model(self.model_name, **self._options, **kwargs)

    def _check_levels(self, indices: Sequence[int] | None, number: int) -> tuple[int, ...]:
        if indices is None:
            return tuple(range(max(0, number - 4), number))
        if not indices or any(i not in range(number) for i in indices) or sorted(set(indices)) != list(indices):
            raise ValueError(
                f"expected out_indices of {self.model_name} to be growing numbers from 0 to {number - 1}, "
                f"got {tuple(indices)}; try None for the last four"
            )
        return tuple(indices)

    def _freeze(self) -> list[str]:
        """Stop the gradients of the frozen groups; returns the largest modules that have no others."""
        groups: Any = group_parameters(self.model, self.model.group_matcher(coarse=True), reverse=True)
        for key, parameter in self.model.named_parameters():
            if groups[key] <= self.frozen_stages:
                parameter.requires_grad_(False)
        frozen: list[str] = []
        for name, module in self.model.named_modules():
            trained = [parameter.requires_grad for parameter in module.parameters()]
            inside = any(name.startswith(f"{outer}.") for outer in frozen)
            if trained and not any(trained) and not inside:
                frozen.append(name)
        return frozen

    def train(self, mode: bool = True) -> "TimmBackbone":
        """As for any module, but frozen stages stay in evaluation mode, and with `norm_eval` all batch norms."""
        super().train(mode)
        for name in self._frozen:
            self.model.get_submodule(name).eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def init_weights(self) -> None:
        """Read `checkpoint` or the pretrained weights, if asked for; the rest was initialised on construction.

        Raises:
            visattn.weights.WeightsError: Weights that are missing, unsafe or of another model.
        """
        if self.checkpoint is not None:
            source = str(self.checkpoint)
            is_url = source.startswith(("http://", "https://"))
            published = PretrainedCfg(url=source, architecture=self.model_name)
            weights = load_weights(fetch(published) if is_url else Path(source))
            for prefix in ("backbone.model.", "backbone."):  # of a detector with this class, or with another
                part = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
                weights = part or weights
            self._load(convert_weights(weights, self.model, source), source)
        elif self.pretrained:
            if "pretrained_cfg_overlay" not in self._options:
                check_published(self.model_name)
            try:
                published = self._create(pretrained=True)
            except WeightsError:
                raise
            except (OSError, RuntimeError) as error:  # the network went, or the file is another
                raise WeightsError(
                    f"expected the published weights of {self.model_name}, got {first_line(error)}; try a file"
                ) from error
            self._load(published.state_dict(), "the published weights")

    def _load(self, weights: Mapping[str, Tensor], source: str) -> None:
        weights = {key: value for key, value in weights.items() if key not in self._pruned}
        load_fitting(self.model, weights, f"weights of {self.model_name}", source, ("out_norms.",))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As for any module, for an official backbone's keys too.

        Raises:
            visattn.weights.WeightsError: Weights of another model, of which none has been loaded then.
        """
        if isinstance(state_dict, Mapping):
            state_dict = cast("dict[str, Any]", copy(state_dict))  # with its metadata
            _convert_official(self, state_dict, "")
        return super().load_state_dict(state_dict, strict, assign)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, C, H, W] -> one map [B, C', H', W'] per level of `out_indices`."""
        maps = self.model.forward_intermediates(
            x, indices=list(self.out_indices), norm=self.own_norm, intermediates_only=True
        )
        if len(self.norms):
            maps = [norm(level) for norm, level in zip(self.norms, maps, strict=True)]
        return tuple(maps)


def fit_channels(model: dict[str, Any]) -> None:
    """Set, in place, the channels that the neck of a model's config, or its heads without one, expect.

    They are those of its `visattn.TimmBackbone`; a config with another backbone is left as it is.

    Raises:
        TypeError, ValueError: Options that do not fit the backbone.
    """
    backbone = model.get("backbone", {})
    if backbone.get("type") not in TYPES:
        return
    with torch.device("meta"):
        channels = TimmBackbone(**{key: value for key, value in backbone.items() if key != "type"}).out_channels
    if model.get("neck"):
        neck = model["neck"]
        (neck[0] if isinstance(neck, list) else neck)["in_channels"] = channels
        return
    for key in ("panoptic_head", "decode_head", "auxiliary_head"):
        heads = model.get(key) or []
        for head in heads if isinstance(heads, list) else [heads]:
            index = head.get("in_index", list(range(len(channels))))
            head["in_channels"] = channels[index] if isinstance(index, int) else [channels[i] for i in index]
            if "c1_in_channels" in head:  # of DeepLabV3+
                head["c1_in_channels"] = channels[0]


def _convert_official(backbone: TimmBackbone, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Replace, in place, keys of an official backbone below `prefix` by those of `backbone`; refuse what does not fit.

    A detector's `load_state_dict` calls this before the first tensor of the backbone is copied.
    """
    weights = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    is_official = bool(weights) and not any(key.startswith(("model.", "norms.")) for key in weights)
    if is_official:
        weights = convert_weights(weights, backbone.model)
        weights = {f"model.{key}": value for key, value in weights.items() if key not in backbone._pruned}
    expected, norms = f"weights of {backbone.model_name}", ("norms.", "model.out_norms.")
    check_fit(backbone, weights, expected, "others", norms, strict=is_official)
    if is_official:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]
        state_dict.update({f"{prefix}{key}": value for key, value in weights.items()})
