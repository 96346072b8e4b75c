"""A family's table of variants, which its default configurations and its registration with timm read."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn


@dataclass(frozen=True)
class Variant:
    """One model of a family.

    Attributes:
        args: What the constructor gets, under what the caller gives.
        tags: Per tag of weights the fields of timm's `PretrainedCfg` (url or hf_hub_id, input_size, crop_pct,
            num_classes, license, ...), the default tag first; "untrained" where there are none.
        doc: A sentence on what is special about it.
    """

    args: Mapping[str, Any]
    tags: Mapping[str, dict[str, Any]]
    doc: str = field(default="", kw_only=True)


def register_variants(module: str, variants: Mapping[str, Variant], create: Callable[..., nn.Module]) -> None:
    """Register every variant with timm, as a function of the module, whose `default_cfgs` come from the table too.

    Args:
        module: The family's `__name__`.
        variants: Its table.
        create: `create(name, pretrained, **arguments)` builds a model.
    """
    family = sys.modules[module]
    cfgs = {f"{name}.{tag}": cfg for name, variant in variants.items() for tag, cfg in variant.tags.items()}
    family.default_cfgs = generate_default_cfgs(cfgs)
    for name, variant in variants.items():
        entry = _entry(name, variant, create)
        entry.__module__, entry.__name__, entry.__qualname__ = module, name, name
        setattr(family, name, register_model(entry))


def _entry(name: str, variant: Variant, create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(name, pretrained, **{**variant.args, **kwargs})

    args = ", ".join(f"{key}={getattr(value, '__name__', repr(value))}" for key, value in variant.args.items())
    weights = ", ".join(variant.tags)
    entry.__doc__ = f"{variant.doc or name} ({args})\n\nKeyword arguments go over these. Weights: {weights}."
    return entry
