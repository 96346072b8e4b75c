"""Compile Triton kernels in many processes at a time, into the cache in which launches look for them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from importlib import import_module

from visattn.ops.fused.launch import Launch


def _compile(module: str, name: str, launch: Launch, capability: int) -> str | None:
    """None, or why the kernel does not compile."""
    try:
        launch._replace(kernel=getattr(import_module(module), name)).compile(capability)
    except Exception as error:
        return f"{name}: {type(error).__name__}: {error}"
    return None


class Compilers:
    """Processes that compile launches, equal ones once; none of them touches a GPU."""

    def __init__(self, capability: int, processes: int | None = None) -> None:
        self.capability = capability
        self.futures: dict[tuple, Future[str | None]] = {}
        processes = processes or min(16, os.cpu_count() or 1)
        # Neither forks of a process that has a GPU, nor processes that each import all of this.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", "visattn.ops.fused.attention_kernels", "triton.compiler", __name__])
        self.pool = ProcessPoolExecutor(processes, context)

    def add(self, launches: Iterable[Launch]) -> int:
        """Begin to compile them; how many of them are new."""
        before = len(self.futures)
        for launch in launches:
            if launch.key not in self.futures:
                where = (launch.kernel.__module__, launch.kernel.__name__)
                job = (*where, launch.portable._replace(kernel=None), self.capability)
                self.futures[launch.key] = self.pool.submit(_compile, *job)
        return len(self.futures) - before

    def finish(self, seconds: float | None = None) -> list[str]:
        """Wait until all are compiled, or so long; why some are not."""
        from concurrent.futures import wait

        done, late = wait(self.futures.values(), seconds)
        self.pool.shutdown(wait=False, cancel_futures=True)
        failures = [str(reason) for future in done if (reason := future.exception() or future.result())]
        return failures + ([f"{len(late)} of {len(self.futures)} kernels not in time"] if late else [])
