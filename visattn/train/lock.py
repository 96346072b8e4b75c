"""One run at a time in a folder: two that resume it would delete each other's checkpoints."""

import contextlib
import errno
import fcntl
import os
import re
import socket
from pathlib import Path

from visattn.train.errors import OutputError


class FolderLock:
    """Held by the one process that writes to a folder; it ends with that process, however that ends.

    A POSIX lock and not flock's: a loader process, which may outlive a killed run, does not inherit it.
    """

    def __init__(self) -> None:
        self._path, self._file = Path(), -1

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self, folder: Path) -> bool:
        """Hold `folder`, also if it has been deleted since: then it is made anew. False: its file system has no locks.

        Raises:
            OutputError: another process holds it.
            OSError: nothing can be written there.
        """
        self._path, locked = folder / ".lock", True
        while not self.holds():
            self._close()
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            locked = self._lock(folder)
            with contextlib.suppress(OSError):  # a full disk: the lock itself takes no room
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        return locked

    def release(self) -> None:
        """Let go of the folder and leave no file; nothing to do where none is held."""
        with contextlib.suppress(OSError):
            if self.holds():
                self._path.unlink()
        self._close()

    def holds(self) -> bool:
        """Is the file under the name of the lock the one that is locked? It may have been deleted, or made anew."""
        try:
            return self._file >= 0 and os.path.samestat(os.fstat(self._file), os.stat(self._path))
        except OSError:
            return False

    def _lock(self, folder: Path) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            found = re.fullmatch(r"([1-9]\d{0,8}) ([\w.-]+)\n", os.pread(self._file, 300, 0).decode(errors="replace"))
            pid, host = (int(found[1]), found[2]) if found else (0, "")
            if error.errno not in (errno.EAGAIN, errno.EACCES) and not _runs_here(pid, host):
                return False
            self._close()
            raise OutputError(
                f"expected a folder that no other run writes to, got {folder}, where "
                f"{f'process {pid} on {host}' if found else 'another process'} does; try again when that has ended, or "
                f"another --name (if it surely has ended, delete {self._path})"
            ) from None

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def _runs_here(pid: int, host: str) -> bool:
    """Is it another process of this host?"""
    if host != socket.gethostname() or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True
