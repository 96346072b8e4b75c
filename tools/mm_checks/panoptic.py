"""Panoptic annotations in COCO's format."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from mm_checks.findings import Findings
from mm_checks.pictures import not_a_file, read_picture, sample
from mm_checks.shapes import FORMAT


def segments(annotations: list[dict], say: partial) -> Iterator[dict]:
    """Yield what a panoptic file says of each image as annotations."""
    seen = set()
    for found in annotations:
        inside = found.get("segments_info")
        image = found.get("image_id")
        if not (
            isinstance(image, (int, str)) and isinstance(inside, list) and all(isinstance(i, dict) for i in inside)
        ):
            say("keys", "annotations with image_id and segments_info", found, FORMAT)
            continue
        if image in seen:
            say("annotation ids", "one annotation of every image", f"{image!r} again", "to merge them")
        seen.add(image)
        yield from ({**segment, "image_id": image} for segment in inside)


def check_panoptic(dataset: Any, content: dict, images: dict, findings: Findings, seconds: float) -> None:
    """Pictures of segments: red + 256 green + 65,536 blue is a segment's id, black none."""
    for category in content["categories"]:
        if "isthing" not in category:
            findings.add(dataset.ann_file, "isthing", "categories with isthing", category, FORMAT)
    for found in sample([found for found in content["annotations"] if found.get("image_id") in images], seconds):
        image = images[found["image_id"]]
        raw = {"raw_img_info": {**image, "img_id": image["id"]}, "raw_ann_info": []}
        path = dataset.parse_data_info(raw)["seg_map_path"]
        if got := not_a_file(path or ""):
            findings.add(path, "no segments", f"the segments of {image['file_name']}", got, "data_prefix.seg")
            continue
        picture = read_picture(path, findings)
        if picture is None:
            continue
        if picture.mode != "RGB" or picture.size != (image["width"], image["height"]):
            got = f"{picture.mode} of {picture.size[0]} x {picture.size[1]}"
            findings.add(path, "segments", f"RGB of {image['width']} x {image['height']}", got, FORMAT)
            continue
        ids = {segment["id"] for segment in found["segments_info"]}
        there = set(np.unique(np.asarray(picture).astype(int) @ [1, 256, 65536]).tolist()) - {0}
        if there != ids:
            got = f"other ids: {sorted(there ^ ids)[:5]}"
            findings.add(path, "segments", f"the segments of {dataset.ann_file}", got, FORMAT)
