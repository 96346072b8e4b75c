"""Files: written so that they survive a kill, read only where they are files."""

import contextlib
import csv
import errno
import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from visattn.train.errors import ConfigError


def write_atomic(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a temporary file, flush it to the disk, rename it over `path`, flush the folder."""
    with _written(path, content) as temporary:
        os.replace(temporary, path)
        sync_folder(path.parent)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """`write_atomic` for a CSV file. Names of folders in it may be no text, and stay the bytes that they are."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode(errors="surrogateescape"))


def write_hashed(path: Path, content: bytes) -> None:
    """`write_atomic`, and the sha256 in a file beside it.

    Whatever fails, and whenever: the two fit, or the hash is not there, and `path` is the old file or the new one.
    """
    beside = hash_file(path)
    line = f"{hashlib.sha256(content).hexdigest()}  {path.name}\n"
    with _written(path, content) as temporary, _written(beside, line.encode()) as temporary_hash:
        beside.unlink(missing_ok=True)
        sync_folder(path.parent)
        os.replace(temporary, path)
        os.replace(temporary_hash, beside)
        sync_folder(path.parent)


def hash_file(path: Path) -> Path:
    """Where the hash of a file lies."""
    return path.with_name(f"{path.name}.sha256")


@contextlib.contextmanager
def _written(path: Path, content: bytes | Callable[[BinaryIO], object]) -> Iterator[Path]:
    """The content of `path` under a temporary name, on the disk; errors name a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if path.exists() and not path.is_file():  # a rename would put a file in the place of /dev/null
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)  # a full disk names none
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def configs_folder() -> Path:
    """`configs/`: inside the installed package or, in a clone, beside it."""
    package = Path(__file__).parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if os.path.isdir(folder / "imagenet"):
            return folder
    raise ConfigError(f"expected the folder of recipes in {package} or beside it, got none; try a new installation")


def open_regular(path: str | bytes | Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading; any other kind raises OSError.

    A FIFO without a writer would never open, and opening a device may set it going: look first, and again at
    what was opened, as it may have been put there in between.
    """

    def check(info: os.stat_result) -> None:
        if not (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)):  # open() itself refuses a folder
            raise OSError(errno.EINVAL, "Not a regular file", os.fsdecode(path))

    def opener(name: str | bytes | Path, flags: int) -> int:
        check(os.stat(name))
        handle = os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # which Windows lacks, as it does FIFOs
        try:
            check(os.fstat(handle))
        except OSError:
            os.close(handle)
            raise
        return handle

    return open(path, "rb", opener=opener)
