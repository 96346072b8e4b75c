"""Which images a split holds, and what else is there: members of tar files at their offsets."""

import json
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from visattn.train.errors import DataError
from visattn.train.files import open_regular
from visattn.train.listing import Listing, Skipped, is_hidden, is_image
from visattn.train.sources import EXTENSIONS

ABANDONED = 86400  # seconds after which nobody writes to a temporary file any more
KEPT = ("names", "labels", "places", "empty", "remarks")  # of a listing, in the index
NUMBER = re.compile("0|[1-9][0-9]{0,31}")


def list_tars(split: Path, tars: list[Path], numbered: bool) -> Listing:
    """The images of tar files: webdataset shards if `numbered`, otherwise one tar of class folders (or class tars).

    The index is kept beside the split, because listing a large data set takes minutes.
    """
    listing = Listing(str(split), numbered=numbered, shards=[str(tar) for tar in tars])
    cache, stamps = split.with_name(f".{split.name}.index.json"), None
    try:
        # Sizes alone do not tell: tar files are padded to multiples of 10 KiB.
        infos = [tar.stat() for tar in tars]
        listing.stores = {(info.st_dev, info.st_ino) for info in infos}
        stamps = [[tar.name, info.st_size, info.st_mtime_ns] for tar, info in zip(tars, infos, strict=True)]
        with open_regular(cache) as file:
            kept = json.load(file)
        _check_index(kept, stamps, numbered)
        for key in KEPT:
            setattr(listing, key, kept[key])
        return listing
    except (OSError, ValueError, RecursionError):
        pass  # none yet, or not ours

    skipped, folders, images = Skipped(), [], {}
    for shard, tar in enumerate(tars):
        try:
            with open_regular(tar) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                if numbered:
                    _list_shard(listing, shard, archive, skipped)
                else:
                    _list_class_folders(images, [shard, 0], archive, skipped, folders)
        except DataError:
            raise
        # A damaged header makes tarfile fail in many ways.
        except (tarfile.TarError, OSError, ValueError, ArithmeticError, MemoryError, RecursionError) as error:
            raise DataError(
                f"expected an uncompressed tar file at {tar}, got {str(error) or type(error).__name__}; "
                f"try tar -tf {tar} to see whether it is whole"
            ) from error
    if not numbered:
        listing.names, listing.places = list(images), list(images.values())
        if stray := next((name for name in listing.names if "/" not in name), None):
            raise DataError(f"expected class folders in {listing.path}, got the image {stray}; try CLASS/{stray}")
    listing.finish(folders, skipped)
    _keep(cache, {"stamps": stamps, **{key: getattr(listing, key) for key in KEPT}})
    return listing


def _check_index(index: Any, stamps: list, numbered: bool) -> None:
    """Raise ValueError unless an index file is one of these tar files, and nothing in it can do harm."""
    if not isinstance(index, dict) or index.keys() != {"stamps", *KEPT} or index["stamps"] != stamps:
        raise ValueError("an index of something else")
    for key in ("names", "labels", "empty", "remarks"):
        texts = index[key]
        if type(texts) is not list or not all(type(text) is str and len(text) < 4096 for text in texts):
            raise ValueError(f"{key} that are no short texts")
        os.fsencode("".join(texts))  # what it refuses no path can hold; a UnicodeError is a ValueError
    labels, images = index["labels"], len(index["names"])
    if numbered and not all(NUMBER.fullmatch(label) and int(label) < images for label in labels):
        raise ValueError("labels that are no class numbers")
    places = np.array(index["places"] or np.empty((0, 3), int))  # ValueError if ragged
    if places.dtype.kind != "i" or places.shape != (images, 3) or len(labels) != images:
        raise ValueError("images without label or place")
    sizes = np.array([size for _, size, _ in stamps])
    shard, offset, size = places.T
    if places.min(initial=0) < 0 or shard.max(initial=0) >= len(sizes) or (offset > sizes[shard] - size).any():
        raise ValueError("places outside the tar files")


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


def _files(
    archive: tarfile.TarFile, skipped: Skipped, folders: list[str], outer: str = ""
) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The regular members with their paths, without what leads nowhere in them."""
    end = 0
    for member in archive:
        # pyrefly: ignore[missing-attribute]: as old as tarfile itself, but in no stub
        archive.members.clear()  # otherwise they pile up: a gigabyte for ImageNet
        if member.offset < end or member.size < 0:  # tarfile would go round in circles
            raise tarfile.ReadError("a member that points back")
        end = member.offset_data
        parts = [part for part in f"{outer}/{member.name}".split("/") if part not in ("", ".", "..")]
        path = "/".join(parts)
        if any(map(is_hidden, parts)):
            skipped.add("hidden file{s}", path)
        elif member.isdir():
            folders.append(path)
        elif member.isreg() and not member.issparse():
            yield path, member
        else:
            skipped.add("link{s}" if member.islnk() or member.issym() else "special file{s}", path)
    # tarfile takes a header that it cannot read for the end, and so leaves out whatever follows.
    archive.fileobj.seek(archive.offset)
    rest = archive.fileobj.read(1 << 16)
    if rest.strip(b"\0"):
        raise tarfile.ReadError(f"no header and no end at byte {archive.offset}, or more after the end")
    if not rest:
        skipped.add("tar file{s} without an end, maybe cut off", outer or os.path.basename(str(archive.name)))


def _list_class_folders(
    images: dict[str, list[int]],
    start: list[int],
    archive: tarfile.TarFile,
    skipped: Skipped,
    folders: list[str],
    outer: str = "",
) -> None:
    """Collect images by path with their places; `start` is the place of the archive itself, shard and offset."""
    shard, offset = start
    for path, member in _files(archive, skipped, folders, outer):
        if path.endswith(".tar") and not outer:  # ImageNet's own training file holds one tar per class
            inner = path.removesuffix(".tar")
            folders.append(inner)
            with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as nested:
                _list_class_folders(images, [shard, member.offset_data], nested, skipped, folders, inner)
        elif is_image(path):
            if path in images:  # unpacking too would leave the last one
                skipped.add("earlier member{s} of the same name", path)
            images[path] = [shard, offset + member.offset_data, member.size]
        else:
            skipped.add_file(path)


def _list_shard(listing: Listing, shard: int, archive: tarfile.TarFile, skipped: Skipped) -> None:
    images, labels = {}, {}
    for path, member in _files(archive, skipped, []):
        folder, base = os.path.split(path)
        stem, _, extension = base.partition(".")
        key, where = os.path.join(folder, stem), f"{listing.shards[shard]}: {path}"
        if f".{extension.lower()}" in EXTENSIONS:
            if key in images:
                raise DataError(f"{where}: expected one image per key, got two; try a key of its own for each")
            images[key] = (path, [shard, member.offset_data, member.size])
        elif extension == "cls":
            text = file.read(32).strip() if (file := archive.extractfile(member)) else b""
            if not text.isdigit():
                raise DataError(f"{where}: expected a class number from 0 on, got {text!r}; try a plain 7 in KEY.cls")
            if key in labels:
                raise DataError(f"{where}: expected one .cls per key, got two; try a key of its own for each")
            labels[key] = str(int(text))
        else:
            skipped.add(f"*.{extension}")
    if missing := images.keys() ^ labels.keys():
        raise DataError(
            f"{listing.shards[shard]}: expected an image and a .cls for each key, got only one of them for "
            f"{min(missing)}; try KEY.jpg with KEY.cls"
        )
    for key, (name, place) in images.items():
        listing.names.append(name)
        listing.labels.append(labels[key])
        listing.places.append(place)
