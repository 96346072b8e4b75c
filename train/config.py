"""Options of a run: one flat dataclass, filled from its defaults, then a flat YAML file, then the command line."""

import argparse
import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml

from train.errors import CheckpointError, ConfigError

# How a run is started, not what it computes: kept out of the recipe files.
LAUNCH_ONLY = ("config", "resume")


Resize = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]


@dataclass(frozen=True)
class Config:
    """Train an image classifier. Without arguments: handwritten digits on a CPU, in about a minute."""

    config: Path | None = None  # flat YAML file with any of the options below; the command line overrides it
    resume: Path | None = None  # run folder (or its last.pt) to continue after its last complete epoch

    data: str = "digits"  # `digits` (inside scikit-learn), or a folder with train/ and val/ of class folders
    model: str = "test_dinat"  # any name that timm or visattn registers
    output: Path = Path("output")  # folder that receives one folder per run
    run: str | None = None  # name of this run's folder; None: model-data-timestamp

    img_size: int | None = None  # training and test size in pixels; None: the data set's or the model's
    in_chans: int | None = None  # 1 (grey) or 3 (RGB); None: the data set's
    mean: tuple[float, ...] | None = None  # pixel mean in 0..1, one value or one per channel; None: as img_size
    std: tuple[float, ...] | None = None  # pixel standard deviation, likewise
    interpolation: Resize | None = None  # test-time resize; None: as img_size
    crop_pct: float | None = None  # share of the resized test image that the centre crop keeps; None: as img_size

    epochs: int = 15  # length of the cosine schedule, warm-up included
    cooldown_epochs: int = 0  # further epochs at min_lr
    batch_size: int = 64  # images per forward pass
    grad_accum: int = 1  # forward passes per optimizer update
    opt: str = "adamw"  # timm optimizer name
    lr: float = 2e-3  # peak learning rate, not scaled by the batch size
    min_lr: float = 1e-5  # final learning rate
    warmup_lr: float = 1e-5  # first learning rate
    warmup_epochs: float = 2  # linear warm-up
    weight_decay: float = 0.05  # not applied to biases, norms and what the model's no_weight_decay names
    layer_decay: float | None = None  # learning rate factor from each layer group to the one before it
    grad_clip: float | None = None  # largest gradient norm

    smoothing: float = 0.1  # label smoothing
    drop_path: float = 0.0  # stochastic depth rate
    mixup: float = 0.0  # mixup alpha
    cutmix: float = 0.0  # cutmix alpha
    scale: tuple[float, float] | None = None  # area kept by the random resized crop; None: the data set's
    ratio: tuple[float, float] | None = None  # its aspect ratio; None: the data set's
    hflip: float | None = None  # chance of a horizontal flip; None: the data set's (0 for digits)
    color_jitter: float = 0.0  # strength; timm turns it off where RandAugment is on
    auto_augment: str | None = None  # RandAugment string such as rand-m9-mstd0.5-inc1
    reprob: float = 0.0  # chance of random erasing (per-pixel noise)
    train_interpolation: Literal[Resize, "random"] | None = None  # training resize; None: as interpolation

    device: str = "auto"  # auto takes cuda where there is one; otherwise a torch device name
    amp: Literal["none", "bfloat16", "float16"] = "none"  # mixed precision; float16 scales the loss
    workers: int = 0  # loader processes; 0 loads in the main process
    seed: int = 42  # seeds everything except the fixed digits split


def parse(argv: list[str] | None = None) -> Config:
    """Read the command line (and the file it names) into a checked Config."""
    early = argparse.ArgumentParser(prog="python -m train", add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--resume", type=Path)
    named, _ = early.parse_known_args(argv)
    if named.config and named.resume:
        raise ConfigError("expected --config or --resume, got both; try --resume alone: a run keeps its own args.yaml")

    base = Config()
    if named.resume:
        base = read_yaml(run_folder(named.resume) / "args.yaml", hint="--resume output/RUN")
    elif named.config:
        base = read_yaml(named.config)
    config = tyro.cli(Config, args=argv, default=base, prog="python -m train")
    check(config)
    return config


def run_folder(resume: Path) -> Path:
    """The folder of the run that `--resume` names by folder or by checkpoint."""
    if resume.is_dir():
        return resume
    if resume.is_file():
        return resume.parent
    raise CheckpointError(f"--resume: expected a run folder or its last.pt, got no {resume}; try --resume output/RUN")


def read_yaml(path: Path, hint: str = "configs/imagenet/*.yaml") -> Config:
    """Read a flat recipe file; every key must be an option and every value of its type."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"expected a YAML file at {path}, got {error}; try {hint}") from error
    try:
        values = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: expected flat YAML, got {reason}; try one `option: value` a line") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `option: value` lines, got a {type(values).__name__}; try `epochs: 10`")

    hints = {name: hint for name, hint in typing.get_type_hints(Config).items() if name not in LAUNCH_ONLY}
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key).replace("-", "_"), hints, n=1, cutoff=0.0)
            raise ConfigError(f"{path}: expected an option name, got unknown key {key!r}; try {near[0]!r}")
    return Config(**{key: _convert(value, hints[key], f"{path}: {key}") for key, value in values.items()})


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
    raise ConfigError(f"{where}: expected {wanted}, got {value!r}; try `python -m train --help`")


def check(config: Config) -> None:
    """Raise ConfigError for a value that no run can use."""
    for names, ok, wanted in (
        ("epochs batch_size grad_accum", lambda v: v >= 1, "at least 1"),
        ("lr img_size grad_clip", lambda v: 0 < v < float("inf"), "a finite value above 0"),
        ("layer_decay crop_pct", lambda v: 0 < v <= 1, "above 0 and at most 1"),
        ("hflip reprob", lambda v: 0 <= v <= 1, "a probability, 0 to 1"),
        ("smoothing drop_path", lambda v: 0 <= v < 1, "at least 0 and below 1"),
        ("in_chans", lambda v: v in (1, 3), "1 (grey) or 3 (RGB)"),
        (
            "cooldown_epochs min_lr warmup_lr warmup_epochs weight_decay mixup cutmix color_jitter workers seed",
            lambda v: 0 <= v < float("inf"),
            "a finite value of at least 0",
        ),
        ("scale", lambda v: 0 < v[0] <= v[1] <= 1, "two rising shares of the area, such as 0.7 1.0"),
        ("ratio", lambda v: 0 < v[0] <= v[1], "two rising aspect ratios, such as 0.75 1.33"),
        ("std", lambda v: len(v) > 0 and all(x > 0 for x in v), "values above 0"),
    ):
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not ok(value):
                raise ConfigError(f"--{name.replace('_', '-')}: expected {wanted}, got {value}; try another value")
    if max(config.min_lr, config.warmup_lr) > config.lr:
        raise ConfigError(
            f"expected --min-lr and --warmup-lr of at most --lr {config.lr}, got {config.min_lr} and "
            f"{config.warmup_lr}; try {config.lr / 100}"
        )
    if config.warmup_epochs >= config.epochs and config.warmup_epochs > 0:
        raise ConfigError(
            f"--warmup-epochs: expected fewer than --epochs {config.epochs}, got {config.warmup_epochs}; "
            "try --warmup-epochs 0"
        )
    if (config.mixup or config.cutmix) and config.batch_size % 2:
        raise ConfigError(
            f"--batch-size: expected an even number for mixup and cutmix, which mix pairs, got {config.batch_size}; "
            f"try {config.batch_size + 1}"
        )


def recipe(config: Config) -> dict[str, Any]:
    """The options as plain YAML values: what args.yaml holds and what a checkpoint must agree with."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in LAUNCH_ONLY}
    return {
        key: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
    }
