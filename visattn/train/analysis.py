"""What a run shows of its images: at its start first_batch.png; at its end what the model gets wrong, in confusion.csv,
confusion.png, classes.csv and worst.png.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from visattn.train import outputs
from visattn.train.errors import CheckpointError
from visattn.train.files import write_table
from visattn.train.model import import_state
from visattn.train.pictures import contact_sheet, draw_confusion, to_pictures
from visattn.train.sources import BadImageError
from visattn.train.weights import load_weights

if TYPE_CHECKING:
    from visattn.train.run import Run

SHOWN = 32  # most images of a sheet


def show_first_batch(
    run: "Run", batches: Iterator[tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Draw the images that the main process trains with first, as the model gets them; returns all batches again."""
    images, target = next(batches)
    if run.world.main:
        config = run.config
        pictures = to_pictures(images[:SHOWN], config.mean, config.std)
        captions = [_caption(weights, run) for weights in target[:SHOWN].cpu()]
        title = f"{run.folder.name}: the first images after augmentation"
        outputs.keep(run, "first_batch.png", lambda path: contact_sheet(pictures, captions, path, title))
    return itertools.chain([(images, target)], batches)


def _caption(target: torch.Tensor, run: "Run") -> str:
    """The class; of mixed images both, with their fractions."""
    if target.ndim == 0:
        return run.class_names[int(target)]
    # Without the label smoothing, which mixing has built in.
    smoothing = run.config.smoothing
    fractions = (target.float() - smoothing / len(target)) / (1 - smoothing)
    largest, classes = fractions.topk(2)
    both = zip(largest.tolist(), classes.tolist(), strict=True)
    return "\n".join(f"{fraction:.2f} {run.class_names[number]}" for fraction, number in both if fraction > 0.005)


def examine(run: "Run") -> None:
    """Test the exported weights, the best of the run, once more and leave what they get wrong; all processes together.

    From here on the model holds these weights. Where they could not be written, the last ones are looked at.
    """
    which = "last weights"
    if "model" in run.state.best:
        weights = None
        with contextlib.suppress(CheckpointError, OSError):  # a deleted or damaged file is said elsewhere
            weights = load_weights(run.folder / "model.safetensors")
        if all(run.world.gather(weights is not None)):
            import_state(run.state.task, weights or {})
            which = "best weights"
    predicted, confidence, losses = run.engine.predictions()
    if not run.world.main:
        return
    source, names = run.engine.loaders.eval_images.source, run.class_names
    readable = np.flatnonzero(predicted >= 0)
    truth, said = source.targets[readable], predicted[readable].astype(np.int64)
    title = f"{run.folder.name}: {which}, top-1 {100 * np.mean(truth == said):.2f} % of {len(truth)} test images"
    outputs.keep(run, "confusion.csv", partial(write_confusion, truth=truth, predicted=said, names=names))
    outputs.keep(run, "classes.csv", partial(write_classes, truth=truth, predicted=said, names=names))
    draw = partial(draw_confusion, truth=truth, predicted=said, labels=names, title=title)
    outputs.keep(run, "confusion.png", draw)
    worst = readable[np.argsort(-losses[readable], kind="stable")][:SHOWN]
    shown = []
    for index in worst:
        with contextlib.suppress(BadImageError):  # it was readable a moment ago
            label, guess = names[source.targets[index]], names[int(predicted[index])]
            sign = "→" if label == guess else "✗"
            caption = f"{label}\n{sign} {guess} {confidence[index]:.0%}\n{Path(source.name(index)).name}"
            shown.append((source.read(index)[0], caption))
    if shown:
        images, captions = zip(*shown, strict=True)
        title = f"{run.folder.name}: test images of the highest loss, {which}; true class → predicted class, ✗ wrong"
        outputs.keep(run, "worst.png", lambda path: contact_sheet(images, captions, path, title))


def write_confusion(path: Path, truth: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> None:
    """Write how many images of each true class got each prediction, for the pairs that occur."""
    pairs, counts = np.unique(np.stack([truth, predicted]), axis=1, return_counts=True)
    rows = [(names[one], names[other], count) for one, other, count in zip(*pairs, counts, strict=True)]
    write_table(path, ("true", "predicted", "images"), rows)


def write_classes(path: Path, truth: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> None:
    """Write precision, recall and F1 (0 to 1; empty where undefined) and the number of test images of each class."""
    from sklearn.metrics import precision_recall_fscore_support  # takes a second

    # pyrefly: ignore[bad-argument-type]: its annotation forgets NaN
    scores = precision_recall_fscore_support(truth, predicted, labels=range(len(names)), zero_division=np.nan)
    rows = [
        (name, *("" if np.isnan(score) else round(score, 4) for score in values), int(images))
        for name, (*values, images) in zip(names, np.array(scores, dtype=float).T.tolist(), strict=True)
    ]
    write_table(path, ("class", "precision", "recall", "f1", "images"), rows)
