"""Annotations in COCO's format, of instances and panoptic, against what mmdet makes of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoPanopticDataset

from mm_checks.findings import Findings
from mm_checks.panoptic import check_panoptic, segments
from mm_checks.pictures import Files, not_a_file, read_picture, sample, size_when_read
from mm_checks.shapes import FORMAT, are_numbers, check_mask, is_inside
from visattn.weights import first_line


def read_annotations(file: str, findings: Findings, lists: tuple[str, ...]) -> dict | None:
    """The content of a json file with these lists of dicts; None with a finding if it has not."""
    say = partial(findings.add, file, "annotations", "COCO annotations")
    if got := not_a_file(file):
        say(got, "another data_root or ann_file in the config")
        return None
    try:
        content = json.loads(Path(file).read_text())
    except (OSError, ValueError, RecursionError) as error:
        say(f"a file that cannot be read: {first_line(error)}", "to export it again")
        return None
    if not isinstance(content, dict):
        say(f"a {type(content).__name__}", FORMAT)
        return None
    for name in lists:
        value = content.get(name)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            say(f"no list of dicts under {name!r}", FORMAT)
            return None
    return content


def check_coco(
    dataset: Any,
    findings: Findings,
    *,
    part: str,
    masks: bool,
    polygons: bool,
    evaluated: Sequence[str],
    decode: bool,
    seconds: float,
) -> str:
    """Check the annotations and the images of a CocoDataset that has not been initialised.

    Args:
        dataset: Tells the files, the classes and what is left out.
        findings: Takes what is wrong.
        part: train, val, test, or unlabelled, of which the images alone count.
        masks: Whether its pipeline reads masks of instances.
        polygons: Whether that takes polygons only.
        evaluated: Files of annotations that results are compared with.
        decode: Whether its pipeline reads images that Pillow reads too.
        seconds: For reading images.

    Returns:
        What there is, in words.
    """
    file = dataset.ann_file
    labelled = part != "unlabelled"
    panoptic = isinstance(dataset, CocoPanopticDataset)
    lists = ("images", "categories", "annotations") if labelled else ("images", "categories")
    content = read_annotations(file, findings, lists)
    if content is None:
        return "cannot be read"
    say = partial(findings.add, file)
    images = dict(_images(content["images"], say))
    categories = dict(_categories(content["categories"], say))
    if "fields" in findings.faults:
        return "cannot be read"
    objects = Counter()  # by name of category
    seen = set()  # images with objects of the classes
    if labelled:
        say_rare = partial(say, of=len(content["annotations"]))
        classes = set(dataset.metainfo.get("classes") or ())
        for image, found in _objects(content["annotations"], images, categories, say, panoptic, part != "train"):
            if masks and not panoptic:
                check_mask(found, image, say_rare, polygons)
            name = categories[found["category_id"]]
            objects[name] += not found.get("iscrowd")
            if name in classes:
                seen.add(image["id"])
    _check_classes(dataset.metainfo.get("classes"), list(categories.values()), objects, say, part)
    for other in evaluated:
        if os.path.realpath(other) != os.path.realpath(file):
            _check_evaluator(other, file, images, findings)
    if not images:
        say("no images", "images", "none", FORMAT)
    elif labelled and not seen and not findings.lines("error"):
        say("no objects", "objects of the config's classes", f"none in {len(images)} images", FORMAT)
    kept = [image for image in images.values() if _is_kept(image, dataset, seen)]
    if seen and not kept:
        smallest = (dataset.filter_cfg or {}).get("min_size", 0)
        say("small images", f"images of at least {smallest} pixels", f"{len(images)} smaller", "filter_cfg.min_size=0")
    read = _check_pictures(dataset, kept, findings, decode, seconds / (1 + panoptic))
    if panoptic and labelled and "keys" not in findings.faults:
        check_panoptic(dataset, content, images, findings, seconds / 2)
    classes = f"{len(objects)} class{'' if len(objects) == 1 else 'es'}"
    return f"{len(kept)} of {len(images)} images ({read} read), {sum(objects.values())} objects of {classes}"


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or are_numbers([value])


def _images(images: list[dict], say: partial) -> Iterator[tuple[Any, dict]]:
    names = set()
    ids = set()
    for image in images:
        sides = [image.get("width"), image.get("height")]
        name = image.get("file_name")
        if not (_is_id(image.get("id")) and isinstance(name, str) and are_numbers(sides) and min(sides) > 0):
            say("fields", "images with id, file_name, width and height", image, FORMAT)
            continue
        if image["id"] in ids:
            say("image ids", "every image id once", f"{image['id']!r} again, of {name}", "to number the images anew")
        elif name in names:
            say("file names", "every image once", f"{name} under two ids", "one entry with all of its annotations")
        ids.add(image["id"])
        names.add(name)
        yield image["id"], image


def _categories(categories: list[dict], say: partial) -> Iterator[tuple[Any, str]]:
    ids, names = set(), set()
    for category in categories:
        number, name = category.get("id"), category.get("name")
        if not (_is_id(number) and isinstance(name, str)):
            say("fields", "categories with id and name", category, FORMAT)
            continue
        if number in ids or name in names:
            say("categories", "every id and name of a category once", category, "to merge them")
        ids.add(number)
        names.add(name)
        yield number, name


def _check_classes(classes: Any, names: list[str], objects: Counter, say: partial, part: str) -> None:
    """mmdet numbers classes in the file's order, and leaves out what the config does not name."""
    expected = f"metainfo.classes of the config to be the file's categories {_few(names)}"
    if isinstance(classes, str) or not classes:
        say("classes", expected, repr(classes), 'metainfo=dict(classes=("NAME",)), a tuple')
        return
    unknown = [name for name in classes if name not in names]
    dropped = [name for name in names if name not in classes]
    known = [name for name in names if name in classes]
    if unknown:
        say("classes", expected, _few(list(classes)), "the same names in both, and as many as num_classes")
    elif lost := sum(objects[name] for name in dropped):
        got = f"{_few(list(classes))}, which leaves out {lost} objects of {_few(dropped)}"
        say("classes", expected, got, "to add them and raise num_classes, or --no-check if that is meant")
    elif known != list(classes):
        say("classes", expected, f"another order: {_few(list(classes))}", "the file's order")
    elif part == "train" and objects:
        for name in (name for name in classes if not objects[name]):
            say("rare", "objects of every class", f"none of {name!r}", "more data, or fewer classes", warning=True)


def _few(names: list[str]) -> str:
    return f"[{', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''}]"


def _objects(
    annotations: list[dict], images: dict, categories: dict, say: partial, panoptic: bool, evaluated: bool
) -> Iterator[tuple[dict, dict]]:
    """Yield (image, annotation) of what mmdet takes."""
    if panoptic:
        annotations = list(segments(annotations, say))
    needed = ("id", "image_id", "category_id", "bbox", "area", *(["iscrowd"] if evaluated else []))
    say_rare = partial(say, of=len(annotations))
    ids = set()
    for found in annotations:
        which = f"annotation {found.get('id')!r}"
        lacking = [key for key in needed if key not in found]
        box = found.get("bbox")
        if lacking or not (_is_id(found["id"]) and _is_id(found["image_id"]) and _is_id(found["category_id"])):
            say("keys", f"annotations with {', '.join(needed)}", found, FORMAT)
            continue
        if not panoptic and found["id"] in ids:
            say("annotation ids", "every annotation id once", f"{found['id']!r} again", "to number them anew")
        ids.add(found["id"])
        if evaluated and not panoptic and found["id"] == 0:
            say("id 0", "annotation ids from 1", "0, which COCO's metric never finds", "to add 1 to them", warning=True)
        image = images.get(found["image_id"])
        if image is None:
            got = f"{which} of image {found['image_id']!r}, which is not there"
            say("unknown image", "annotations of the file's images", got, "to add the image or remove the annotation")
            continue
        if found["category_id"] not in categories:
            got = f"{which} of category {found['category_id']!r}"
            say("unknown category", f"categories {list(categories)[:5]}", got, "to add it to the file's categories")
            continue
        if not (isinstance(box, list) and len(box) == 4 and are_numbers([*box, found["area"]])):
            got = f"{which} with {box} and {found['area']}"
            say("numbers", "x, y, width, height as bbox, and an area", got, "to repair or remove it")
            continue
        if found.get("iscrowd", 0) not in (0, 1):
            say("crowd", "iscrowd of 0 or 1", f"{which} with {found['iscrowd']!r}", "to repair or remove it")
            continue
        x, y, width, height = box
        got = f"{which} with bbox {box} and area {found['area']}"
        if width <= 0 or height <= 0 or found["area"] <= 0:
            say_rare("empty boxes", "boxes and areas above 0", got, "to repair or remove it")
            continue
        bounds = (image["width"], image["height"])
        if not is_inside((x, y, x + width, y + height), bounds):
            got = f"{which} with bbox {box} (x, y, width, height) in {bounds[0]} x {bounds[1]} pixels"
            say_rare("outside", "boxes within the image", got, "to clip it, or to export x, y, width, height")
        elif width < 1 or height < 1:
            got += ", which mmdet leaves out"
            say("thin boxes", "boxes of at least a pixel", got, "to remove it", warning=True)
        elif not found.get("ignore"):
            yield image, found


def _check_evaluator(other: str, file: str, images: dict, findings: Findings) -> None:
    """Results are looked up by image in a second file."""
    content = read_annotations(other, findings, ("images", "categories", "annotations"))
    if content is not None and (lost := images.keys() - {image.get("id") for image in content["images"]}):
        got = f"{len(lost)} not in it"
        findings.add(
            other, "evaluator", f"the images of {file}", got, "the set's own file as ann_file of the evaluator"
        )


def _is_kept(image: dict, dataset: Any, seen: set) -> bool:
    """Whether mmdet reads an image."""
    rules = None if dataset.test_mode else dataset.filter_cfg
    rules = rules or {}
    if rules.get("filter_empty_gt", False) and image["id"] not in seen:
        return False
    return min(image["width"], image["height"]) >= rules.get("min_size", 0)


def _check_pictures(dataset: Any, images: list[dict], findings: Findings, decode: bool, seconds: float) -> int:
    """Look for all images, read some; how many."""
    if "img" not in dataset.data_prefix:
        findings.add(None, "no folder", "data_prefix.img", "none", 'data_prefix=dict(img="FOLDER")')
        return 0
    files = Files()
    found = []
    for image in images:
        raw = {"raw_img_info": {**image, "img_id": image["id"]}, "raw_ann_info": []}
        path = dataset.parse_data_info(raw)["img_path"]
        if got := files.missing(path):
            advice = "data_root, data_prefix and file_name that together are the file's path"
            findings.add(path, "no image", f"the image that {dataset.ann_file} names", got, advice)
        else:
            found.append((path, (image["width"], image["height"])))
    read = 0
    for path, size in sample(found if decode else [], seconds):
        read += 1
        picture = read_picture(path, findings)
        if picture is None:
            continue
        got = size_when_read(picture, path, findings)
        if got != size:
            expected = f"{size[0]} x {size[1]} pixels as in {dataset.ann_file}"
            findings.add(path, "image size", expected, f"{got[0]} x {got[1]}", "annotations of this very image")
    return read
