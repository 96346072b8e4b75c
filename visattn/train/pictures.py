"""Pictures as PNG files: sheets of images with captions, confusion matrices, curves. No display is needed.

Names may be long, of any script (an installed font that has it is found), and hold `$`, which begins no formula here.
"""

import functools
import io
import unicodedata
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from visattn.train.errors import printable
from visattn.train.files import write_atomic

TILE, LINE, GAP = 160, 14, 10  # of a sheet, in pixels: an image, a line of text, what is between them
LETTERS = 21  # of a caption's line
COLUMNS = 8
NUMBERED, NAMED = 20, 60  # most classes whose confusions stand as numbers, and whose names stand, beside the matrix
CELLS = 1000  # most of a side of the matrix; each is a pixel then
PAIRS = 50  # most confused ones that are listed


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str], path: Path, title: str = "") -> None:
    """Draw images in rows of up to 8, each above its caption, whose lines are shortened to the width of an image."""
    columns = min(len(images), COLUMNS)
    lines = max(caption.count("\n") + 1 for caption in captions)
    wide, high = TILE + GAP, TILE + lines * LINE + 2 * GAP
    top = 2 * LINE + GAP if title else GAP
    size = (GAP + max(columns, 4) * wide, top + -(-len(images) // columns) * high)
    sheet = Image.new("RGB", size, "white")
    figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100)
    text: dict[str, Any] = {"va": "top", "fontsize": 8, "family": fonts([title, *captions]), "parse_math": False}
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(index, columns)
        left, upper = GAP + column * wide, top + row * high
        scale = TILE / max(image.size)
        small = image.convert("RGB").resize([max(1, round(side * scale)) for side in image.size])
        sheet.paste(small, (left, upper + TILE - small.height))
        shown = "\n".join(shorten(line, LETTERS) for line in caption.split("\n"))
        figure.text(left / size[0], 1 - (upper + TILE + 3) / size[1], shown, **text)
    figure.figimage(np.asarray(sheet), origin="upper")
    if title:
        figure.text(GAP / size[0], 1 - GAP / size[1], shorten(title, 100), **text | {"fontsize": 10})
    _save(figure, path)


def to_pictures(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> list[Image.Image]:
    """Turn normalized images `[B, C, H, W]` back into pictures."""
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return [to_pil_image(picture) for picture in (images.float().cpu() * scale + shift).clamp(0, 1)]


def draw_confusion(path: Path, truth: np.ndarray, predicted: np.ndarray, labels: Sequence[str], title: str) -> None:
    """Draw which classes (rows) are taken for which (columns), as shares of the images of the true class.

    Up to 20 classes have their numbers of images in the cells, up to 60 their names beside these; for more than 20 the
    pairs that are confused most often are listed.
    """
    classes, names = len(labels), [shorten(label, LETTERS) for label in labels]
    cells = min(classes, CELLS)
    counts, *_ = np.histogram2d(truth, predicted, bins=cells, range=[[0, classes], [0, classes]])
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    listed = classes > NUMBERED
    side = 11 if listed else 4 + 0.35 * classes
    figure = Figure(figsize=(side + 1 + 5 * listed, side), dpi=120, layout="constrained")
    family = fonts([title, *names])
    axes, beside = figure.subplots(1, 2, width_ratios=(side, 5)) if listed else (figure.subplots(), None)
    figure.suptitle(shorten(title, 100), family=family, parse_math=False)
    # The square root makes single mistakes visible.
    extent = (-0.5, classes - 0.5, classes - 0.5, -0.5)
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest", extent=extent)
    figure.colorbar(picture, ax=axes, label="share of the true class's images", shrink=0.6)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if classes <= NAMED:
        style: dict[str, Any] = {"family": family, "parse_math": False, "fontsize": 9 if classes <= NUMBERED else 7}
        axes.set_xticks(range(classes), names, rotation=90, **style)
        axes.set_yticks(range(classes), names, **style)
    if classes <= NUMBERED:
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.4 else "black"
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=color, fontsize=8)
    if beside is not None:
        beside.set_axis_off()
        pairs = confused(truth, predicted)[:PAIRS]
        lines = [f"{count:>5} x  {names[one]}  taken for  {names[other]}" for one, other, count in pairs]
        heading = "most often confused" if pairs else "nothing is confused"
        text = "\n".join([heading, "", *lines])
        words = beside.text(0, 1, text, va="top", fontsize=8, linespacing=1.6, family=family, parse_math=False)
        words.set_in_layout(False)
    _save(figure, path)


def confused(truth: np.ndarray, predicted: np.ndarray) -> list[tuple[int, int, int]]:
    """The pairs of different classes, true and predicted, with how often they occur, the most frequent first."""
    wrong = np.stack([truth, predicted])[:, truth != predicted]
    pairs, counts = np.unique(wrong, axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(pairs[0, index]), int(pairs[1, index]), int(counts[index])) for index in order]


def shorten(text: str, letters: int) -> str:
    """Text that fits the width of so many Latin letters, its middle left out if need be."""
    text = printable(text)
    widths = [1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text]
    if sum(widths) <= letters:
        return text
    first, last = 0, len(text)
    room = letters - 1
    while room > 0:
        if room >= letters // 2:
            room -= widths[first]
            first += 1
        else:
            last -= 1
            room -= widths[last]
    return f"{text[:first]}…{text[last:]}"


def fonts(texts: Collection[str]) -> list[str]:
    """Families that have the letters of these texts, in the order to ask them; letters that none has become boxes."""
    families, missing = ["DejaVu Sans"], set().union(*texts) - {"\n"} - _letters(findfont("DejaVu Sans"))
    for font in fontManager.ttflist if missing else ():
        if font.style == "normal" and font.weight in (400, "regular", "normal") and missing & _letters(font.fname):
            families.append(font.name)
            missing -= _letters(font.fname)
    return families


@functools.cache
def _letters(file: str) -> frozenset[str]:
    """What a font file can draw; nothing if it is one of pixels, as of coloured emoji, or of boxes for all letters."""
    try:
        font = get_font(file)
    except (OSError, RuntimeError):
        return frozenset()
    useful = font.scalable and not font.family_name.startswith("Last Resort")
    return frozenset(map(chr, font.get_charmap())) if useful else frozenset()


def _save(figure: Figure, path: Path) -> None:
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        FigureCanvasAgg(figure).print_png(png)
    write_atomic(path, png.getvalue())


def draw_lr_find(
    path: Path, rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], lr: float | None, title: str
) -> None:
    """Draw the loss over the learning rate, and the rate that is suggested."""
    figure = Figure(figsize=(7, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_title(shorten(title, 80), family=fonts([title]), parse_math=False)
    axes.semilogx(rates, losses, ".", color="tab:gray", alpha=0.5, label="training loss of an update")
    axes.semilogx(rates, smoothed, color="tab:blue", label="smoothed")
    if lr is not None:
        axes.axvline(lr, color="tab:orange", label=f"suggested: {lr:.1e}")
        axes.set_ylim(0.9 * min(losses), 1.2 * max(smoothed[: smoothed.index(min(smoothed)) + 1]))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def draw_curves(path: Path, history: list[dict[str, Any]], title: str) -> None:
    """Draw loss, accuracy, learning rate and gradient norm over the epochs as a PNG; needs no display."""
    figure = Figure(figsize=(14, 4), dpi=120, layout="constrained")
    figure.suptitle(printable(title), parse_math=False)  # a run may be called $x
    losses, accuracy, rates = figure.subplots(1, 3)
    norms = rates.twinx()
    best = max(history, key=lambda row: row["top1"])
    curves = [
        (losses, "train_loss", "train (as optimized)", "tab:gray"),
        (losses, "eval_loss", "test (cross-entropy)", "tab:blue"),
        (losses, "ema_loss", "test, EMA", "tab:green"),
        (accuracy, "top5", "test top-5", "tab:gray"),
        (accuracy, "top1", f"test top-1, best {best['top1']:.2f} %", "tab:blue"),
        (accuracy, "ema_top1", "test top-1, EMA", "tab:green"),
        (rates, "lr", "learning rate", "tab:blue"),
        (norms, "grad_norm", "gradient norm", "tab:gray"),
    ]
    for axes, key, label, color in curves:
        points = [(row["epoch"], row[key]) for row in history if row[key] is not None]
        if points and not (key == "top5" and all(value == 100 for _, value in points)):  # of up to five classes
            # A run of one epoch has no line: the dot shows it.
            axes.plot(*zip(*points, strict=True), ".-", label=label, color=color)
    accuracy.plot(best["epoch"], best["top1"], "o", color="tab:orange")
    losses.set_ylim(bottom=0)
    rates.set_ylim(bottom=0)
    for axes, label in (
        (losses, "loss"),
        (accuracy, "accuracy (%)"),
        (rates, "learning rate"),
        (norms, "gradient norm"),
    ):
        axes.set_ylabel(label)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (losses, accuracy, rates):
        axes.grid(alpha=0.3)
    losses.legend()
    accuracy.legend()
    rates.legend(handles=[*rates.lines, *norms.lines])
    _save(figure, path)
