"""Values and combinations of options that no run can use, refused before anything is built."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from train.errors import ConfigError

if TYPE_CHECKING:
    from train.config import Config

# Options, what must hold of their values, and how to say it. None is always right: it means "not given".
RULES = (
    (
        "epochs batch_size micro_batch aug_repeats max_skips keep_checkpoints",
        lambda v: v >= 1,
        "at least 1",
    ),
    (
        "lr img_size grad_clip kd_temperature dist_timeout peak_tflops",
        lambda v: 0 < v < math.inf,
        "a finite value above 0",
    ),
    (
        "cooldown_epochs min_lr warmup_lr warmup_epochs weight_decay mixup cutmix color_jitter kd_weight workers seed "
        "checkpoint_every",
        lambda v: 0 <= v < math.inf,
        "a finite value of at least 0",
    ),
    ("layer_decay crop_pct", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ("smoothing drop_path ema_decay", lambda v: 0 <= v < 1, "at least 0 and below 1"),
    ("hflip reprob max_bad", lambda v: 0 <= v <= 1, "a share, 0 to 1"),
    ("in_chans", lambda v: v in (1, 3), "1 (grey) or 3 (RGB)"),
    ("scale", lambda v: 0 < v[0] <= v[1] <= 1, "two rising shares of the area, such as 0.7 1.0"),
    ("ratio", lambda v: 0 < v[0] <= v[1] < math.inf, "two rising aspect ratios, such as 0.75 1.33"),
    ("mean", lambda v: v and all(math.isfinite(x) for x in v), "finite values"),
    ("std", lambda v: v and all(0 < x < math.inf for x in v), "finite values above 0"),
    ("train_only", all, "patterns of parameter names, such as head.*"),
    ("data model wandb_project", bool, "a name"),
    # A separator would put the run elsewhere, and `.` and `..` are no folders of their own.
    ("name", lambda v: re.fullmatch(r"[^/\\]+", v) and v.strip(".") != "", "the name of one folder"),
)
# Arguments of the model that have an option of their own, which other parts of the trainer read.
OWN_OPTION = {"drop_path_rate": "drop_path", "img_size": "img_size", "in_chans": "in_chans", "pretrained": "pretrained"}


def check(config: Config) -> None:
    """Raise ConfigError for a value, or a combination of values, that no run can use."""
    default = type(config)()
    for names, ok, wanted in RULES:
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not ok(value):
                hint = getattr(default, name)
                hint = "without it" if hint in (None, ()) else f"the default, {hint}"
                raise ConfigError(f"{_flag(name)}: expected {wanted}, got {value!r}; try {hint}")
    _check_schedule(config)
    _check_model(config)
    if not (config.mixup or config.cutmix):
        return
    for name in ("batch_size", "micro_batch"):
        value = getattr(config, name)
        if value is not None and value % 2:
            raise ConfigError(
                f"{_flag(name)}: expected an even number for mixup and cutmix, which mix pairs, got {value}; "
                f"try {value + 1}"
            )


def _check_schedule(config: Config) -> None:
    if max(config.min_lr, config.warmup_lr) > config.lr:
        raise ConfigError(
            f"expected --min-lr and --warmup-lr of at most --lr {config.lr}, got {config.min_lr} and "
            f"{config.warmup_lr}; try {config.lr / 100:g}"
        )
    if config.warmup_epochs >= config.epochs and config.warmup_epochs > 0:
        raise ConfigError(
            f"--warmup-epochs: expected fewer than --epochs {config.epochs}, got {config.warmup_epochs}; "
            "try --warmup-epochs 0"
        )


def _check_model(config: Config) -> None:
    seen = set()
    for argument in config.model_args:
        name, equals, value = argument.partition("=")
        if not (name.isidentifier() and equals and value):
            raise ConfigError(f"--model-args: expected name=value, got {argument!r}; try --model-args qkv_bias=False")
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
    if config.kd_model is None:
        default = type(config)()
        for name in ("kd_weights", "kd_type", "kd_weight", "kd_temperature"):
            if getattr(config, name) != getattr(default, name):
                raise ConfigError(
                    f"{_flag(name)}: expected a teacher to distil from, got {getattr(config, name)} without one; "
                    "try --kd-model NAME"
                )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
