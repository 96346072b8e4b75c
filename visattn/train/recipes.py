"""Options from YAML: flat files, and the recipes of models in configs/imagenet/<family>.yaml."""

import difflib
import fnmatch
import os
import types
import typing
from pathlib import Path
from typing import Any, Literal

import timm
import yaml
from timm.models import get_deprecated_models, get_pretrained_cfg

from visattn.models import list_models
from visattn.train.config import LAUNCH_ONLY, Config
from visattn.train.errors import ConfigError, shown
from visattn.train.files import configs_folder

MOST_YAML = 50_000  # characters of a file; families have some thousand


class _Loader(yaml.SafeLoader):
    """Safe, and no larger in memory than in the file: only single values have aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent) and not isinstance(node, yaml.ScalarNode):
            raise yaml.composer.ComposerError(None, None, f"an alias of more than one value, *{event.anchor}")
        return node


def load_yaml(text: str) -> Any:
    """Plain values from YAML. Raises ValueError, in one line, for anything that is not."""
    try:
        return _Loader(text).get_single_data()
    except RecursionError:
        raise ValueError("values nested too deeply") from None
    except Exception as error:  # for `!!int ""` and the like whatever parsing those raises
        raise ValueError(" ".join(str(error).split())[:300] or type(error).__name__) from error


def find_recipe(name: str) -> Config:
    """The recipe of a model: the defaults, its registered input, and what the file of its family has for its name.

    Such a file maps shell patterns of names to options. All patterns that match count, later ones over earlier ones.
    """
    name = get_deprecated_models().get(name) or name
    models = list_models()
    if name not in models:
        near = difflib.get_close_matches(name, models, n=1, cutoff=0.0)[0]
        raise ConfigError(f"--recipe: expected a recipe, named as a model of visattn, got {shown(name)}; try {near}")
    family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    cfg = get_pretrained_cfg(name)
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "input_size")
    options: dict[str, Any] = {"model": name} | {key: getattr(cfg, key) for key in keys}
    options["in_chans"], _, options["img_size"] = options.pop("input_size")
    path = configs_folder() / "imagenet" / f"{family}.yaml"
    for pattern, values in _read(path, "a new installation").items():
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected options under each pattern, got {shown(values)}; try `'*': {{lr: 1}}`")
        values = _options(values, f"{path}: {pattern}")  # also where it does not match: no slip waits for its model
        if fnmatch.fnmatchcase(name, str(pattern)):
            options |= values
    return Config(**options)


def read_yaml(path: Path, hint: str = "--recipe NAME, or configs/finetune/full.yaml") -> Config:
    """Read a flat file; every key must be an option and every value of its type."""
    return Config(**_options(_read(path, hint), str(path)))


def _read(path: Path, hint: str) -> dict[Any, Any]:
    """The mapping that a YAML file holds."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a device might never end
            raise ValueError("something else than a plain file")
        with open(path, encoding="utf-8") as file:
            text = file.read(MOST_YAML + 1)
        if len(text) > MOST_YAML:
            raise ValueError(f"more than {MOST_YAML} characters")
    except (OSError, ValueError) as error:
        raise ConfigError(f"expected a YAML file at {path}, got {error}; try {hint}") from error
    try:
        values = load_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: expected flat YAML, got {error}; try one `option: value` a line") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `option: value` lines, got a {type(values).__name__}; try `epochs: 10`")
    return values


def _options(values: dict[Any, Any], where: str) -> dict[str, Any]:
    """The values, each as the type of the option that its key names."""
    hints = {name: hint for name, hint in typing.get_type_hints(Config).items() if name not in LAUNCH_ONLY}
    for key in values:
        if key not in hints:
            near = repr(difflib.get_close_matches(shown(key).replace("-", "_"), hints, n=1, cutoff=0.0)[0])
            near = "--recipe NAME for a model's recipe" if isinstance(values[key], dict) else near
            raise ConfigError(f"{where}: expected an option name, got unknown key {shown(key)}; try {near}")
    return {key: _convert(value, hints[key], f"{where}: {key}") for key, value in values.items()}


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as the type `hint`; YAML itself reads `1e-3` as a string and `1` as an int."""
    kind, args = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        hint = next(arg for arg in args if arg is not type(None))
        return None if value is None else _convert(value, hint, where)
    if kind is tuple and isinstance(value, list) and (args[-1] is Ellipsis or len(value) == len(args)):
        return tuple(_convert(item, args[0], where) for item in value)
    if kind is Literal and value in args:
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint in (str, Path) and isinstance(value, str):
        return hint(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    wanted = f"one of {', '.join(args)}" if kind is Literal else hint if kind else hint.__name__
    raise ConfigError(f"{where}: expected {wanted}, got {shown(value)}; try `visattn train --help`")
