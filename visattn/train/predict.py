"""`visattn predict`: the classes of images and of the frames of videos: told, in a file, on a contact sheet."""

import dataclasses
import glob
import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from inspect import cleandoc
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from visattn.hub import Classifier, load, read_labels
from visattn.train import signals
from visattn.train.checks import check_values
from visattn.train.config import number
from visattn.train.distributed import pick_device
from visattn.train.errors import ConfigError, DataError, DataNotFoundError
from visattn.train.files import open_regular, write_atomic, write_table
from visattn.train.listing import is_hidden, is_image, natural
from visattn.train.loader import Loader, TestImages, allow_files, plain_errors
from visattn.train.metrics import make_console, say
from visattn.train.pictures import contact_sheet, to_pictures
from visattn.train.sources import BadImageError, FolderSource

ON_SHEET = 100  # images
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}


@dataclass
class Prediction:
    """The likeliest classes of an image, the first before the others; none, and why, where it cannot be read."""

    image: str
    classes: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    error: str = ""
    picture: Image.Image | None = None  # as the model sees it; of the first ones, if asked for

    def __str__(self) -> str:
        pairs = zip(self.labels, self.probabilities, strict=True)
        return f"{self.image}: {', '.join(f'{label} {value:.1%}' for label, value in pairs)}"


def find_files(named: tuple[str, ...]) -> list[str]:
    """The images and videos that files, folders with all below them, and patterns name, each once.

    Raises:
        DataNotFoundError: a name of nothing, or nothing to read.
    """
    found: list[str] = []
    for name in named:
        matched = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True), key=natural)
        if not matched:
            raise DataNotFoundError(f"expected an image, a video, a folder or a pattern of these, got {name}; try ls")
        for path in matched:
            found += _below(path) if os.path.isdir(path) else [path]
    if not found:
        raise DataNotFoundError(
            f"expected images or videos, got none in {', '.join(named) or 'no argument'}; try photos/"
        )
    return list(dict.fromkeys(found))


def _below(folder: str) -> list[str]:
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted((name for name in folders if not is_hidden(name)), key=natural)
        names = sorted((name for name in files if not is_hidden(name)), key=natural)
        found += [os.path.join(root, name) for name in names if is_image(name) or _is_video(name)]
    return found


def _is_video(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in VIDEOS


def _frames(path: str, classifier: Classifier) -> Iterator[torch.Tensor]:
    """The transformed frames of a video."""
    import av

    try:
        with open_regular(path) as file, av.open(file) as video:
            for frame in video.decode(video=0):
                yield classifier.transform(frame.to_image())
    except (av.FFmpegError, IndexError, OSError) as error:  # IndexError: no video stream in it
        raise BadImageError(getattr(error, "strerror", None) or "no video stream") from error


class Predictor:
    """Predicts the `topk` likeliest classes of what files hold, and keeps the first `pictures`."""

    def __init__(
        self, classifier: Classifier, device: torch.device, topk: int, batch_size: int, workers: int, pictures: int
    ):
        self.classifier, self.device, self.topk = classifier, device, min(topk, len(classifier.labels))
        self.batch_size, self.workers, self.pictures = batch_size, workers, pictures
        self.model = classifier.model.to(device)

    def __call__(self, files: list[str]) -> Iterator[Prediction]:
        """Images in order, then the frames of videos in order, as `clip.mp4#0` and on."""
        images = [path for path in files if not _is_video(path)]
        source = FolderSource(images, [0] * len(images), self.classifier.transform.mode)
        shown, number = TestImages(source, self.classifier.transform), 0
        for batch, targets in plain_errors(Loader(shown, self.batch_size, num_workers=self.workers)):
            for target, prediction in zip(targets, self.score(batch), strict=True):
                name = source.name(number)
                prediction.image = name
                yield prediction if target >= 0 else Prediction(name, error=source.problem(number))
                number += 1
        for path in files:
            if _is_video(path):
                yield from self.watch(path)

    def watch(self, path: str) -> Iterator[Prediction]:
        """The frames of a video, and why it ends before its end, if it does."""
        frames, number = _frames(path, self.classifier), 0
        try:
            while batch := list(itertools.islice(frames, self.batch_size)):
                for prediction in self.score(torch.stack(batch)):
                    prediction.image = f"{path}#{number}"
                    yield prediction
                    number += 1
        except BadImageError as error:
            yield Prediction(path, error=str(error))

    @torch.no_grad()
    def score(self, batch: torch.Tensor) -> Iterator[Prediction]:
        """Predictions of the images of `[B, C, H, W]`, without their names."""
        probabilities, classes = self.model(batch.to(self.device)).float().softmax(-1).topk(self.topk)
        transform = self.classifier.transform
        pictures = to_pictures(batch[: self.pictures], transform.mean, transform.std)
        self.pictures -= len(pictures)
        rows = itertools.zip_longest(classes.tolist(), probabilities.tolist(), pictures)
        for numbers, values, picture in rows:
            labels = [self.classifier.labels[number] for number in numbers]
            yield Prediction("", numbers, labels, values, picture=picture)


def write(predictions: list[Prediction], path: Path) -> None:
    """Write `.jsonl`, an object an image, or `.csv`, a row a class of an image."""
    if path.suffix == ".csv":
        table: list[tuple[Any, ...]] = []
        for one in predictions:
            rows = zip(one.classes, one.labels, one.probabilities, strict=True)
            table += [(one.image, rank, *row, "") for rank, row in enumerate(rows, 1)]
            table += [(one.image, "", "", "", "", one.error)] if one.error else []
        write_table(path, ("image", "rank", "class", "label", "probability", "error"), table)
    else:
        lines = (json.dumps({"image": one.image, **_plain(one)}, ensure_ascii=False) for one in predictions)
        write_atomic(path, "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))


def draw(predictions: list[Prediction], path: Path) -> None:
    """Draw the pictures that were kept, each with its likeliest class and its name."""
    shown = [one for one in predictions if one.picture and not one.error]
    captions = [f"{one.labels[0]}\n{one.probabilities[0]:.0%}  {Path(one.image).name}" for one in shown]
    count = sum(not one.error for one in predictions)
    title = f"{len(shown)} of {count} images" if count > len(shown) else ""
    contact_sheet([one.picture for one in shown if one.picture], captions, path, title)


def _check_output(option: str, path: Path | None, ending: tuple[str, ...], files: list[str]) -> None:
    """Refuse, before minutes of work, what cannot be written to or would replace an image."""
    if path is None:
        return
    wanted = f"a {' or '.join(ending)} file"
    if path.suffix not in ending:
        raise ConfigError(f"{option}: expected {wanted}, got {path}; try found{ending[0]}")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{option}: expected a folder to write to, got {path.parent}; try mkdir, or another path")
    if os.path.realpath(path) in map(os.path.realpath, files):
        raise ConfigError(f"{option}: expected {wanted} that is no input, got {path}; try another path")


def _keep(option: str, path: Path, write: Callable[[Path], None]) -> None:
    """Write a file that an option names."""
    try:
        write(path)
    except (OSError, ValueError) as error:  # ValueError: a path that ends in no name
        raise ConfigError(f"{option}: expected a file to write to, got: {error}; try another path") from error


def _plain(one: Prediction) -> dict[str, Any]:
    if one.error:
        return {"error": one.error}
    rows = zip(one.classes, one.labels, one.probabilities, strict=True)
    return {"predictions": [{"class": c, "label": label, "probability": value} for c, label, value in rows]}


@dataclass(frozen=True)
class Options:
    """Classify images, folders of them, patterns such as 'photos/*.jpg', and videos frame by frame.

    $ visattn predict --run output/RUN cat.jpg photos/
    $ visattn predict --model dinat_mini --output found.csv --sheet found.png 'photos/**/*.jpg'
    $ visattn predict --model nat_tiny --weights nat_tiny.pth --labels names.txt clip.mp4
    """

    images: tyro.conf.Positional[tuple[str, ...]]  # files, folders, patterns
    run: str | None = None  # folder of a run, or OWNER/NAME on the Hugging Face hub
    model: str | None = None  # or any name that timm or visattn registers, with its pretrained weights
    weights: Path | None = None  # of --model: this .safetensors or plain .pth file instead
    ema: bool = False  # the run's averaged weights
    labels: Path | None = None  # file with the name of a class on each line; None: the run's, or ImageNet's

    topk: int = number(5, 1, 10**6)  # classes to tell, the likeliest first
    output: Path | None = None  # .csv (a row a class of an image) or .jsonl (an object an image)
    sheet: Path | None = None  # .png with the first 100 images as the model sees them, and their classes
    quiet: bool = False  # not a line an image
    batch_size: int = number(32, 1, 2**20)  # images at a time
    workers: int = number(0, 0, 1024)  # processes that read images; 0 reads in the main process
    device: str = "auto"  # auto takes cuda where there is one; otherwise a torch device name


def run(options: Options, console: Console) -> int:
    """Predict and tell; returns the exit code."""
    check_values(dataclasses.replace(options, images=()))  # files have whatever names they have
    source = options.run or options.model
    if not source or (options.run and options.model):
        raise ConfigError("expected --run or --model, got both or none; try --run output/RUN")
    files = find_files(options.images)
    _check_output("--output", options.output, (".csv", ".jsonl"), files)
    _check_output("--sheet", options.sheet, (".png",), files)
    if importlib.util.find_spec("av") is None and any(map(_is_video, files)):
        raise ConfigError("expected the package av for videos, got none; try pip install av, or images only")
    labels = None if options.labels is None else read_labels(options.labels)
    classifier = load(source, weights=options.weights, labels=labels, ema=options.ema)
    allow_files(options.workers)
    device, pictures = pick_device(options.device), ON_SHEET if options.sheet else 0
    predictor = Predictor(classifier, device, options.topk, options.batch_size, options.workers, pictures)
    predictions, bad = [], 0
    total = None if any(map(_is_video, files)) else len(files)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("predicting", total=total)
        for prediction in predictor(files):
            predictions.append(prediction)
            bad += bool(prediction.error)
            if prediction.error:
                say(console, f"unreadable: {prediction.image} ({prediction.error})")
            elif not options.quiet:
                say(console, str(prediction))
            progress.advance(bar)
    if options.output:
        _keep("--output", options.output, partial(write, predictions))
    if options.sheet and any(one.picture for one in predictions):
        _keep("--sheet", options.sheet, partial(draw, predictions))
    if bad == len(predictions):
        raise DataError(f"expected images that can be read, got none of {bad}; try others")
    say(console, f"{len(predictions) - bad} predicted{f', {bad} unreadable' * bool(bad)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    signals.end_at_once()
    return run(
        tyro.cli(Options, args=argv, prog="visattn predict", description=cleandoc(Options.__doc__ or "")),
        make_console(),
    )
