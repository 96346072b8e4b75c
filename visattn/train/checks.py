"""Values and combinations of options that no run can use, refused before anything is built."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from visattn.train.config import Config, Resolved
from visattn.train.errors import ConfigError, shown

# What moves a terminal's cursor, ends a line, turns the direction of writing, or is no text at all (surrogates).
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST_WORD = 4096  # bytes, of a path too
LONGEST_NAME = 255  # bytes of a file or folder
LARGEST_PICTURE = 2**14  # pixels of a side, before the crop
LARGEST_PASS = 2**31  # pixel values; kernels count them in 32 bits
# Arguments of the model that have an option of their own, which other parts of the trainer read.
OWN_OPTION = {"drop_path_rate": "drop_path", "img_size": "img_size", "in_chans": "in_chans", "pretrained": "pretrained"}
# What timm's augmentation strings are made of; three digits keep the number of operations finite in practice.
AUGMENT = re.compile(r"[a-z0-9]+(-[a-z]+([0-9]{1,3}(\.[0-9]+)?)?[a-z]*)*")


def check(config: Config) -> None:
    """Raise ConfigError for a value, or a combination of values, that no run can use."""
    check_values(config)
    check_images(config)
    _check_names(config)
    _check_schedule(config)
    _check_model(config)
    if (config.push_to_hub is None) != (config.hub_license is None):
        raise ConfigError(
            "--push-to-hub: expected --hub-license with it, the terms of your weights, got one of the two; "
            "try --hub-license apache-2.0, or other"
        )
    if not (config.mixup or config.cutmix):
        return
    for name in ("batch_size", "micro_batch"):
        value = getattr(config, name)
        if value is not None and value % 2:
            raise ConfigError(
                f"{_flag(name)}: expected an even number for mixup and cutmix, which mix pairs, got {value}; "
                f"try {value + 1}"
            )


def check_values(options: Any) -> None:
    """Raise ConfigError for a number out of its option's range, or a text that is too long or no plain text.

    Args:
        options: A dataclass, its numbers declared by `number`.
    """
    for field in dataclasses.fields(options):
        value, allowed = getattr(options, field.name), field.metadata.get("range")
        hint = "without it" if field.default in (None, (), dataclasses.MISSING) else f"the default, {field.default}"
        for item in value if isinstance(value, tuple) else (value,):
            wanted = None
            if isinstance(item, (str, Path)):
                wanted = _plain(str(item), names=value is item)
            elif item is not None and allowed and item not in allowed:
                wanted = allowed.said(item)
            if wanted:
                raise ConfigError(f"{_flag(field.name)}: expected {wanted}, got {shown(item)}; try {hint}")


def check_words(argv: list[str], names: bool = False) -> None:
    """Raise ConfigError for words of a command line that are not plain text; with `names`, for impossible paths too."""
    for word in argv:
        if wanted := _plain(word, names):
            raise ConfigError(f"expected {wanted} on the command line, got {shown(word)}; try plain text")


def _plain(text: str, names: bool = False) -> str | None:
    """What is expected in the stead of `text`, if it is not plain; with `names`, it is to be a name or a path."""
    if CONTROL.search(text):
        return "text without control characters"
    if len(text.encode()) > LONGEST_WORD:
        return f"at most {LONGEST_WORD} bytes"
    if names and max(len(part.encode()) for part in text.split("/")) > LONGEST_NAME:
        return f"names of at most {LONGEST_NAME} bytes"
    return None


def _refuse(config: Config, name: str, wanted: str) -> None:
    raise ConfigError(f"{_flag(name)}: expected {wanted}, got {shown(getattr(config, name))}; try without it")


def check_pass(images: int, config: Resolved, option: str) -> None:
    """Raise ConfigError if so many images of the resolved size are too many for one forward pass of any device."""
    most = LARGEST_PASS // (config.in_chans * config.img_size**2)
    if images > most:
        raise ConfigError(
            f"{option}: expected at most {most} images of {config.img_size} px in a forward pass, got {images}; "
            f"try {option} {most}"
        )


def check_images(config: Config) -> None:
    """Raise ConfigError for values that no image can be read with."""
    if config.in_chans == 2:
        _refuse(config, "in_chans", "1 (grey) or 3 (RGB)")
    for name in ("mean", "std"):
        if getattr(config, name) == ():
            _refuse(config, name, "one value or one per channel")
    for name, example in (("scale", "0.7 1.0"), ("ratio", "0.75 1.33")):
        if (value := getattr(config, name)) and value[0] > value[1]:
            _refuse(config, name, f"two rising values, such as {example}")
    if (config.img_size or 0) / (config.crop_pct or 1) > LARGEST_PICTURE:
        raise ConfigError(
            f"expected --img-size / --crop-pct, the size before the crop, of at most {LARGEST_PICTURE}, got "
            f"{config.img_size} / {config.crop_pct}; try a larger --crop-pct"
        )
    if config.auto_augment is not None and not AUGMENT.fullmatch(config.auto_augment):
        _refuse(config, "auto_augment", "a timm policy such as rand-m9-mstd0.5-inc1")
    if config.workers > (most := max(32, 4 * (os.cpu_count() or 1))):
        raise ConfigError(
            f"--workers: expected at most {most} on a machine with {os.cpu_count()} CPUs, got {config.workers}; try "
            f"--workers {os.cpu_count()}"
        )


def _check_names(config: Config) -> None:
    for name in ("data", "model", "opt", "wandb_project"):
        if not getattr(config, name).strip():
            _refuse(config, name, "a name")
    if not all(pattern.strip() for pattern in config.train_only):
        _refuse(config, "train_only", "patterns of parameter names, such as head.*")
    # A separator would put the run elsewhere, and `.` and `..` are no folders of their own.
    if config.name is not None and not (re.fullmatch(r"[^/\\]+", config.name) and config.name.strip(". ")):
        _refuse(config, "name", "the name of one folder")


def _check_schedule(config: Config) -> None:
    if max(config.min_lr, config.warmup_lr) > config.lr:
        raise ConfigError(
            f"expected --min-lr and --warmup-lr of at most --lr {config.lr}, got {config.min_lr} and "
            f"{config.warmup_lr}; try {config.lr / 100:g}"
        )


def _check_model(config: Config) -> None:
    seen = set()
    for argument in config.model_args:
        name, equals, value = argument.partition("=")
        if not (name.isidentifier() and equals and value):
            _refuse(config, "model_args", "name=value, such as qkv_bias=False")
        if name in OWN_OPTION:
            raise ConfigError(
                f"--model-args: expected arguments without an option of their own, got {name}; "
                f"try {_flag(OWN_OPTION[name])}"
            )
        if name in seen:
            raise ConfigError(f"--model-args: expected each name once, got {name} twice; try one of them")
        seen.add(name)
    if config.pretrained and config.weights:
        raise ConfigError(
            f"expected --pretrained or --weights, got both, the latter {config.weights}; try --no-pretrained"
        )
    if config.aux_loss and config.kd_model is not None:
        got = f"{config.aux_loss} and {config.kd_model}"
        raise ConfigError(f"expected --aux-loss or --kd-model, got {got}; try one of them")
    if config.kd_model is None:
        default = Config()
        for name in ("kd_weights", "kd_type", "kd_weight", "kd_temperature"):
            if getattr(config, name) != getattr(default, name):
                raise ConfigError(
                    f"{_flag(name)}: expected a teacher to distil from, got {getattr(config, name)} without one; "
                    "try --kd-model NAME"
                )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
