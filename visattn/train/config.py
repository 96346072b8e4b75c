"""Options of a run: one flat dataclass, with the range of every number."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# How a run is started, not what it computes: kept out of files.
LAUNCH_ONLY = ("recipe", "config", "print_config", "resume", "lr_find", "override", "push_to_hub", "hub_license")
# A resumed run may change what leaves its mathematics alone, its `epochs`, and with `override` what has no state.
FREE_ON_RESUME = (
    *("output", "name", "device", "engine", "workers", "micro_batch", "compile", "channels_last", "grad_checkpointing"),
    *("checkpoint_every", "keep_checkpoints", "dist_timeout", "tensorboard", "wandb", "wandb_project", "peak_tflops"),
)
OVERRIDABLE = (
    *("cooldown_epochs", "patience", "batch_size", "sched", "lr", "min_lr", "warmup_lr", "warmup_epochs"),
    *("weight_decay", "grad_clip", "smoothing", "drop_path", "mixup", "cutmix", "scale", "ratio", "hflip"),
    *("color_jitter", "auto_augment", "reprob", "train_interpolation", "kd_weight", "kd_temperature", "amp"),
    *("sync_bn", "nonfinite", "max_skips", "max_bad"),
)

Resize = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`. Where 0 is one of them, `tiny` is the next: what is nearer is a slip."""

    low: float
    high: float
    tiny: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and (self.low > 0 or value == 0 or value >= self.tiny)

    def said(self, value: float) -> str:
        """What is expected in the stead of `value`."""
        if isinstance(value, float) and self.low == 0:
            return f"0, or {self.tiny:g} to {self.high:.10g}"
        return f"{self.low:.10g} to {self.high:.10g}"


def number(default: Any, low: float, high: float, tiny: float = 1e-12) -> Any:
    """A field for a number, or a tuple of numbers, each in this range. None is always right: it means "not given"."""
    return dataclasses.field(default=default, metadata={"range": Range(low, high, tiny)})


@dataclass(frozen=True)
class Config:
    """Train an image classifier. Without arguments: handwritten digits on a CPU, in about a minute.

    $ visattn train
    $ visattn train --data photos/ --model dinat_mini --img-size 224
    $ visattn train --recipe dinat_mini --data imagenet/
    $ visattn train --resume output/RUN
    $ torchrun --nproc-per-node 8 -m visattn.train --recipe dinat_mini --data imagenet/
    """

    recipe: str | None = None  # model to train by its recipe (configs/imagenet); the command line overrides it
    config: Path | None = None  # flat YAML file with any of the options below instead; likewise
    print_config: bool = False  # only show what results, in full, as a file for --config
    resume: Path | None = None  # run folder to continue, at the very step; `auto`: --name's folder, if there is one
    lr_find: bool = False  # only try rising learning rates: a curve, lr_find.png, and a suggestion
    override: bool = False  # let --resume change more than --epochs: learning rate, batch size, regularization, ...

    push_to_hub: str | None = None  # at the end: OWNER/NAME on the Hugging Face hub for best weights and a model card
    hub_license: str | None = None  # of these weights, for the card: apache-2.0, cc-by-nc-4.0, other, ...

    data: str = "digits"  # digits, mnist5k, hfds/NAME, or a folder with train/ and val/ of class folders or tar shards
    val_split: float | None = number(None, 1e-6, 0.9)  # share of each class to test with, where only classes are
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
    patience: int | None = number(None, 1, 10**6)  # epochs in a row without a better top-1 after which the run ends
    batch_size: int = number(64, 1, 2**20)  # images per optimizer update, over all processes
    micro_batch: int | None = number(None, 1, 2**20)  # most images of a process's forward pass; None: its whole share
    opt: str = "adamw"  # timm optimizer name
    sched: Literal["cosine", "linear", "constant"] = "cosine"  # what follows the warm-up
    lr: float = number(2e-3, 1e-30, 1000)  # peak learning rate, not scaled by the batch size
    min_lr: float = number(1e-5, 0, 1000)  # final learning rate
    warmup_lr: float = number(1e-5, 0, 1000)  # first learning rate
    warmup_epochs: float = number(2, 0, 10**6)  # linear warm-up; of a run that is no longer than it, the first half
    weight_decay: float = number(0.05, 0, 10)  # not of biases, norms and what the model's no_weight_decay names
    layer_decay: float | None = number(None, 0.01, 1)  # learning rate factor from each layer group to the one before it
    grad_clip: float | None = number(None, 1e-12, 1e6)  # largest gradient norm
    ema_decay: float = number(0.0, 0, 1 - 1e-9)  # of the moving average of the weights; 0: none. Both are evaluated
    ema_warmup: bool = True  # let the average follow closely at first: 1 - (1 + update)^(-2/3), at most ema_decay

    smoothing: float = number(0.1, 0, 0.999)  # label smoothing
    aux_loss: float = number(0.0, 0, 1e4)  # weight of the loss of an auxiliary classifier, such as OverLoCK has
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
    wandb_project: str = "visattn"  # the project there
    peak_tflops: float | None = number(None, 1e-3, 1e6)  # of one device, for the MFU; None: known for common GPUs


@dataclass(frozen=True, kw_only=True)
class Resolved(Config):
    """The same once nothing that the data set or the model decides is open."""

    img_size: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Resize
    crop_pct: float
    crop_mode: Literal["center", "squash", "border"]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    hflip: float
    train_interpolation: Literal[Resize, "random"]


def recipe(config: Config) -> dict[str, Any]:
    """The options as plain YAML values: what args.yaml holds and what a checkpoint must agree with."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in LAUNCH_ONLY}
    return {
        key: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
    }
