"""Where a benchmark runs: how a call is timed, how much memory it takes, and what the device can do at best."""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from op_floors import Rates
from torch.profiler import profile

from visattn.ops.fused.tuning_search import CudaTimer

T = TypeVar("T")
NO_CUDA = "no CUDA device: not measured"


def peak_bytes(run: Callable[[], object]) -> int:
    """What the CPU allocator held at most during a call, above what it held before."""
    with profile(profile_memory=True) as profiler:
        kept = run()
    del kept
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Cpu:
    """One thread, in CPU seconds of this process, so that other load on the machine shows little."""

    torch_device = torch.device("cpu")
    is_gpu = False

    def seconds(self, run: Callable[[], object]) -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    def peak_bytes(self, run: Callable[[], object]) -> int:
        return peak_bytes(run)

    def poison(self) -> None:
        """Make uninitialised memory show."""

    def host_seconds(self, run: Callable[[], object]) -> float | None:
        """What the host took to launch the last call, where that is not part of its time."""
        return None

    def synchronize(self) -> None:
        pass

    def forget(self) -> None:
        """Between two cases: what compilers and the allocator keep."""


CPU = Cpu()


def slug(name: str) -> str:
    """The folder of a GPU's results: nvidia_h200 for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


class Cuda(Cpu):
    """The current GPU, timed as the tuner does; what the host took to launch a call is kept as `host_seconds`."""

    is_gpu = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.name = properties.name
        self.processors = properties.multi_processor_count
        self._timer = CudaTimer()

    def seconds(self, run: Callable[[], object]) -> float:
        return self._timer(run) / 1e3

    def host_seconds(self, run: Callable[[], object]) -> float | None:
        return self._timer.host_seconds.get(run)

    def peak_bytes(self, run: Callable[[], object]) -> int:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        self.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before

    def poison(self) -> None:
        """Fill memory that the allocator will hand out next with NaN, so that an output left unwritten shows."""
        blocks = [torch.full((size,), float("nan"), device=self.torch_device) for size in (1 << 18, 1 << 22, 1 << 30)]
        del blocks

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def forget(self) -> None:
        torch._dynamo.reset()  # which gives up on a function after a few recompilations, over all cases together
        torch.cuda.empty_cache()

    def rates(self) -> Rates:
        """Copy bandwidth, bytes read and written, and rate of a bfloat16 product, measured; exponentials counted."""
        source, target = (torch.rand(1 << 29, device=self.torch_device) for _ in range(2))  # 2 GiB each
        a, b = (torch.randn(8192, 8192, device=self.torch_device, dtype=torch.bfloat16) for _ in range(2))
        copy, product = self._median(lambda: target.copy_(source)), self._median(lambda: a @ b)
        clock = 1.755e9
        return Rates(2 * source.nbytes / copy, 2 * 8192**3 / product, 16 * self.processors * clock)

    def _median(self, run: Callable[[], object]) -> float:
        for _ in range(3):
            run()
        return statistics.median(self.seconds(run) for _ in range(10))


def captured(run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A call as a CUDA graph, and what it returned: tensors that each replay writes again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph, found


def open_device(name: str) -> Cpu:
    """The device of that name; ends the program with status 2 where there is no GPU."""
    if name == "cpu":
        return Cpu()
    if not torch.cuda.is_available():
        print(NO_CUDA, file=sys.stderr)
        raise SystemExit(2)
    return Cuda()
