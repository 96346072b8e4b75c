"""Failures a user can act on. `python -m train` prints their text without a traceback and exits with `exit_code`."""

import re
import reprlib
from typing import Any

# What moves a terminal's cursor, ends a line, turns the direction of writing, or is no text at all (surrogates).
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST = 1000  # characters of an error

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def printable(text: str) -> str:
    """`text` with its control characters escaped, as one line that no terminal obeys."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown(value: Any) -> str:
    """A user's value for a message: its repr, with the middle left out of what is long or nested."""
    try:
        return _short.repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number of thousands of digits"


class TrainError(Exception):
    """Base of all; the text says: expected ..., got ...; try ... . It is printed as one line of bounded length."""

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
