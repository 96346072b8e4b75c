"""A family's table of variants, which its default configurations and its registration with timm read."""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, generate_default_cfgs, register_model, register_model_deprecations
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


def imagenet_cfg(size: int = 224, **kwargs: Any) -> dict[str, Any]:
    """Fields of timm's `PretrainedCfg` for ImageNet-1k and a network of stride 32, under those given."""
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head.fc",
        **kwargs,
    }


def register_variants(module: str, variants: Mapping[str, Variant], create: Callable[..., nn.Module]) -> None:
    """Register every variant with timm, as a function of the module, whose `default_cfgs` come from the table too.

    Args:
        module: The family's `__name__`.
        variants: Its table.
        create: `create(name, pretrained, **arguments)` builds a model.
    """
    family = vars(sys.modules[module])
    cfgs: dict[str, dict[str, Any] | PretrainedCfg] = {}
    for name, variant in variants.items():
        cfgs |= {f"{name}.{tag}": cfg for tag, cfg in variant.tags.items()}
    family["default_cfgs"] = generate_default_cfgs(cfgs)
    for name, variant in variants.items():
        entry = _entry(name, variant, create)
        entry.__module__, entry.__name__, entry.__qualname__ = module, name, name
        family[name] = register_model(entry)


def deprecate_infix(module: str, names: Iterable[str]) -> None:
    """Let `NAME_va` build `NAME` with a warning: so were families called that only this package has."""
    register_model_deprecations(module, {f"{name}_va": name for name in names})


def _entry(name: str, variant: Variant, create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(name, pretrained, **{**variant.args, **kwargs})

    cls = get_type_hints(create)["return"].__name__
    args = ", ".join(f"{key}={getattr(value, '__name__', repr(value))}" for key, value in variant.args.items())
    weights = [_describe(tag, cfg) for tag, cfg in variant.tags.items()]
    entry.__doc__ = f"`{name}`: {cls}({args}). {variant.doc}".rstrip() + (
        "\n\nArguments given go over these, and those not named are the class's defaults.\n"
        f"Weights by tag, the default first: {'; '.join(weights)}.\n"
    )
    return entry


def _describe(tag: str, cfg: Mapping[str, Any]) -> str:
    size = " x ".join(str(n) for n in cfg["input_size"][1:])
    published = "" if cfg.get("url") or cfg.get("hf_hub_id") else ", none published"
    return f"{tag} ({size}, {cfg['num_classes']} classes{published})"
