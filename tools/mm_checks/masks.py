"""Pictures of class numbers, against what mmsegmentation makes of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mm_checks.findings import Findings
from mm_checks.pictures import SUFFIXES, Files, not_a_file, read_picture, sample, size_when_read

NUMBERS = ("1", "L", "P", "I", "F")  # modes of one channel; Pillow has several of 16 bits that begin with I


def check_masks(
    dataset: Any,
    findings: Findings,
    *,
    labels: int,
    ignored: int,
    palettes: bool,
    shared: bool,
    trains: bool,
    seconds: float,
) -> str:
    """Check the images and the masks of a mmseg BaseSegDataset that has not been initialised.

    Args:
        dataset: Tells the files, the classes and how masks are read.
        findings: Takes what is wrong.
        labels: How many the model knows.
        ignored: The label that no loss counts.
        palettes: Whether pictures with a palette are read as its indices.
        shared: Whether the masks of other images are in the same folder.
        trains: Whether the set is trained on; others may be small, and of one class.
        seconds: For reading.

    Returns:
        What there is, in words.
    """
    pairs = [(data["img_path"], data["seg_map_path"]) for data in _data(dataset, findings, shared)]
    files = Files()
    there = []
    for image, mask in pairs:
        for path, kind, whose in ((image, "image", "that is listed"), (mask, "mask", f"of {image}")):
            if got := files.missing(path):
                advice = "data_root, data_prefix, img_suffix and seg_map_suffix that together are the file's path"
                findings.add(path, f"no {kind}", f"the {kind} {whose}", got, advice)
                break
        else:
            there.append((image, mask))
    totals = np.zeros(256, np.int64)  # pixels of every label
    table = _table(dataset)
    read = 0
    for image, mask in sample(there, seconds):
        read += 1
        counts = _count(image, mask, findings, palettes)
        if counts is None:
            continue
        pixels = np.bincount(table, counts, 256).astype(np.int64)
        here = set(np.flatnonzero(pixels).tolist())
        if bad := sorted(label for label in here - {ignored} if label >= labels):
            raw = sorted(set(np.flatnonzero(counts).tolist()) & set(np.flatnonzero(np.isin(table, bad)).tolist()))
            advice = "masks of 0, 1, 2 ... for the classes in order, or more classes and num_classes"
            findings.add(mask, "labels", f"labels below num_classes={labels}, or {ignored} to ignore", f"{raw}", advice)
        elif here == {ignored}:
            findings.add(mask, "all ignored", "labels", f"{ignored} alone, which is ignored", "others", warning=True)
        elif labels == 2 == len(here) and ignored in here:
            got = f"{min(here)} and {ignored}, which is ignored"
            findings.add(mask, "lonely", "both classes, or none ignored", got, "masks of 0 and 1", warning=True)
        totals += pixels
    without = int(totals[np.arange(256) == ignored].sum())
    share = f"{100 * without / max(totals.sum(), 1):.1f} %"
    names = dataset.metainfo.get("classes") or range(labels)
    here = [name for label, name in enumerate(names) if label < 256 and totals[label] and label != ignored]
    if totals.any() and not {"labels", "mode", "values"} & findings.faults.keys():
        rest = f" and {ignored}, which is ignored, in {share} of the pixels" if without else ""
        rest += "; reduce_zero_label makes 0 the ignored label" if dataset.reduce_zero_label else ""
        masks = f"{read} masks" if read == len(pairs) else f"{read} of {len(pairs)} masks"
        whole = read == len(pairs)
        _check_classes(findings, dataset.data_prefix["seg_map_path"], names, here, masks, rest, whole, trains)
    return f"{len(pairs)} images ({read} read with their masks), {len(here)} of {len(names)} classes, {share} ignored"


def _data(dataset: Any, findings: Findings, shared: bool) -> list[dict]:
    """What mmseg lists, with findings for what it would leave out or take twice."""
    folder, masks = dataset.data_prefix.get("img_path"), dataset.data_prefix.get("seg_map_path")
    listed = dataset.ann_file and not os.path.isdir(dataset.ann_file)
    if listed and (got := not_a_file(dataset.ann_file)):
        findings.add(dataset.ann_file, "list", "a list of images", got, "another ann_file")
        return []
    for key, path in (("img_path", folder), ("seg_map_path", masks)):
        if not path or not os.path.isdir(path):
            got = not_a_file(path) or "a file" if path else "none"
            findings.add(path, "folder", f"a folder as data_prefix.{key}", got, "another one")
            return []
    inside = list(_walk(folder, findings)) if not listed else []
    if "loop" in findings.faults:
        return []
    data = dataset.load_data_list()
    names = Counter(item["img_path"] for item in data)
    if twice := [name for name, count in names.items() if count > 1]:
        say = partial(findings.add, dataset.ann_file, "twice", "every image once")
        say(f"{len(twice)} again, e.g. {twice[0]}", "a list without them", warning=True)
    known = {os.path.normpath(item["seg_map_path"]) for item in data}
    left = [path for path in inside if path not in names and os.path.normpath(path) not in known]
    left = [path for path in left if Path(path).suffix.lower() in SUFFIXES]
    if not data:
        kinds = ", ".join(f"{n} *{suffix}" for suffix, n in Counter(Path(path).suffix for path in left).items())
        where = dataset.ann_file if listed else folder
        findings.add(where, "no images", f"images *{dataset.img_suffix}", kinds or "none", "img_suffix")
    elif left:
        got = f"{len(left)} that are left out, e.g. {left[0]}"
        findings.add(folder, "left out", f"images *{dataset.img_suffix}", got, "one suffix for all", warning=True)
    if data and not listed and not shared:
        for path in _walk(masks, findings):
            if path.endswith(dataset.seg_map_suffix) and os.path.normpath(path) not in known and path not in names:
                advice = f"the image beside the others (*{dataset.img_suffix}), or no mask"
                findings.add(path, "no image of a mask", f"an image in {folder}", "none", advice)
    return data


def _walk(folder: str, findings: Findings) -> Iterator[str]:
    """Yield the files below a folder, with a finding for every folder that is reached twice."""
    seen = set()
    top = os.path.realpath(folder)
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or (seen and os.path.commonpath([real, top]) == real):
            findings.add(place, "loop", "every folder once", f"{real} again", "to remove the link")
            folders.clear()
            continue
        seen.add(real)
        yield from (os.path.join(place, name) for name in files if not name.startswith("."))


def _count(image: str, mask: str, findings: Findings, palettes: bool) -> np.ndarray | None:
    """How often each of the 256 values is in a mask; None with a finding where it or the image cannot be used."""
    photo, picture = (read_picture(path, findings) for path in (image, mask))
    if photo is None or picture is None:
        return None
    if picture.format == "JPEG":
        findings.add(mask, "mode", "a mask as PNG", "JPEG, which alters labels", "PNG from the source")
        return None
    if not (picture.mode in NUMBERS or picture.mode.startswith("I;")) or (picture.mode == "P" and not palettes):
        got = f"{picture.mode}, {len(picture.getbands())} channels"
        findings.add(mask, "mode", "one channel of class numbers", got, "masks of 0, 1, 2 ... with mode L")
        return None
    size = size_when_read(photo, image, findings)
    if picture.size != size:
        got = "{} x {}".format(*picture.size)
        expected = "the {} x {} pixels of {}".format(*size, image)
        findings.add(mask, "size", expected, got, "the mask of this very image")
        return None
    values = np.asarray(picture)
    if values.dtype not in (np.uint8, np.bool_):
        bad = values[(values < 0) | (values > 255) | (values != np.floor(values))]
        if bad.size:
            got = f"{bad.flat[0]} in {picture.mode}"
            findings.add(mask, "values", "whole numbers of 0 to 255", got, "masks of 8 bits")
            return None
    return np.bincount(values.astype(np.uint8).ravel(), minlength=256)


def _table(dataset: Any) -> np.ndarray:
    """The label of each of the 256 values, as mmseg's LoadAnnotations makes it."""
    table = np.arange(256)
    if dataset.reduce_zero_label:
        table = np.where(table % 255 == 0, 255, table - 1)
    renamed = table.copy()
    for old, new in (dataset.label_map or {}).items():
        renamed[table == old] = new
    return renamed


def _check_classes(
    findings: Findings, where: str, names: Sequence, here: list, masks: str, rest: str, whole: bool, trains: bool
) -> None:
    """Classes that are nowhere, in the masks that were read."""
    absent = [name for name in names if name not in here]
    if len(names) > 1 and len(here) < 2 and (rest or (whole and trains)):
        findings.faults.pop("lonely", None)  # the same, of each mask
        found = f"{here[0]!r} alone" if here else "none"
        advice = "masks of 0, 1, 2 ... for the classes in order"
        findings.add(where, "one class", f"several classes in {masks}", f"{found}{rest}", advice)
    elif absent and whole:
        few = f"none of {absent[0]!r}" + (f" and {len(absent) - 1} others" if len(absent) > 1 else "")
        findings.add(where, "absent", f"every class in {masks}", f"{few}{rest}", "other masks", warning=True)
