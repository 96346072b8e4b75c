"""Which images a split holds: files in class folders, or members of tar files at their offsets."""

import json
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key

from train.errors import DataError
from train.sources import FolderSource, Source, TarSource

ABANDONED = 86400  # seconds after which nobody writes to a temporary file any more
EXTENSIONS = {*get_img_extensions(), ".webp"}


@dataclass
class Listing:
    """What a split holds, before its classes have numbers."""

    path: str
    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    numbered: bool = False  # labels are class numbers instead of names
    shards: list[str] = field(default_factory=list)  # tar files
    places: list[list[int]] = field(default_factory=list)  # of each image: shard, offset, size

    def source(self, classes: list[str], mode: str) -> Source:
        numbers = {name: number for number, name in enumerate(classes)}
        targets = [numbers[label] for label in self.labels]
        if self.shards:
            return TarSource(self.shards, self.names, self.places, targets, mode)
        return FolderSource(self.names, targets, mode)


def list_folder(folder: Path) -> Listing:
    """Every image below the class folders; as with timm, the folder that holds an image names its class."""

    def refuse(error: OSError) -> None:  # os.walk alone would leave out what it cannot read
        raise DataError(f"expected a folder that can be read, got {error}; try ls {error.filename}") from error

    found = []
    for path, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if path == str(folder):
            if stray := [name for name in files if _is_image(name)]:
                raise DataError(
                    f"expected class folders in {folder}, got images there ({stray[0]}); try {folder}/CLASS/{stray[0]}"
                )
            continue
        # A folder with an image's name counts as an image that cannot be read.
        found += [os.path.join(path, name) for name in files + folders if _is_image(name)]
        folders[:] = [name for name in folders if not _is_image(name)]
    found.sort(key=natural_key)
    return Listing(str(folder), found, [os.path.basename(os.path.dirname(name)) for name in found])


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def list_tars(split: Path, tars: list[Path], numbered: bool) -> Listing:
    """The images of tar files: webdataset shards if `numbered`, otherwise one tar of class folders (or class tars).

    The index is kept beside the split, because listing a large data set takes minutes.
    """
    listing = Listing(str(split), numbered=numbered, shards=[str(tar) for tar in tars])
    cache, stamps = split.with_name(f".{split.name}.index.json"), None
    try:
        # Sizes alone do not tell: tar files are padded to multiples of 10 KiB.
        stamps = [[tar.name, tar.stat().st_size, tar.stat().st_mtime_ns] for tar in tars]
        index = json.loads(cache.read_bytes())
        if index["stamps"] == stamps:
            listing.names, listing.labels, listing.places = index["names"], index["labels"], index["places"]
            return listing
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or not ours

    for shard, tar in enumerate(tars):
        try:
            with tarfile.open(tar, "r:") as archive:
                (_list_shard if numbered else _list_class_folders)(listing, shard, archive)
        except (tarfile.TarError, OSError) as error:
            raise DataError(
                f"expected an uncompressed tar file at {tar}, got {error}; try tar -tf {tar} to see whether it is whole"
            ) from error
    _keep(cache, {"stamps": stamps, "names": listing.names, "labels": listing.labels, "places": listing.places})
    return listing


def _keep(cache: Path, index: dict) -> None:
    """Write the index at once, as other processes may do the same; a folder that takes no files goes without."""
    temporary = None
    try:
        for left in cache.parent.glob(f"{cache.name}?*"):
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()
        handle, temporary = tempfile.mkstemp(dir=cache.parent, prefix=cache.name)
        with open(handle, "w") as file:
            json.dump(index, file)
        os.chmod(temporary, 0o644)
        os.replace(temporary, cache)
    except OSError:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def _files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        archive.members.clear()  # otherwise they pile up: a gigabyte for ImageNet
        if member.isreg():
            yield member


def _list_class_folders(
    listing: Listing, shard: int, archive: tarfile.TarFile, start: int = 0, outer: str = ""
) -> None:
    for member in _files(archive):
        path = Path(outer, member.name)
        if path.suffix == ".tar" and not outer:  # ImageNet's own training file holds one tar per class
            with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                _list_class_folders(listing, shard, inner, member.offset_data, str(path.with_suffix("")))
        elif _is_image(path.name):
            if not path.parent.name:
                raise DataError(f"expected class folders in {listing.path}, got the image {path}; try CLASS/{path}")
            listing.names.append(str(path))
            listing.labels.append(path.parent.name)
            listing.places.append([shard, start + member.offset_data, member.size])


def _list_shard(listing: Listing, shard: int, archive: tarfile.TarFile) -> None:
    images, labels = {}, {}
    for member in _files(archive):
        folder, base = os.path.split(member.name)
        stem, _, extension = base.partition(".")
        key, where = os.path.join(folder, stem), f"{listing.shards[shard]}: {member.name}"
        if f".{extension.lower()}" in EXTENSIONS:
            if key in images:
                raise DataError(f"{where}: expected one image per key, got two; try a key of its own for each")
            images[key] = (member.name, [shard, member.offset_data, member.size])
        elif extension == "cls":
            text = archive.extractfile(member).read(32).strip()
            if not text.isdigit():
                raise DataError(f"{where}: expected a class number from 0 on, got {text!r}; try a plain 7 in KEY.cls")
            labels[key] = str(int(text))
    if missing := images.keys() ^ labels.keys():
        raise DataError(
            f"{listing.shards[shard]}: expected an image and a .cls for each key, got only one of them for "
            f"{min(missing)}; try KEY.jpg with KEY.cls"
        )
    for key, (name, place) in images.items():
        listing.names.append(name)
        listing.labels.append(labels[key])
        listing.places.append(place)
