"""What a command does first: the imports that follow take seconds and memory."""

import sys

from train import signals
from train.errors import say_exhausted


def begin() -> None:
    """End without a traceback when a signal comes or the system has no more memory."""
    signals.end_at_once()
    sys.excepthook = say_exhausted
