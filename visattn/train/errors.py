"""Failures a user can act on. The trainer prints their text without a traceback and exits with `exit_code`."""

import errno
import os
import re
import reprlib
import sys
from types import TracebackType
from typing import Any

LONGEST = 1000  # characters of an error
OUT_OF = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN)
# What libraries make of these.
REFUSED = re.compile(
    "start new thread|allocate memory|map segment|unable to mmap|bad_alloc|Too many open files|create a primitive"
)

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel = 2


def printable(text: str) -> str:
    """One line in which whatever a terminal would obey (newline, ESC, text direction) or refuse is spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """A user's value for a message: its repr, with the middle left out of what is long or nested."""
    try:
        text = _short.repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:97]}..."


class TrainError(Exception):
    """Base of all; the text says: expected ..., got ...; try ... . Names in it come from data, so it is printable."""

    exit_code = 2

    def __str__(self) -> str:
        text = printable(super().__str__())
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 300]} ... {text[-295:]}"


class ConfigError(TrainError, ValueError):
    """An option, or a combination of options, that cannot work."""


class DataError(TrainError, ValueError):
    """The images are there but do not form a data set."""


class DataNotFoundError(TrainError, FileNotFoundError):
    """The data folder, or one of its splits, is missing."""


class CheckpointError(TrainError, ValueError):
    """A checkpoint that is missing, damaged, unsafe, or of another run."""


class OutputError(TrainError, RuntimeError):
    """The run's folder is in use by another process, or lacks a file that the run promises."""


class NonFiniteLossError(TrainError, FloatingPointError):
    """The loss became NaN or infinite; raised before the optimizer sees its gradient."""

    exit_code = 1


class PeerError(TrainError, RuntimeError):
    """Another process of the run ended or does not answer."""

    exit_code = 1


class Interrupted(TrainError):
    """The run was asked to stop and has saved a checkpoint."""

    exit_code = 143


class DeviceMemoryError(TrainError, MemoryError):
    """A forward or backward pass does not fit in the device's memory."""

    exit_code = 1


class ResourceError(TrainError, OSError):
    """The system has no more memory, threads or files for the run."""

    exit_code = 1


def exhausted(error: BaseException | None) -> ResourceError | None:
    """What to say if the system refused memory, a thread, a process or a file; None for any other error."""
    while error is not None:
        known = isinstance(error, MemoryError) or getattr(error, "errno", None) in OUT_OF
        if known or (isinstance(error, (ImportError, RuntimeError)) and REFUSED.search(str(error))):
            reason = str(error).partition("\n")[0] or type(error).__name__
            return ResourceError(
                f"expected enough memory, processes and open files, got: {reason}; try fewer --workers, a smaller "
                "--micro-batch, or higher limits (ulimit -a)"
            )
        error = error.__cause__ or error.__context__
    return None


def say_exhausted(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Hook for errors that nothing else catches, such as those of imports."""
    if problem := exhausted(error):
        print(f"error: {problem}", file=sys.stderr)
        os._exit(problem.exit_code)
    sys.__excepthook__(kind, error, traceback)
