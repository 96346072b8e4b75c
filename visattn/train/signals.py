"""Signals that end a run. Schedulers, torchrun and terminals send them to one process or to all of a run at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing import util
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visattn.train.engine import Engine

CODES: dict[int, int] = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}  # how a run ends that got one


def end_at_once() -> None:
    """While there is nothing to save, a signal ends the process and its loader processes, without a traceback."""
    for name in CODES:
        signal.signal(name, _end)


def _end(signum: int, frame: FrameType | None) -> None:
    _say(b"interrupted\n")
    kill_loaders()
    os._exit(CODES[signum])


def ask(engine: Engine) -> None:
    """From now on a signal asks for a checkpoint and an end; a second SIGINT ends the process at once."""

    def stop(signum: int, frame: FrameType | None) -> None:
        engine.stop = engine.stop or CODES[signum]
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, _end)
            if engine.world.main:
                _say(b"interrupted: stops after this update; interrupt again to end at once\n")

    for name in CODES:
        signal.signal(name, stop)


def _say(text: bytes) -> None:
    """Unlike print, safe at any moment."""
    with contextlib.suppress(OSError):
        os.write(2, text)


def ignore(worker: int = 0) -> None:
    """What a loader process does: the run ends it, once it has saved."""
    for name in CODES:
        signal.signal(name, signal.SIG_IGN)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Signals wait for the end of the block, and for ever in processes started in it: until these `ignore` them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, CODES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_loaders() -> None:
    """End the loader processes that are left."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their end as a fault
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


# Before multiprocessing itself sends them SIGTERM, which they ignore, and waits for them.
util.Finalize(None, kill_loaders, exitpriority=0)
