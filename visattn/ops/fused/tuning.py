"""Which tile sizes a kernel is launched with: a small search, its results kept in a file per GPU.

A launcher hands `run_tuned` its candidates, the default first. The environment variable VISATTN_TUNE says what happens:

    off      always the default
    cached   what a search found before on this GPU, else the default (this is how it is when nothing is set)
    search   what a search found before, else search now

`tune()` searches for as long as its body runs, whatever the variable says. README.md beside this file has the rest.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from visattn.ops.fused import tuning_cache
from visattn.ops.fused.tuning_search import Config, Run, search

_logger = logging.getLogger("visattn")

ShapeClass = tuple[int | str, ...]
MODES = ("off", "cached", "search")


@dataclass(frozen=True)
class Choice:
    """What a kernel is launched with for one shape class on one device, and how that is known.

    Attributes:
        config: The candidate taken.
        default: The candidate that is taken without a search.
        source: "search" (in this process), "cache" (a file of this user), "shipped" (a file of the package), or
            "default" (nothing is known).
        median_ms, default_ms: Median time of a call with `config` and with `default`, where a search has measured it.
        dropped: The candidates that a search in this process did not time, with the reason.
        times_ms: Median times of all others, where a search in this process measured them.
    """

    kernel: str
    shape_class: ShapeClass
    device: str
    config: Config
    default: Config
    source: str
    median_ms: float | None = None
    default_ms: float | None = None
    dropped: dict[Config, str] = field(default_factory=dict)
    times_ms: dict[Config, float] = field(default_factory=dict)

    @property
    def times_faster(self) -> float | None:
        """Than the default, as the search measured it."""
        return self.default_ms / self.median_ms if self.median_ms and self.default_ms else None


_Key = tuple[str, ShapeClass, torch.device]
_choices: dict[_Key, Choice] = {}
_searching = threading.Lock()
_trying_all = 0  # contexts of `all_candidates` that are open


@dataclass
class _Session:
    """One `tune()` that is open."""

    again: bool
    report: list[Choice] = field(default_factory=list)
    seen: set[_Key] = field(default_factory=set)


# Of the whole process, because autograd runs the backward of CUDA tensors in threads of its own.
_sessions: list[_Session] = []


def forget() -> None:
    """Drop what was read from files or found by searches in this process; the files are read again when needed."""
    _choices.clear()
    tuning_cache.forget()


def run_tuned(
    kernel: str,
    shape_class: ShapeClass,
    device: torch.device,
    candidates: Sequence[Config],
    run: Run,
) -> tuple[Tensor, ...]:
    """Launch `run` with the best config that is known for this kernel, shape class and GPU.

    Args:
        kernel: Names the kernel, and what one launch of it does ("window_forward").
        shape_class: What the best config depends on, the dtype ("float16") among it. Calls of one kernel with equal
            shape classes have equal candidates.
        device: Where the tensors are, with its index.
        candidates: The default first.
        run: Allocates the outputs, launches the kernel and returns them; the same values in the same shapes for every
            config, and nothing else may change.

    Raises:
        ValueError: VISATTN_TUNE is set to something else than off, cached or search.
    """
    if _trying_all:
        for config in candidates[1:]:
            run(config)
        return run(candidates[0])
    key = (kernel, shape_class, device)
    if _sessions:
        return run(_choose(key, candidates, run, True).config)
    mode = os.environ.get("VISATTN_TUNE") or "cached"
    if mode not in MODES:
        known = ", ".join(map(repr, MODES))
        raise ValueError(f"expected VISATTN_TUNE to be one of {known}, got {mode!r}")
    if mode == "off":
        return run(candidates[0])
    choice = _choices.get(key)
    if choice is None or (mode == "search" and choice.source == "default"):
        choice = _choose(key, candidates, run, mode == "search")
    return run(choice.config)


def _choose(key: _Key, candidates: Sequence[Config], run: Run, may_search: bool) -> Choice:
    choice = _choices.get(key)
    if choice is None:
        choice = _choices[key] = _look_up(key, candidates)
    sessions = list(_sessions)
    again = any(s.again and key not in s.seen for s in sessions)
    if may_search and (again or choice.source == "default") and len(candidates) > 1:
        found = _search(choice, key, candidates, run)
        if found is None:
            return choice
        choice = _choices[key] = found
    for session in sessions:
        if key not in session.seen:
            session.seen.add(key)
            session.report.append(choice)
    return choice


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _look_up(key: _Key, candidates: Sequence[Config]) -> Choice:
    """What the files know, the user's above the package's, as far as it is among the candidates."""
    kernel, shape_class, device = key
    choice = Choice(kernel, shape_class, _name(device), candidates[0], candidates[0], "default")
    for source, entry in tuning_cache.find(choice.device, (kernel, shape_class)):
        for config in candidates:
            if vars(config) == entry.config:
                times = {"median_ms": entry.median_ms, "default_ms": entry.default_ms}
                return replace(choice, config=config, source=source, **times)
    return choice


def _search(known: Choice, key: _Key, candidates: Sequence[Config], run: Run) -> Choice | None:
    """Search and keep what is found, or None where that cannot be done now: the next call tries again."""
    kernel, shape_class, device = key
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    if capturing or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    # Two threads would time each other's work. The second goes on without a search rather than wait.
    if not _searching.acquire(blocking=False):
        return None
    try:
        found = search(candidates, run, device, shape_class)
    except torch.OutOfMemoryError:
        found = None
    finally:
        _searching.release()
    name = f"{kernel} {shape_class}"
    if found is None:
        _logger.debug("%s: no search, for lack of memory or because the default gives NaN", name)
        return None
    for config, reason in found.dropped.items():
        _logger.debug("%s: dropped %s: %s", name, config, reason)
    median, default = (round(found.median_ms[c], 5) for c in (found.best, candidates[0]))
    entry = tuning_cache.Entry(dict(vars(found.best)), median, default)
    tuning_cache.add(known.device, (kernel, shape_class), entry)
    return Choice(
        *(kernel, shape_class, known.device, found.best, candidates[0], "search"),
        *(median, default, found.dropped, found.median_ms),
    )


@contextlib.contextmanager
def all_candidates() -> Generator[None]:
    """Launch every candidate of every kernel that runs in this context, the default last: to record them."""
    global _trying_all
    _trying_all += 1
    try:
        yield
    finally:
        _trying_all -= 1


@contextlib.contextmanager
def tune(again: bool = False) -> Generator[list[Choice]]:
    """Search the best launch of every Triton kernel that runs in this context, for the shapes that it runs with.

        with visattn.ops.tune() as report:
            model(images).sum().backward()

    What is found is used from then on, and kept in a file for later processes (see `visattn/ops/fused/README.md`).
    The first call of a kernel with new shapes takes seconds, for each config is compiled. The context holds for all
    threads, because autograd runs backward passes of CUDA tensors in threads of its own. A config decides in which
    order a kernel sums, so the last bits of results depend on it: in training on several GPUs let one process tune
    and save before the others start, or ship its file, rather than let every rank search by itself.

    Args:
        again: Measure also what a cache file already answers.

    Yields:
        A list that grows by a `Choice` for each kernel and shape class met: the config, and the times of it and of
        the default.
    """
    session = _Session(again)
    _sessions.append(session)
    try:
        yield session.report
    finally:
        _sessions.remove(session)
