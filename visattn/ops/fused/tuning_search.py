"""A search among the ways to launch a kernel: results first, then times."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UP = 3  # calls of each candidate before the timed ones
ROUNDS = 20  # timed calls of each candidate, one of each in turn
# Results of two candidates may differ by this much, norm-wise; the largest single difference by four times as much of
# the largest value, so that a wrong tile among thousands shows too.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
TOLERANCE_TF32 = 2e-3


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    Attributes:
        block_m: Rows a program holds.
        block_n: Rows it streams per step.
        num_warps, num_stages: As Triton names them.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


Run = Callable[[Config], tuple[Tensor, ...]]
_clock = time.perf_counter


@dataclass(frozen=True)
class Found:
    """The fastest config, the median milliseconds of all that were timed, and why the others were not."""

    best: Config
    median_ms: dict[Config, float]
    dropped: dict[Config, str]


def search(
    candidates: Sequence[Config], run: Run, device: torch.device, dtypes: Iterable[object]
) -> Found | None:
    """Time the candidates whose results agree with those of the first, the default.

    Args:
        dtypes: Names of dtypes that are computed in, beside those of the outputs; what is none is passed over.

    Returns:
        None if the default gives NaN, which says nothing about the others.

    Raises:
        torch.OutOfMemoryError: The device has no room for the results of two candidates.
        Exception: Whatever the default raises.
    """
    with (
        torch.no_grad(),
        torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext(),
    ):
        expected = run(candidates[0])
        if any(t.is_floating_point() and t.isnan().any() for t in expected):
            return None
        tolerance = _tolerance([*dtypes, *(t.dtype for t in expected)])
        timed, dropped = [candidates[0]], {}
        for config in dict.fromkeys(c for c in candidates if c != candidates[0]):
            try:
                reason = _difference(run(config), expected, tolerance)
            except Exception as error:
                # Of what does not fit the GPU. Compiler passes and the driver raise plain RuntimeErrors.
                is_known = isinstance(error, RuntimeError) or type(error).__module__.startswith(
                    "triton."
                )
                if not is_known or isinstance(error, torch.OutOfMemoryError):
                    raise
                reason = f"{type(error).__name__}: {error}"
            if reason is None:
                timed.append(config)
            else:
                dropped[config] = reason
        del expected
        runs = [functools.partial(run, config) for config in timed]
        medians = dict(zip(timed, _medians(runs, device), strict=True))
    return Found(min(medians, key=medians.__getitem__), medians, dropped)


def _tolerance(words: Iterable[object]) -> float:
    """That of the coarsest dtype among words: float32 outputs of bfloat16 inputs are as inexact as those."""
    table = dict(TOLERANCE)
    if torch.backends.cuda.matmul.allow_tf32:
        table["float32"] = TOLERANCE_TF32
    return max((table.get(str(word).removeprefix("torch."), 0.0) for word in words), default=0.0)


def _difference(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> str | None:
    """How results differ, or None if they agree. Infinities must be the same; NaN agrees with nothing."""
    if [(t.shape, t.dtype) for t in got] != [(t.shape, t.dtype) for t in expected]:
        return "outputs of other shapes or dtypes than the default's"
    for g, e in zip(got, expected, strict=True):
        if not e.is_floating_point():
            if not torch.equal(g, e):
                return "integers differ from the default's"
            continue
        if not e.numel():
            continue
        finite = e.isfinite()
        if not torch.equal(g[~finite], e[~finite]):
            return "infinities differ from the default's"
        wide = torch.promote_types(e.dtype, torch.float32)
        g, e = g.where(finite, 0), e.where(finite, 0)
        for order, bound in ((2, tolerance), (float("inf"), 4 * tolerance)):
            norm = functools.partial(torch.linalg.vector_norm, ord=order, dtype=wide)
            error = norm(g - e).item() / (norm(e).item() or 1.0)
            if not error <= bound:  # NaN fails too
                return f"results differ from the default's by {error:.1e} (norm {order}), more than {bound:.1e}"
    return None


def _medians(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Median milliseconds of every run, one call of each in turn so that drifts of the clock meet all alike."""
    time_call = CudaTimer() if device.type == "cuda" else _cpu_time
    for run in runs:
        for _ in range(WARM_UP):
            time_call(run)
    samples = [[time_call(run) for run in runs] for _ in range(ROUNDS)]
    return [statistics.median(column) for column in zip(*samples, strict=True)]


def _cpu_time(run: Callable[[], object]) -> float:
    start = _clock()
    run()
    return (_clock() - start) * 1e3


class CudaTimer:
    """Milliseconds of a call between two events, of the device alone.

    Before it the L2 cache is filled with other data by reading it (writing would leave lines that the call had to
    evict), and the device waits until the host has launched the call, so that it does not wait within it.
    """

    CLOCK = 2e9  # cycles per second, at least: for the wait
    WAIT = (1e-3, 20e-3)  # seconds, before the first call of a run and at most

    def __init__(self) -> None:
        cache = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0) or 64 << 20
        self._other = torch.zeros(cache, device="cuda")  # four times the cache
        self._sum = torch.zeros((), device="cuda")
        # Seconds that the host took to launch the last call of each run that is still in use.
        self.host_seconds = weakref.WeakKeyDictionary[Callable[[], object], float]()

    def __call__(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        last = self.host_seconds.get(run)
        wait = self.WAIT[0] if last is None else min(2 * last + 1e-4, self.WAIT[1])
        torch.sum(self._other, dim=0, out=self._sum)
        torch.cuda._sleep(int(wait * self.CLOCK))
        start.record()
        began = _clock()
        kept = run()
        self.host_seconds[run] = _clock() - began
        end.record()
        end.synchronize()
        del kept  # not within the call's time
        return start.elapsed_time(end)
