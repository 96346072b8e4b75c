"""Image files: whether they can be read, and how large they are when mmcv has read them."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import mmcv
from PIL import Image

from mm_checks.findings import Findings
from visattn.weights import first_line

SUFFIXES = {suffix for suffix in Image.registered_extensions() if suffix not in (".pdf", ".mpg", ".mpeg")}
FEW = 100  # are read however long it takes
TURNED = {5, 6, 7, 8}  # EXIF orientations that swap width and height, which mmcv follows
COMMON = {"BMP", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP"}  # what Pillow reads, OpenCV reads too
Item = TypeVar("Item")


def sample(items: Sequence[Item], seconds: float) -> Iterator[Item]:
    """Yield `items` in a fixed random order, as many as `seconds` allow."""
    end = time.monotonic() + seconds
    for number, item in enumerate(random.Random(0).sample(items, len(items))):
        if number >= FEW and time.monotonic() > end:
            return
        yield item


def not_a_file(path: str | Path) -> str | None:
    """What is at `path` where that is no regular file, of which alone reading cannot hang; else None."""
    if os.path.isfile(path):
        return None
    if os.path.isdir(path):
        return "a folder"
    if os.path.exists(path):
        return "a FIFO, socket or device"
    return "a broken link" if os.path.islink(path) else "no file"


class Files:
    """Looks for files, with one listing of each folder."""

    def __init__(self) -> None:
        self.names: dict[str, set[str]] = {}

    def missing(self, path: str) -> str | None:
        """What is at `path` instead of a file, or None."""
        folder, name = os.path.split(path)
        if folder not in self.names:
            try:
                self.names[folder] = {entry.name for entry in os.scandir(folder or ".") if entry.is_file()}
            except (OSError, ValueError):  # no such folder, or no name of one
                self.names[folder] = set()
        return None if name in self.names[folder] else not_a_file(path)


def read_picture(path: str, findings: Findings) -> Image.Image | None:
    """A decoded image; None with a finding if it is damaged or none."""
    try:
        picture = Image.open(path)
        picture.load()
        if picture.format not in COMMON and mmcv.imfrombytes(Path(path).read_bytes()) is None:
            raise ValueError(f"OpenCV reads no {picture.format}")
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        findings.add(path, "damaged image", "an image", first_line(error), "to copy it again")
        return None
    return picture


def size_when_read(picture: Image.Image, path: str, findings: Findings) -> tuple[int, int]:
    """Width and height of an image as mmcv reads it, which takes 8 bits and follows its EXIF rotation."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        got = f"{picture.mode}, of which mmcv takes the upper 8"
        findings.add(path, "bits", "images of 8 bits", got, "values stretched to 0..255", warning=True)
    width, height = picture.size
    return (height, width) if picture.getexif().get(0x0112) in TURNED else (width, height)
