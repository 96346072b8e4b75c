"""What a command does first: the imports that follow take seconds and memory."""

import os
import sys

from visattn.train import signals
from visattn.train.errors import say_exhausted


def begin() -> None:
    """End without a traceback when a signal comes or the system has no more memory; wait for threads asleep."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP reads it when torch is loaded, and `-m visattn.train` loads torch before this module. Threads that spin
        # made an epoch of the default run up to 60 times slower on two cores that another process shares.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    signals.end_at_once()
    sys.excepthook = say_exhausted
