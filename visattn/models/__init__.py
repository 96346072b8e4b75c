"""Importing this package registers every model with timm: each file here without an underscore is a family."""

from importlib import import_module
from pkgutil import iter_modules

import timm
from timm.models import is_model_in_modules

FAMILIES = tuple(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))

for _family in FAMILIES:
    import_module(f"{__name__}.{_family}")


def list_models(pattern: str = "", pretrained: bool = False, family: str | None = None) -> list[str]:
    """Names of this package's models, as `timm.list_models` lists them.

    timm's own function does so too if it is told the module, which is the family: `timm.list_models(module="nat")`, or
    `module=visattn.models.FAMILIES` for all.

    Args:
        pattern: Shell-style wildcards, as in "dinat_*".
        pretrained: Only models whose weights can be fetched, with their tags.
        family: Only those of one file of `visattn.models`.

    Raises:
        ValueError: An unknown family.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"expected a family of {', '.join(FAMILIES)}, got {family!r}; try list_models('{family}*')")
    return timm.list_models(pattern, module=FAMILIES if family is None else family, pretrained=pretrained)


def is_model(name: str) -> bool:
    """Whether a name, with or without a tag, is that of a model of this package."""
    return is_model_in_modules(name, FAMILIES)
