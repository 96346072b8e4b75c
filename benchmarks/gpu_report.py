"""The results of `bench_ops.py` on a GPU: their columns, their files, and how they compare with the goals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import op_floors
import report
import torch
from bench_device import slug
from op_cases import CUDA_CASES, Case
from op_floors import Rates
from report import number

TRITON = "visattn triton"
FORWARD, BOTH = "forward", "forward+backward"


@dataclass
class GpuResult:
    """One row. Times in milliseconds; `host_ms` is what the host takes to launch a call, `first_s` the first call."""

    case: str
    mode: str
    provider: str
    error: float | None = None
    median_ms: float | None = None
    calls: int = 0
    gb_per_s: float | None = None
    times_triton: float | None = None
    floor_ms: float | None = None
    times_floor: float | None = None
    peak_mb: float | None = None
    host_ms: float | None = None
    first_s: float | None = None
    note: str = ""


def rate(results: Sequence[GpuResult], case: Case, mode: str, rates: Rates) -> None:
    """Fill in what follows from the medians of one case and mode."""
    ours = next((r.median_ms for r in results if r.provider == TRITON), None)
    for r in results:
        if r.median_ms:
            r.gb_per_s = op_floors.useful_bytes(case, mode) / r.median_ms / 1e6
            r.floor_ms = op_floors.floor(case, mode, rates) * 1e3
            r.times_floor = r.median_ms / r.floor_ms
            r.times_triton = r.median_ms / ours if ours else None


COLUMNS = (
    "case",
    "mode",
    "provider",
    "us",
    "GB/s",
    "x triton",
    "x floor",
    "peak MB",
    "host us",
    "first s",
    "error",
    "note",
)


def row(r: GpuResult) -> list[str]:
    def us(ms: float | None) -> float | None:
        return None if ms is None else ms * 1e3

    times = [number(us(r.median_ms), ".1f"), number(r.gb_per_s, ".0f"), number(r.times_triton), number(r.times_floor)]
    rest = [number(r.peak_mb, ".1f"), number(us(r.host_ms), ".0f"), number(r.first_s, ".1f"), number(r.error, ".0e")]
    return [r.case, r.mode, r.provider, *times, *rest, r.note.replace("|", "/")]


TEXT = """# Ops on a GPU

`{command}` ({setting}).

- `us`: GPU time of a call with a cold cache, median of interleaved calls. Kernels are launched before the clock starts:
  what the host takes for that is `host us`.
- `GB/s`: q, k, v and out over that time; with the backward pass 12 such tensors (`benchmarks/op_floors.py`).
- `x triton`: how many times as long as visattn's Triton kernels in the same run.
- `x floor`: how many times as long as the longest of bytes, products and exponentials at the rates above
  (`benchmarks/op_floors.py`).
- `peak MB`: memory above the inputs. `first s`: the first call in this process, with whatever is compiled in it.
- `error`: norm-wise against float64, of outputs and all gradients, on the first and the last image. What differs by
  more than 3e-2 (bfloat16) is not timed.

Maps are bfloat16, parameters float32; q, k and v are views of one projection. Cases and providers are in
`benchmarks/op_cases/`.
"""


@dataclass(frozen=True)
class Goal:
    """A limit on a figure of visattn's Triton kernels, for some cases in one mode.

    `figure(find, case, mode)` is the figure, or why there is none; `find(case, mode, provider)` a result.
    """

    text: str
    cases: tuple[str, ...]
    mode: str
    limit: float
    at_most: bool
    figure: Callable[[Any, str, str], float | str]


def _missing(result: GpuResult | None, name: str) -> str:
    return f"{name}: {result.note if result and result.note else 'not in this run'}"


def _over(*providers: str, inverse: bool = False) -> Callable[[Any, str, str], float | str]:
    """Our time over the best of these providers', or the reverse."""

    def figure(find: Any, case: str, mode: str) -> float | str:
        ours = find(case, mode, TRITON)
        if ours is None or not ours.median_ms:
            return _missing(ours, TRITON)
        found = [find(case, mode, provider) for provider in providers]
        times = [r.median_ms for r in found if r is not None and r.median_ms]
        if not times:
            return _missing(found[0], providers[0])
        return min(times) / ours.median_ms if inverse else ours.median_ms / min(times)

    return figure


def _bias_over_plain(find: Any, case: str, mode: str) -> float | str:
    with_bias, plain = find(f"{case}_bias", mode, TRITON), find(case, mode, TRITON)
    for result in (with_bias, plain):
        if result is None or not result.median_ms:
            return _missing(result, TRITON)
    return with_bias.median_ms / plain.median_ms


def _of_copy(rates: Rates) -> Callable[[Any, str, str], float | str]:
    def figure(find: Any, case: str, mode: str) -> float | str:
        ours = find(case, mode, TRITON)
        return ours.gb_per_s * 1e9 / rates.bytes_per_s if ours and ours.gb_per_s else _missing(ours, TRITON)

    return figure


def all_goals(rates: Rates) -> Iterator[Goal]:
    """Those that the kernels were built for."""
    near = ("na2d_56", "na2d_28", "na2d_14")
    dilated = ("na2d_56_d8_bias", "na2d_28_d4_bias", "na2d_14_d2_bias")
    windows = tuple(f"{kind}_{n}" for n in (56, 28, 14, 7) for kind in ("window", "grid"))
    natten = tuple(f"natten {name}" for name in ("cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna"))
    flex, parted = "FlexAttention compiled", "SDPA, x partitioned"
    for mode, limit in ((FORWARD, 0.6), (BOTH, 0.7)):
        yield Goal("time over the best of natten", near, mode, limit, True, _over(*natten))
    for mode in (FORWARD, BOTH):
        yield Goal("time over FlexAttention", near, mode, 0.4, True, _over(flex))
        yield Goal("time with a bias over time without", near, mode, 1.15, True, _bias_over_plain)
        yield Goal("time over partition, SDPA, reverse", (*windows, *dilated), mode, 0.5, True, _over(parted))
    yield Goal("part of copy bandwidth", windows, FORWARD, 0.55, False, _of_copy(rates))
    routed = ("routed_56_topk1", "routed_28_topk4", "routed_14_topk16")
    faster = [(routed, "official gather", (3, 5)), (("halo_32", "halo_16"), "timm HaloAttn", (4, 4))]
    faster.append((("aggregated_56", "aggregated_28", "aggregated_14"), "official unfold", (2, 2)))
    for cases, provider, limits in faster:
        for mode, limit in zip((FORWARD, BOTH), limits, strict=True):
            yield Goal(f"times faster than {provider}", cases, mode, limit, False, _over(provider, inverse=True))


def verdict(goal: Goal, figure: float | str) -> tuple[str, str]:
    """The figure, and what it means."""
    if isinstance(figure, str):
        return "", f"not measured: {figure}"
    excess = figure / goal.limit - 1 if goal.at_most else 1 - figure / goal.limit
    return f"{figure:.2f}", "met" if excess <= 0 else f"missed by {excess:.0%}"


def acceptance(results: Sequence[GpuResult], rates: Rates) -> str:
    """Every goal, whether it is met and by how much it is missed, as a table."""
    table = {(r.case, r.mode, r.provider): r for r in results}

    def find(*key: str) -> GpuResult | None:
        whole = table.get((*key[:2], "all"))  # a case without providers says why
        return table.get(key, whole)

    lines = ["", "## Goals", "", "| goal | limit | case | mode | measured | verdict |", "|---|---|---|---|---|---|"]
    for goal in all_goals(rates):
        limit = f"{'<=' if goal.at_most else '>='} {goal.limit:g}"
        for case in goal.cases:
            cells = verdict(goal, goal.figure(find, case, goal.mode))
            lines.append("| " + " | ".join([goal.text, limit, case, goal.mode, *cells]).replace("\n", " ") + " |")
    return "\n".join(lines)


class Run:
    """The results of a run on one GPU, with those of earlier runs that are to be kept."""

    def __init__(self, device: Any, out: Path | None, update: bool, argv: Sequence[str] | None) -> None:
        root = Path(__file__).parent / "results"
        self.out = out or root / slug(device.name) / "bench_ops"
        self.argv = argv
        self.rates = device.rates()
        self.setting = {
            "GPU": device.name,
            "CUDA": str(torch.version.cuda),
            "triton": report.version("triton"),
            "natten": report.version("natten"),
            "copy": f"{self.rates.bytes_per_s / 1e12:.2f} TB/s",
            "product": f"{self.rates.flops_per_s / 1e12:.0f} TFLOP/s",
            "exponentials": f"{self.rates.exps_per_s / 1e12:.2f} T/s",
        }
        print(", ".join(f"{name} {value}" for name, value in self.setting.items()), flush=True)
        self.kept = [GpuResult(**r) for r in report.earlier(self.out, self.setting)] if update else []
        self.new: list[GpuResult] = []

    def results(self) -> list[GpuResult]:
        """In the order of the cases."""
        order = {case.name: i for i, case in enumerate(CUDA_CASES)}
        return sorted([*self.kept, *self.new], key=lambda r: (order.get(r.case, len(order)), r.mode != FORWARD))

    def add(self, case: Case, mode: str, results: Sequence[GpuResult], write: bool = True) -> None:
        """Take the results of a case and mode, and write all files anew. An empty case does not replace a full one."""
        rate(results, case, mode, self.rates)
        now = (case.name, mode)
        again = {r.provider for r in results}
        self.new = [r for r in self.new if (r.case, r.mode) != now or r.provider not in again]
        self.new += results
        measured = [r for r in self.kept if (r.case, r.mode) == now and r.median_ms]
        if measured and not any(r.median_ms for r in results):
            self.new = [r for r in self.new if (r.case, r.mode) != now]
        else:
            self.kept = [r for r in self.kept if (r.case, r.mode) != now]
        if write:
            report.write(
                self.results(), COLUMNS, row, TEXT, "bench_ops.py", self.argv, self.out, self.setting, self.goals()
            )

    def goals(self) -> str:
        return acceptance(self.results(), self.rates)
