"""Files that survive a kill: whole or not there."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a temporary file, flush it to the disk, rename it over `path`, flush the folder."""
    with _written(path, content) as temporary:
        os.replace(temporary, path)
        sync_folder(path.parent)


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
