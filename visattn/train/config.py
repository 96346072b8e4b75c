"""Options of a run: one flat dataclass, filled from its defaults, then a flat YAML file, then the command line."""

import argparse
import dataclasses
import difflib
import os
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml

from visattn.train.checks import check, check_words, number
from visattn.train.errors import CheckpointError, ConfigError, shown

# How a run is started, not what it computes: kept out of the recipe files.
LAUNCH_ONLY = ("config", "resume", "override")
AUTO = Path("auto")
MOST_YAML = 50_000  # characters of a file; recipes have two thousand
# A resumed run may change what leaves its mathematics alone, its `epochs`, and with `override` what has no state.
FREE_ON_RESUME = (
    *("output", "name", "device", "engine", "workers", "micro_batch", "compile", "channels_last", "grad_checkpointing"),
    *("checkpoint_every", "keep_checkpoints", "dist_timeout", "tensorboard", "wandb", "wandb_project", "peak_tflops"),
)
OVERRIDABLE = (
    *("cooldown_epochs", "batch_size", "sched", "lr", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay"),
    *("grad_clip", "smoothing", "drop_path", "mixup", "cutmix", "scale", "ratio", "hflip", "color_jitter"),
    *("auto_augment", "reprob", "train_interpolation", "kd_weight", "kd_temperature", "amp", "sync_bn"),
    *("nonfinite", "max_skips", "max_bad"),
)

Resize = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]


@dataclass(frozen=True)
class Config:
    """Train an image classifier. Without arguments: handwritten digits on a CPU, in about a minute."""

    config: Path | None = None  # flat YAML file with any of the options below; the command line overrides it
    resume: Path | None = None  # run folder to continue, at the very step; `auto`: --name's folder, if there is one
    override: bool = False  # let --resume change more than --epochs: learning rate, batch size, regularization, ...

    data: str = "digits"  # digits, mnist5k, hfds/NAME, or a folder with train/ and val/ of class folders or tar shards
    max_bad: float = number(0.01, 0, 1)  # share of unreadable training images above which the run stops
    workers: int = number(0, 0, 1024)  # loader processes; 0 loads in the main process
    model: str = "dinat_atto"  # any name that timm or visattn registers
    model_args: tuple[str, ...] = ()  # further arguments of the model, each as name=value
    pretrained: bool = False  # start from the registered pretrained weights
    weights: Path | None = None  # start from this .safetensors or plain .pth file; a head of another size is left out
    train_only: tuple[str, ...] = ()  # patterns of the parameters to train, such as head.*; the rest is frozen
    output: Path = Path("output")  # folder that receives one folder per run
    name: str | None = None  # of this run's folder; None: model-data-timestamp

    img_size: int | None = number(None, 1, 8192)  # of training and test, in pixels; None: the data set's or the model's
    in_chans: int | None = number(None, 1, 3)  # 1 (grey) or 3 (RGB); None: the data set's
    mean: tuple[float, ...] | None = number(None, 0, 1)  # of the pixels, one value or one a channel; None: as img_size
    std: tuple[float, ...] | None = number(None, 1e-3, 1)  # pixel standard deviation, likewise
    interpolation: Resize | None = None  # test-time resize; None: as img_size
    crop_pct: float | None = number(None, 0.1, 1.25)  # share of the resized test image that is kept; None: as img_size
    crop_mode: Literal["center", "squash", "border"] | None = None  # how a test image becomes square; None: likewise

    epochs: int = number(15, 1, 10**6)  # length of the schedule, warm-up included
    cooldown_epochs: int = number(0, 0, 10**6)  # further epochs at the last learning rate
    batch_size: int = number(64, 1, 2**20)  # images per optimizer update, over all processes
    micro_batch: int | None = number(None, 1, 2**20)  # most images of a process's forward pass; None: its whole share
    opt: str = "adamw"  # timm optimizer name
    sched: Literal["cosine", "linear", "constant"] = "cosine"  # what follows the warm-up
    lr: float = number(2e-3, 1e-30, 1000)  # peak learning rate, not scaled by the batch size
    min_lr: float = number(1e-5, 0, 1000)  # final learning rate
    warmup_lr: float = number(1e-5, 0, 1000)  # first learning rate
    warmup_epochs: float = number(2, 0, 10**6)  # linear warm-up
    weight_decay: float = number(0.05, 0, 10)  # not of biases, norms and what the model's no_weight_decay names
    layer_decay: float | None = number(None, 0.01, 1)  # learning rate factor from each layer group to the one before it
    grad_clip: float | None = number(None, 1e-12, 1e6)  # largest gradient norm
    ema_decay: float = number(0.0, 0, 1 - 1e-9)  # of the moving average of the weights; 0: none. Both are evaluated
    ema_warmup: bool = True  # let the average follow closely at first: 1 - (1 + update)^(-2/3), at most ema_decay

    smoothing: float = number(0.1, 0, 0.999)  # label smoothing
    drop_path: float | None = number(None, 0, 0.999)  # stochastic depth rate; None: the model's own
    mixup: float = number(0.0, 0, 100, tiny=1e-3)  # mixup alpha
    cutmix: float = number(0.0, 0, 100, tiny=1e-3)  # cutmix alpha
    aug_repeats: int = number(1, 1, 100)  # copies of an image in an update, each augmented anew (3 is usual)
    scale: tuple[float, float] | None = number(None, 1e-3, 1)  # area of the random resized crop; None: the data set's
    ratio: tuple[float, float] | None = number(None, 0.1, 10)  # its aspect ratio; None: the data set's
    hflip: float | None = number(None, 0, 1)  # chance of a horizontal flip; None: the data set's (0 for digits)
    color_jitter: float = number(0.0, 0, 2)  # strength; timm turns it off where RandAugment is on
    auto_augment: str | None = None  # RandAugment string such as rand-m9-mstd0.5-inc1
    reprob: float = number(0.0, 0, 1)  # chance of random erasing (per-pixel noise)
    train_interpolation: Literal[Resize, "random"] | None = None  # training resize; None: as interpolation

    kd_model: str | None = None  # distil from this teacher, a model with pretrained weights
    kd_weights: Path | None = None  # the teacher's weights from a file instead
    kd_type: Literal["logit", "feature", "token"] = "logit"  # what the student imitates
    kd_weight: float = number(1.0, 0, 1e4)  # weight of the distillation loss beside the loss of the labels
    kd_temperature: float = number(1.0, 0.01, 100)  # softens both distributions (logit, token)

    device: str = "auto"  # auto takes cuda where there is one; otherwise a torch device name
    engine: Literal["ddp", "fsdp2"] = "ddp"  # how processes of torchrun share the work; fsdp2 shards all state
    amp: Literal["none", "bfloat16", "float16"] = "none"  # mixed precision; float16 scales the loss
    compile: bool = False  # torch.compile
    channels_last: bool = False  # memory format
    grad_checkpointing: bool = False  # recompute activations: less memory, more time
    sync_bn: bool = False  # batch norm over all processes; otherwise their statistics are averaged
    dist_timeout: float = number(600, 1, 30 * 24 * 3600)  # seconds after which a process that waits for others gives up
    seed: int = number(42, 0, 2**32 - 1)  # seeds everything except the fixed digits split

    nonfinite: Literal["halt", "skip"] = "halt"  # at a NaN or infinite loss or gradient: stop, or drop the update
    max_skips: int = number(10, 1, 10**6)  # dropped updates in a row after which `skip` stops too
    checkpoint_every: int = number(0, 0, 10**9)  # updates between checkpoints; one follows each epoch in any case
    keep_checkpoints: int = number(2, 1, 10**6)  # newest ones that stay
    tensorboard: bool = False  # event files in the run's folder
    wandb: Literal["off", "offline", "online"] = "off"  # Weights & Biases; offline writes to the run's folder only
    wandb_project: str = "visattn"
    peak_tflops: float | None = number(None, 1e-3, 1e6)  # of one device, for the MFU; None: known for common GPUs


def parse(argv: list[str] | None = None) -> Config:
    """Read the command line (and the file it names) into a checked Config."""
    check_words(sys.argv[1:] if argv is None else argv)
    early = argparse.ArgumentParser(prog="python -m visattn.train", add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--resume", type=Path)
    early.add_argument("--name")
    early.add_argument("--output", type=Path, default=Config.output)
    named, _ = early.parse_known_args(argv)
    check_words([str(path) for path in (named.config, named.resume) if path], names=True)
    automatic = named.resume == AUTO
    if automatic and not named.name:
        raise ConfigError("--resume auto: expected the name of the run too, got none; try --name NAME")
    if named.config and named.resume and not automatic:
        raise ConfigError("expected --config or --resume, got both; try --resume alone: a run keeps its own args.yaml")

    base = Config()
    folder = named.resume
    if automatic:
        folder = named.output / named.name
        folder = folder if os.path.isfile(folder / "args.yaml") else None
    if folder:
        base = read_yaml(run_folder(folder) / "args.yaml", hint="--resume output/RUN")
    elif named.config:
        base = read_yaml(named.config)
    config = tyro.cli(Config, args=argv, default=base, prog="python -m visattn.train")
    if config.override and not named.resume:
        raise ConfigError("--override: expected --resume, whose options it changes, got none; try without it")
    config = dataclasses.replace(config, resume=folder)
    check(config)
    return config


def run_folder(resume: Path) -> Path:
    """The folder of the run that `--resume` names by itself or by one of its files."""
    for folder in (resume, resume.parent, resume.parent.parent):
        if os.path.isfile(folder / "args.yaml"):  # Path.is_file raises where a name is too long
            return folder
    raise CheckpointError(f"--resume: expected a run folder, got no args.yaml in {resume}; try --resume output/RUN")


class _Loader(yaml.SafeLoader):
    """Safe, and no larger in memory than in the file: only single values have aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
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


def read_yaml(path: Path, hint: str = "configs/imagenet/*.yaml") -> Config:
    """Read a flat recipe file; every key must be an option and every value of its type."""
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

    hints = {name: hint for name, hint in typing.get_type_hints(Config).items() if name not in LAUNCH_ONLY}
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(shown(key).replace("-", "_"), hints, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{path}: expected an option name, got unknown key {shown(key)}; try {near!r}")
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
    raise ConfigError(f"{where}: expected {wanted}, got {shown(value)}; try `python -m visattn.train --help`")


def recipe(config: Config) -> dict[str, Any]:
    """The options as plain YAML values: what args.yaml holds and what a checkpoint must agree with."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in LAUNCH_ONLY}
    return {
        key: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
    }
