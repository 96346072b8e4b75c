"""`visattn validate`: loss and accuracy of a trained model on a test split or a robustness set."""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from inspect import cleandoc
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from visattn.train.start import begin

if __name__ == "__main__":
    begin()

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
from timm.data import RealLabelsImagenet
from timm.data.loader import fast_collate
from timm.models import resolve_model_input_args
from timm.task import ClassificationEvaluator
from torch import nn
from torchvision.transforms import Compose, FiveCrop, TenCrop

import visattn  # noqa: F401  registers its models with timm
from visattn.hub import RUN_WEIGHTS, find_in_run
from visattn.train import signals
from visattn.train.checks import check_images, check_pass, check_values, check_words
from visattn.train.config import Config, Resolved
from visattn.train.data import open_eval, resolve, test_splits
from visattn.train.distributed import pick_device
from visattn.train.engine import autocast
from visattn.train.errors import CheckpointError, ConfigError, DataError, TrainError, exhausted, printable
from visattn.train.files import write_atomic
from visattn.train.loader import Loader, TestImages, allow_files, make_test_transform, plain_errors, prefetch
from visattn.train.metrics import make_console, say
from visattn.train.model import check_names, make_model
from visattn.train.recipes import read_yaml
from visattn.train.robustness import open_robustness
from visattn.train.sources import Source
from visattn.train.weights import load_into
from visattn.weights import WeightsError


@dataclass(frozen=True)
class Options:
    """Evaluate an image classifier. Unreadable images are named and counted; the figures are over all others.

    $ visattn validate --run output/RUN
    $ visattn validate --model dinat_mini --pretrained --data imagenet/
    """

    data: str | None = None  # digits, mnist5k, hfds/NAME, or a folder with val/; with --robustness the set's own folder
    model: str | None = None  # any name that timm or visattn registers
    weights: Path | None = None  # its weights, a .safetensors or plain .pth file
    pretrained: bool = False  # its registered pretrained weights
    run: Path | None = None  # model, data and weights of this run folder instead
    ema: bool = False  # the run's averaged weights

    in_chans: int | None = None  # 1 (grey) or 3 (RGB); None, as in the next four: the run's, or the model's
    img_size: int | None = None  # in pixels
    crop_pct: float | None = None  # share of the resized image that is kept
    crop_mode: Literal["center", "squash", "border"] | None = None  # how an image becomes square
    batch_size: int | None = None  # images of a forward pass, each with all its crops
    crops: Literal[1, 5, 10] = 1  # average over the centre, the corners (5), and their mirror images (10)
    real_labels: bool = False  # also score against the reassessed labels of ImageNet's validation images
    real_json: Path | None = None  # these labels from a file instead of the ones inside timm
    robustness: Literal["a", "r", "c"] | None = None  # the folder layout of ImageNet-A, -R or -C

    workers: int = 0  # loader processes
    device: str = "auto"  # auto takes cuda where there is one; otherwise a torch device name
    amp: Literal["none", "bfloat16", "float16"] | None = None  # mixed precision; None: the run's, or none
    results: Path | None = None  # JSON file for the figures


@dataclass
class Validator:
    """A model with its transform; `bad` collects the names of unreadable images."""

    config: Resolved
    model: nn.Module
    transform: Any
    batch_size: int
    device: torch.device
    console: Console
    bad: list[str] = field(default_factory=list)

    @torch.no_grad()
    def score(
        self, source: Source, outputs: list[int] | None = None, real: RealLabelsImagenet | None = None
    ) -> dict[str, float]:
        """Loss, top-1 and top-5 in % over the readable images; only the model's `outputs`, if given, are classes."""
        config, images = self.config, TestImages(source, self.transform)
        allow_files(config.workers)
        loader = Loader(images, self.batch_size, num_workers=config.workers, collate_fn=fast_collate)
        evaluator, seen = ClassificationEvaluator(self.device), 0
        for batch, target in plain_errors(prefetch(loader, config, self.device)):
            with autocast(self.device, config.amp):
                logits = self.model(batch.flatten(0, -4)).float()
            if outputs is not None:
                logits = logits[:, outputs]
            if batch.ndim == 5:  # the logarithm of the crops' mean probability, up to what a softmax takes away
                logits = logits.log_softmax(-1).unflatten(0, batch.shape[:2]).logsumexp(1)
            readable = target >= 0
            evaluator.update(logits[readable], target[readable])
            if real:
                for offset in readable.nonzero().flatten().tolist():
                    real.sample_idx = seen + offset
                    real.add_result(logits[offset : offset + 1])
            seen += len(target)
        self._name_bad(images)
        if not evaluator.num_samples:
            raise DataError(f"expected readable images, got none in {source.name(0)} and after; try another --data")
        return {"images": evaluator.num_samples, **evaluator.compute()}

    def _name_bad(self, images: TestImages) -> None:
        for index in images.bad.nonzero().flatten().tolist():
            self.bad.append(images.source.name(index))
            say(self.console, f"unreadable image: {images.source.describe(index)}")


class ToStack:
    """Turns the crops of one image into one tensor."""

    def __init__(self, to_tensor: Any):
        self.to_tensor = to_tensor

    def __call__(self, crops: tuple) -> torch.Tensor:
        return torch.stack([self.to_tensor(crop) for crop in crops])


def make_transform(config: Resolved, crops: int) -> Compose:
    """The trainer's test transform; with several crops per image instead of one in the centre."""
    transform = make_test_transform(config)
    if crops > 1:
        resize, _, to_tensor = transform.transforms
        cut = FiveCrop if crops == 5 else TenCrop
        return Compose([resize, cut(config.img_size), ToStack(to_tensor)])
    return transform


def configure(options: Options) -> tuple[Resolved, Path | None]:
    """The run's or a new configuration with the options over it, and the file of the weights."""
    check_values(options)
    given = [name for name in ("run", "weights", "pretrained") if getattr(options, name)]
    if len(given) != 1 or (options.run is None) == (options.model is None):
        raise ConfigError(
            f"expected --run, or --model with either --weights or --pretrained, got "
            f"{', '.join(f'--{name}' for name in [*given, *(['model'] if options.model else [])]) or 'none of them'}; "
            "try --run output/RUN"
        )
    if options.ema and options.run is None:
        raise ConfigError(
            "--ema: expected --run, whose average it is, got --model; try --weights model_ema.safetensors"
        )
    if options.robustness and (options.data is None or options.real_labels):
        raise ConfigError("--robustness: expected --data, the set's own folder, and no --real-labels; try --data DIR")

    weights = options.weights
    if options.run is not None:
        try:
            weights = find_in_run(options.run, "args.yaml", RUN_WEIGHTS[options.ema])
        except WeightsError as error:
            raise CheckpointError(str(error)) from error
        config = read_yaml(options.run / "args.yaml", hint="--run output/RUN")
    else:
        if options.data is None:
            raise ConfigError("--data: expected a data set, got none; try --data DIR")
        config = Config(pretrained=options.pretrained)
    names = ("model", "data", "in_chans", "img_size", "crop_pct", "crop_mode", "batch_size", "amp")
    asked = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.data is not None and test_splits(Path(options.data)):  # which a run that made its own did not have
        asked["val_split"] = None
    if options.run is not None:
        asked |= {"pretrained": False, "weights": None, "train_only": (), "grad_checkpointing": False}
    config = dataclasses.replace(config, workers=options.workers, device=options.device, **asked)
    check_values(config)
    check_images(config)
    check_names(config)
    config = resolve(config, resolve_model_input_args(config.model)["pretrained_cfg"])
    if options.crops > 1 and config.crop_mode == "border":
        raise ConfigError("--crops: expected --crop-mode center or squash, got border; try --crop-mode center")
    return config, weights


def open_splits(config: Resolved, robustness: str | None) -> tuple[dict[str, Source], list[str], list[int] | None]:
    """What to score by name, the classes, and the outputs of an ImageNet model that stand for them (None: all)."""
    if robustness is not None:
        return open_robustness(config, robustness)
    source, classes = open_eval(config)
    return {"eval": source}, classes, None


def load_model(config: Resolved, weights: Path | None, num_classes: int, console: Console) -> nn.Module:
    """The trained model; one without a trained head of the right size is refused."""
    own = resolve_model_input_args(config.model)["pretrained_cfg"].get("num_classes")
    if config.pretrained and own != num_classes:
        raise DataError(f"expected data with the {own} classes of the weights, got {num_classes}; try other --data")
    model = make_model(config, num_classes, console)
    if weights is not None and (left_out := load_into(model, weights)):
        raise CheckpointError(
            f"expected weights for {num_classes} classes, got {weights}, whose {', '.join(left_out)} has another size; "
            "try the data that it was trained on"
        )
    return model.eval()


def real_labels(source: Source, file: Path | None, num_classes: int) -> RealLabelsImagenet:
    """timm's scorer against the reassessed labels."""
    names = [source.name(index) for index in range(len(source))]
    try:
        real = RealLabelsImagenet(names, real_json=file, topk=(1, min(5, num_classes)))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--real-json: expected a JSON file of labels, got: {error}; try without it") from error
    except AssertionError as error:
        raise DataError(
            f"--real-labels: expected all images of ImageNet's validation split, got {len(names)}; try other --data"
        ) from error
    if unknown := [name for name in names if Path(name).name not in real.real_labels]:
        raise DataError(
            f"--real-labels: expected names like {min(real.real_labels)}, got {unknown[0]}; try other --data"
        )
    return real


def validate(options: Options, console: Console) -> dict[str, Any]:
    """All figures."""
    config, weights = configure(options)
    device = pick_device(config.device)
    splits, classes, outputs = open_splits(config, options.robustness)
    for source in splits.values():
        if source.report:
            say(console, source.report)
    model = load_model(config, weights, len(classes) if outputs is None else 1000, console).to(device)
    batch_size = options.batch_size or 2 * (config.micro_batch or config.batch_size)
    check_pass(batch_size * options.crops, config, "--batch-size")
    validator = Validator(config, model, make_transform(config, options.crops), batch_size, device, console)
    results: dict[str, Any] = {"model": config.model, "weights": str(weights or "pretrained"), "data": config.data}
    results |= {name: getattr(config, name) for name in ("img_size", "crop_pct", "crop_mode", "interpolation", "amp")}
    results |= {"crops": options.crops, "robustness": options.robustness}
    if options.robustness == "c":
        errors: dict[str, dict[str, float]] = {}
        results |= {"images": 0, "errors": errors}
        for name, source in splits.items():
            corruption, severity = name.split("/")
            scores = validator.score(source)
            results["images"] += scores["images"]
            errors.setdefault(corruption, {})[severity] = 100 - scores["top1"]
        for by_severity in errors.values():
            by_severity["mean"] = fmean(by_severity.values())
        results["mean_error"] = fmean(by_severity["mean"] for by_severity in errors.values())
    else:
        real = real_labels(splits["eval"], options.real_json, len(classes)) if options.real_labels else None
        results |= validator.score(splits["eval"], outputs, real)
        if real:
            results |= {f"real_top{name}": real.get_accuracy(k) for name, k in zip((1, 5), real.topk, strict=True)}
    results["bad_images"] = validator.bad
    return results


def keep(results: dict[str, Any], path: Path) -> None:
    """Write the figures to `--results`."""
    try:
        write_atomic(path, json.dumps(results, indent=1).encode())
    except (OSError, ValueError) as error:  # ValueError: a path that ends in no name
        raise ConfigError(f"--results: expected a file to write to, got: {error}; try another path") from error


def show(results: dict[str, Any], console: Console) -> None:
    """Print the figures as a table."""
    title = Text(printable(f"{results['model']} on {results['data']}"))
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name in ("top1", "top5", "real_top1", "real_top5", "loss"):
        if name in results:
            table.add_row(name, f"{results[name]:.4f}" if name == "loss" else f"{results[name]:.2f} %")
    for corruption, by_severity in results.get("errors", {}).items():
        table.add_row(Text(printable(f"error on {corruption}")), f"{by_severity['mean']:.2f} %")
    if "mean_error" in results:
        table.add_row("mean error", f"{results['mean_error']:.2f} %")
    table.add_row("images read", str(results["images"]))
    table.add_row("unreadable, not counted", str(len(results["bad_images"])))
    console.print(table)


def parse(argv: list[str] | None = None) -> Options:
    """Read the command line."""
    check_words(sys.argv[1:] if argv is None else argv)
    return tyro.cli(Options, args=argv, prog="visattn validate", description=cleandoc(Options.__doc__ or ""))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    signals.end_at_once()
    console = make_console()
    try:
        options = parse(argv)
        results = validate(options, console)
        show(results, console)  # first, as it took long and the file may fail
        if options.results:
            keep(results, options.results)
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (MemoryError, OSError, RuntimeError) as error:
        if not (problem := exhausted(error)):
            raise
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
