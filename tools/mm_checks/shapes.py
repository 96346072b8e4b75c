"""Masks of instances in COCO's format: polygons and run lengths."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

BORDER = 1.0  # pixels by which published boxes pass the border
LARGE = 1e18  # of ids and coordinates
FORMAT = "an export in COCO's format (cocodataset.org/#format-data)"


def are_numbers(values: Iterable) -> bool:
    """Whether all are numbers, none of them NaN, infinite or a truth value."""
    values = tuple(values)
    return set(map(type, values)) <= {int, float} and all(-LARGE < value < LARGE for value in values)


def is_inside(box: tuple[float, ...], bounds: tuple[float, float]) -> bool:
    """Whether x0, y0, x1, y1 are within an image of that width and height, but for BORDER."""
    return min(box[:2]) >= -BORDER and box[2] <= bounds[0] + BORDER and box[3] <= bounds[1] + BORDER


def check_mask(found: dict, image: dict, say: partial, polygons: bool) -> None:
    """The segmentation of an annotation: polygons, or run lengths as a list or compressed."""
    mask = found.get("segmentation")
    which = f"annotation {found['id']!r}"
    bounds = image["width"], image["height"]
    if not mask:
        got = f"{which} with {mask!r}" if "segmentation" in found else f"{which} without"
        say("no mask", "a segmentation of every object", got, "masks, or a model and a pipeline without", of=0)
    elif isinstance(mask, list):
        if not all(isinstance(part, list) and are_numbers(part) for part in mask):
            say("polygons", "polygons as lists of x and y", f"{which} with {mask}", "to repair or remove it", of=0)
            return
        for part in mask:
            xs, ys = part[::2], part[1::2]
            if len(part) < 6 or len(part) % 2 or min(xs) == max(xs) or min(ys) == max(ys):
                got = f"{which} with {part}"
                say("empty masks", "polygons of 3 points and more, with an area", got, "to repair or remove it")
            elif not is_inside((min(xs), min(ys), max(xs), max(ys)), bounds):
                got = f"{which} with a polygon out of {bounds[0]} x {bounds[1]} pixels"
                say("outside", "objects within the image", got, "to clip it")
    elif isinstance(mask, dict):
        runs = run_lengths(mask.get("counts"))
        if mask.get("size") != [bounds[1], bounds[0]] or runs is None or sum(runs) != bounds[0] * bounds[1]:
            got = f"{which} with run lengths of size {mask.get('size')}"
            say("run lengths", f"[height, width] {[*bounds[::-1]]} and runs of as many pixels", got, FORMAT, of=0)
        elif not any(runs[1::2]):
            say("empty masks", "masks of some pixels", which, "to repair or remove it")
        elif polygons and not found.get("iscrowd"):
            got = f"{which} with run lengths, which mmdet leaves out"
            say("run lengths", "polygons, as poly2mask is False", got, "poly2mask=True", of=0)
    else:
        say("polygons", "polygons or run lengths", f"{which} with {mask!r}", "to repair or remove it", of=0)


def run_lengths(counts: Any) -> list[int] | None:
    """COCO's run lengths, from a list or its compressed text (rleFrString in pycocotools); None for neither."""
    if isinstance(counts, list):
        return counts if all(isinstance(run, int) and run >= 0 for run in counts) else None
    if not isinstance(counts, str):
        return None
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return None
        value |= (code & 0x1F) << shift
        shift += 5
        if not code & 0x20:
            if code & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if shift == 0 and min(runs, default=0) >= 0 else None
