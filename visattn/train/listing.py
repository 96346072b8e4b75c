"""Which images a split holds, and what else is there: files in class folders."""

import heapq
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path

from visattn.train.errors import DataError
from visattn.train.seeding import seed_for
from visattn.train.sources import EXTENSIONS, FolderSource, Source, TarSource

SPLITS = ("train", "val", "valid", "validation", "test")
SYSTEM = {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
MOST_KINDS = 8  # of what is left out, in one line


class Skipped:
    """Counts what is no image of the split, by kind, with examples of each."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, list[str]]] = {}

    def add(self, kind: str, example: str = "") -> None:
        """Count one; {s} in its kind is what makes a plural."""
        count, examples = self._kinds.get(kind, (0, []))
        self._kinds[kind] = count + 1, sorted([*examples, example])[:3] if example else []

    def add_file(self, path: str) -> None:
        """Count a file that is no image."""
        if extension := os.path.splitext(path)[1].lower():
            self.add(f"*{extension}")
        else:
            self.add("file{s} without extension", path)

    def __str__(self) -> str:
        parts = []
        kinds = sorted(self._kinds.items(), key=lambda item: (not item[1][1], -item[1][0], item[0]))
        for kind, (count, examples) in kinds[:MOST_KINDS]:
            more = ["..."] if count > len(examples) else []
            where = f" ({', '.join(examples + more)})" if examples else ""
            parts.append(f"{count} {kind.replace('{s}', 's' * (count > 1))}{where}")
        if rest := sum(count for _, (count, _) in kinds[MOST_KINDS:]):
            parts.append(f"{rest} others")
        return ", ".join(parts)


@dataclass
class Listing:
    """What a split holds, before its classes have numbers."""

    path: str
    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    numbered: bool = False  # labels are class numbers instead of names
    shards: list[str] = field(default_factory=list)  # tar files
    places: list[list[int]] = field(default_factory=list)  # of each image: shard, offset, size
    empty: list[str] = field(default_factory=list)  # class folders without an image
    remarks: list[str] = field(default_factory=list)  # what a user should know before training
    stores: set[tuple[int, int]] = field(default_factory=set)  # the folders or tar files themselves, for the system

    @property
    def report(self) -> str:
        """One line on what is used and what is not; empty where there is nothing to say."""
        if not self.remarks:
            return ""
        return "; ".join([f"{self.path}: {len(self.names)} images of {len(set(self.labels))} classes", *self.remarks])

    def source(self, classes: list[str], mode: str) -> Source:
        """The images with the numbers of their classes."""
        numbers = {name: number for number, name in enumerate(classes)}
        targets = [numbers[label] for label in self.labels]
        if self.shards:
            source = TarSource(self.shards, self.names, self.places, targets, mode)
        else:
            source = FolderSource(self.names, targets, mode)
        source.report = self.report
        return source

    def split(self, share: float, seed: int) -> tuple["Listing", "Listing"]:
        """Keep a share of each class for testing; returns what is left to train with, and what is kept.

        A class's images are kept in the order of hashes of their names, so that neither other images nor a library's
        generator decide which.

        Raises:
            DataError: a class has a single image.
        """
        members: dict[str, list[int]] = {}
        for index, label in enumerate(self.labels):
            members.setdefault(label, []).append(index)
        if single := sorted((label for label, indices in members.items() if len(indices) < 2), key=natural):
            raise DataError(
                f"--val-split: expected at least 2 images of each class in {self.path}, one to test with, got 1 of "
                f"{some(single)}; try to add images, or to remove these classes"
            )
        kept: set[int] = set()
        for indices in members.values():
            # ascii(): names may hold bytes that are no text
            order = sorted(indices, key=lambda i: seed_for(seed, "split", ascii(self.names[i].removeprefix(self.path))))
            kept |= set(order[: min(max(1, round(share * len(indices))), len(indices) - 1)])
        train, test = (
            replace(
                self,
                names=[name for index, name in enumerate(self.names) if (index in kept) == held],
                labels=[label for index, label in enumerate(self.labels) if (index in kept) == held],
                places=[place for index, place in enumerate(self.places) if (index in kept) == held],
            )
            for held in (False, True)
        )
        test.remarks = [f"kept for testing, of {len(self.names)}, by --val-split {share:g} and --seed {seed}"]
        test.empty, test.stores = [], set()
        return train, test

    def finish(self, folders: Iterable[str], skipped: Skipped) -> None:
        """Take the labels from `names`, CLASS/.../IMAGE, if they have none, and add the remarks.

        The class is the first folder; where all images share folders down to one that is called like a split, as in a
        tar of train/CLASS/IMAGE, the first one below that. `folders` are the paths of all folders.
        """
        if not self.numbered:
            self._take_labels(folders)
        if text := str(skipped):
            self.remarks.append(f"left out: {text}")

    def _take_labels(self, folders: Iterable[str]) -> None:
        # What the first and the last of all names share is shared by those between them.
        ends = (name.split("/")[:-2] for name in (min(self.names, default=""), max(self.names, default="")))
        shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False))]
        while shared and shared[-1] not in SPLITS:
            shared.pop()
        head = "".join(f"{name}/" for name in shared)
        if head and any(name.count("/") == len(shared) for name in self.names):  # it is a class after all
            head = ""
        if head:
            self.remarks.append(f"classes are the folders below {head}")
        self.labels = [name[len(head) :].partition("/")[0] for name in self.names]
        if deeper := sum(name.count("/", len(head)) > 1 for name in self.names):
            self.remarks.append(f"{deeper} deeper than CLASS/IMAGE")
        known, inside = set(self.labels), {path[len(head) :] for path in folders if path.startswith(head)}
        if found := {path.partition("/")[0] for path in inside - {""}} - known:
            self.empty = sorted(found, key=natural)
            self.remarks.append(f"without images: {some(self.empty)}")
        alike: dict[str, list[str]] = {}
        for name in sorted(known, key=natural):
            alike.setdefault(unicodedata.normalize("NFC", name).casefold().strip(), []).append(name)
        if pairs := [" and ".join(names) for names in alike.values() if len(names) > 1]:
            self.remarks.append(f"classes of nearly one name: {some(pairs)}")


def natural(name: str) -> tuple[list, str]:
    """Sort key: numbers by value, letters without case; names that are then equal by their spelling."""
    pieces: list = re.split(r"(\d+)", name.lower())
    for i in range(1, len(pieces), 2):
        digits = pieces[i].lstrip("0")
        pieces[i] = (len(digits), digits)  # int() takes no more than 4300
    return pieces, name


def some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join([*names[:5], "..."] if len(names) > 5 else names)


def is_image(name: str) -> bool:
    """Whether the name is one of an image that can be read."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether a file or folder is the system's, or a program's, and no part of the data."""
    return name.startswith(".") or name in SYSTEM


def list_folder(folder: Path) -> Listing:
    """Every image below the class folders, each real folder once."""
    root, listing, skipped, folders = str(folder), Listing(str(folder)), Skipped(), []
    above = {_identity(path) for path in folder.resolve().parents}  # a link there would bring in the other splits
    seen: dict[tuple[int, int], str] = {}
    waiting, links = [""], []
    while waiting or links:
        # Links come last, the shortest first, so that no folder is taken from the class that it lies in.
        path = waiting.pop() if waiting else heapq.heappop(links)[-1]
        where = os.path.join(root, path)
        identity = _identity(where)
        folders.append(path)
        if identity in above or identity in seen:
            first = seen.get(identity, "")
            if not first or path.startswith(f"{first}/"):
                skipped.add("link loop{s}", path)
            else:
                skipped.add("repeated folder{s}", f"{path} = {first}")
            continue
        seen[identity] = path
        for entry in _entries(where):
            name = f"{path}/{entry.name}" if path else entry.name
            if is_hidden(entry.name):
                skipped.add("hidden file{s}", name)
            elif (kind := _kind(entry)) == "folder":
                if path and is_image(entry.name):
                    skipped.add("folder{s} named like an image", name)
                if entry.is_symlink():
                    heapq.heappush(links, (name.count("/"), natural(name), name))
                else:
                    waiting.append(name)
            elif kind != "file":
                skipped.add(kind, name)
                if not path and entry.is_symlink():  # it was meant to be a class
                    folders.append(name)
            elif not is_image(entry.name):
                skipped.add_file(name)
            elif not path:
                raise DataError(f"expected class folders in {root}, got images there ({name}); try {root}/CLASS/{name}")
            else:
                listing.names.append(name)
    listing.names.sort(key=natural)
    listing.finish(folders, skipped)
    listing.names = [os.path.join(root, name) for name in listing.names]
    listing.stores = set(seen)
    return listing


def _identity(path: str | Path) -> tuple[int, int]:
    try:
        info = os.stat(path)
    except OSError as error:
        raise _unreadable(error) from error
    return info.st_dev, info.st_ino


def _entries(path: str) -> list[os.DirEntry]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:  # os.walk alone would leave out what it cannot read
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> DataError:
    return DataError(f"expected a folder that can be read, got {error}; try ls {error.filename}")


def _kind(entry: os.DirEntry) -> str:
    """file or folder, after links; else why it is neither. Only links cost a system call."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "special file{s}" if os.path.exists(entry.path) else "broken link{s}"
    except OSError:  # a link to itself, or into a folder that is not ours
        return "broken link{s}"
