"""Optimizer settings by layer and parameter, and training in lower precision, for mmengine's Runner."""

import reprlib
from collections.abc import Generator
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper, DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from timm.models._manipulate import group_with_matcher
from torch import nn

from visattn.mm.backbone import TimmBackbone


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class BackboneOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor that also asks the backbone of visattn or timm.

    Parameters that the backbone's `no_weight_decay` names do not decay. `paramwise_cfg` may have, beside mmengine's
    keys, `backbone_lr_mult`, a factor of the backbone's learning rates, and `layer_decay` in (0, 1]: the learning rate
    of every layer of the backbone is this times that of the layer above it, where the heads are the highest layer and
    layers are groups of timm's `group_matcher`. All act on top of mmengine's keys.

    Raises:
        ValueError: Another `layer_decay`, or a negative `backbone_lr_mult`.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        super().__init__(optim_wrapper_cfg, {"layer_decay": 1.0, "backbone_lr_mult": 1.0, **(paramwise_cfg or {})})
        self.layer_decay = self.paramwise_cfg["layer_decay"]
        self.backbone_lr_mult = self.paramwise_cfg["backbone_lr_mult"]
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"expected layer_decay in (0, 1], got {self.layer_decay}; try 0.9")
        if self.backbone_lr_mult < 0:
            raise ValueError(f"expected backbone_lr_mult of 0 or more, got {self.backbone_lr_mult}; try 0.1")

    def add_params(
        self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", is_dcn_module: Any = None
    ) -> None:
        """Append a group per parameter of `module` to `params`."""
        super().add_params(params, module, prefix, is_dcn_module)
        backbone = getattr(module, "backbone", None)
        if prefix or not isinstance(backbone, TimmBackbone):
            return
        model = backbone.model
        # timm puts norms of the outputs, which no pattern matches, with the heads; so does a name that is not there.
        added = [(f"out_norms.{name}", parameter) for name, parameter in backbone.norms.named_parameters()]
        named = [*model.named_parameters(), *added, ("heads", None)]
        layers: Any = group_with_matcher(iter(named), model.group_matcher(), reverse=True)
        names = {id(parameter): name for name, parameter in named}
        patterns = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        for group in params:
            name = names.get(id(group["params"][0]))
            if name is None:
                continue
            scale = self.backbone_lr_mult * self.layer_decay ** (layers["heads"] - layers[name])
            group["lr"] = group.get("lr", self.base_lr) * scale
            if any(fnmatch(name, pattern) for pattern in patterns):
                group["weight_decay"] = 0.0


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(AmpOptimWrapper):
    """Backbone and neck under autocast, heads and losses in float32, on any device.

    mmengine's `AmpOptimWrapper` runs on accelerators only, and puts the heads under autocast too, whose operations
    (non-maximum suppression, RoI align) know float32 and float16 but not bfloat16.

    Args:
        dtype: "bfloat16" or "float16"; the latter scales the loss.
        **kwargs: Of mmengine's `OptimWrapper`.

    Raises:
        ValueError: Another dtype.
    """

    def __init__(self, dtype: str = "bfloat16", **kwargs: Any) -> None:
        if dtype not in ("bfloat16", "float16"):
            raise ValueError(
                f"expected dtype 'bfloat16' or 'float16', got {reprlib.repr(dtype):.80}; for float32 use OptimWrapper"
            )
        OptimWrapper.__init__(self, **kwargs)  # that of AmpOptimWrapper refuses CPUs
        self.device = get_device()
        self.cast_dtype = getattr(torch, dtype)
        self.loss_scaler = torch.amp.GradScaler(self.device, enabled=dtype == "float16")
        self._scale_update_param = None

    @contextmanager
    def optim_context(self, model: nn.Module) -> Generator[None]:
        """Where the Runner calls the model."""
        inner: Any = model.module if is_model_wrapper(model) else model
        extract = inner.extract_feat

        def extract_feat(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
            with torch.autocast(self.device, self.cast_dtype):
                maps = extract(*args, **kwargs)
            return tuple(level.float() for level in maps)

        inner.extract_feat = extract_feat
        try:
            with OptimWrapper.optim_context(self, model):
                yield
        finally:
            del inner.extract_feat
