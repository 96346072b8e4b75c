"""Count what the attention kernels execute in published layers, and predict their times on a GPU that need not be here.

    python benchmarks/kernel_model.py                                     # all layers of LAYERS
    python benchmarks/kernel_model.py --cases na2d_56 --stages 3
    python benchmarks/kernel_model.py --state after --out benchmarks/results/kernels_model  # .json and .md

Launches are those of a forward and backward pass of cases of `op_cases` with the default configs, compiled for an H200.
The machine code of their loops times the trips of these gives the instructions; the prediction is the longest of

    issue    warp instructions / (4 schedulers * 132 multiprocessors * clock) / 0.65, the part of slots that is filled
    L2       bytes that programs read and write / 6.25 TB/s
    memory   bytes of the tensors, each once / 4.3 TB/s
    steps    programs that follow one another on a multiprocessor * their trips * 1500 cycles

The rates are guesses until a GPU has measured them. `op_floors` says what the floor is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import sass
import torch
from kernel_report import resources, warps_per_sm
from op_cases import CUDA_CASES, Case
from op_floors import Rates, floor
from report import number, show, version, write
from torch import Tensor

from visattn.ops.fused import support
from visattn.ops.fused.attention_call import Call
from visattn.ops.fused.launch import Launch, record

LAYERS = (
    *("na2d_56", "na2d_28", "na2d_14", "na2d_56_bias", "na2d_56_d8_bias", "window_56", "grid_56", "window_7"),
    *("halo_32", "halo_16", "routed_56_topk1", "routed_28_topk4", "routed_14_topk16", "aggregated_56"),
    *("agent_56_a9", "agent_dense_200x304_a9"),
)
CAPABILITY, PROCESSORS, CLOCK = 90, 132, 1.755e9
FILLED, L2_BYTES_PER_S, STEP_CYCLES = 0.65, 6.25e12, 1500
COLUMNS = (
    *("case", "pass", "kernel", "config", "registers", "stack", "programs", "trips", "instructions per step"),
    *("instructions per query", "MUFU per query", "waits", "L2 MB", "issue", "predicted", "limit", "floor", "ratio"),
)
ON_SCREEN = (0, 2, 8, 9, 11, 13, 14, 16, 17)
TEXT = """# What the attention kernels execute, and the times that a model predicts

Counted in machine code for an H200 that was compiled without one, by `{command}` ({setting}). One row per launch of a
forward and backward pass of the layers of `op_cases`, default configs. *config*: rows that a program holds x columns of
a step, warps, stages; *stack*: bytes of a thread, all that is not 0 is spilled; *trips* through each loop.
*instructions per step*: of a warp in each loop; *per query*: of all lanes, per query and head. *waits*: how many groups
of copies may fly on while the first loop computes; 0 is no overlap. *L2 MB*: read and written by the programs. Times
are in us: *issue* if every slot for an instruction were filled, *predicted* by `kernel_model.py`, *limit* what makes it
so long, *floor* of the whole pass (`op_floors.py`) and *ratio* of the sum of the pass's predictions to it, in the last
row of a pass. What PyTorch does around the kernels is not in it. Two values with an arrow are those before and after a
change.
Counts and a model: not measured on a GPU.
"""


@dataclass
class Row:
    """A launch; times in microseconds.

    Attributes:
        loops: Per loop of the machine code its instructions, and those for special functions.
        order: Per loop of Triton's GPU code its copies, products and waits (`sass.order`).
        has_tiles: Whether it reads a position tile.
        floor, ratio: Of the whole pass, in the row of its last launch.
    """

    triton: str
    kernel: str
    config: str
    registers: int
    stack: int
    shared: int
    programs: int
    trips: list[int]
    loops: list[tuple[int, int]]
    order: list[list[str]]
    has_tiles: bool
    instructions_per_query: float
    mufu_per_query: float
    l2_bytes: float
    issue: float
    alu: float
    mufu: float
    predicted: float
    limit: str
    floor: float | None = None
    ratio: float | None = None


@dataclass
class Place:
    """A launch of a pass, counted from 0, before and after a change."""

    case: str
    mode: str
    launch: int
    before: Row | None = None
    after: Row | None = None


def launches(case: Case) -> dict[str, list[Launch]]:
    """Of the forward and of the backward pass."""
    inputs = {name: x.requires_grad_() for name, x in case.fuse(case.inputs()).items()}
    with mock.patch.object(support, "can_run_tensors", return_value=None):  # recording needs no GPU
        with record() as forward:
            out = case.visattn("triton")(**inputs)
        with record() as backward:
            torch.autograd.grad(out, list(inputs.values()), torch.zeros_like(out))
    found = {"forward": forward, "backward": backward}
    return {mode: [x for x in found[mode] if "BLOCK_M" in x.arguments] for mode in found}


def flat(arguments: Any, path: str = "") -> dict[str, Any]:
    """Arguments of a kernel by name, those in groups as "group.name"."""
    found: dict[str, Any] = {}
    for name, x in arguments.items():
        found |= flat(x._asdict(), f"{path}{name}.") if hasattr(x, "_asdict") else {f"{path}{name}": x}
    return found


# Per kernel the maps of which a program reads or writes its rows, and those of which it reads columns.
KEYS, QUERIES = ("k", "v"), ("q", "do", "mask.rel_pos")
MAPS = {
    "forward": (("q", "out.o", "mask.rel_pos"), KEYS),
    "queries_backward": ((*QUERIES, "saved.o", "grads.dq", "grads.drel_pos"), KEYS),
    "keys_backward": ((*KEYS, "grads.dk", "grads.dv"), QUERIES),
    "tiles_backward": (("q", "do"), KEYS),
    "extra_backward": (("extra.k", "extra.v"), QUERIES),
    "extra_bias_backward": (QUERIES, ("extra.k", "extra.v")),
}
NUMBERS = 3 * 4  # bytes: a query's lse and delta, and its token


class Work:
    """How often a recorded launch goes through its loops, and which bytes its programs ask L2 for."""

    def __init__(self, launch: Launch) -> None:
        self.kernel = launch.kernel.__name__.removesuffix("_kernel")
        self.programs = math.prod(launch.programs)
        self.arguments = flat(launch.arguments)
        self.rows, self.columns = (self.arguments[name] for name in ("BLOCK_M", "BLOCK_N"))

    def __call__(self, name: str) -> Any:
        return self.arguments.get(name)

    def token_bytes(self, maps: Sequence[str]) -> int:
        """Of a token and head of maps, those that there are."""
        found = [x for x in (self(f"{name}.ptr") for name in maps) if x is not None]
        return sum(x.shape[-1] * x.element_size() for x in found) + NUMBERS

    @property
    def listed(self) -> int:
        """Regions that a program streams, 1 if they are not listed."""
        if not self("META.SEGMENT"):
            return 1
        return self("listed.topk") or -(-self("listed.indices").shape[2] // len(self("mask.rows")))

    def trips(self) -> list[int]:
        """Through each loop."""
        if self.kernel == "tiles_backward":
            return [round(float((self("parts.parts")[:, 3] - self("parts.parts")[:, 2]).float().mean()))]
        if self.kernel == "extra_backward":
            return [math.ceil(math.ceil(self("sizes.queries") / self.columns) / self("splits"))]
        if self.kernel == "extra_bias_backward":
            return [math.ceil(self("sizes.images") / self("groups"))]
        extra = [math.ceil(self("sizes.extra") / self("META.EXTRA"))] if self("extra.k.ptr") is not None else []
        splits = self("sizes.splits") if self("META.SPLIT") else 1
        return [math.ceil(math.ceil(self.listed * self("mask.columns_number") / self.columns) / splits), *extra]

    def columns_of(self, together: int, copied: bool) -> float:
        """That exist of so many tiles, on average. Plain loads find those of several tiles in L1, copies never look."""
        columns = self("mask.columns")
        if together > 1 and not copied:
            groups = [set(group.flatten().tolist()) for group in columns.split(together)]
            return sum(len(group - {-1, -2}) for group in groups) / len(groups)
        return together * float((columns >= 0).sum()) / len(columns)

    def l2_bytes(self, copied: bool) -> float:
        """Read and written by all programs, of rows and columns that exist; position tiles with their padding.

        `copied`: by asynchronous copies to shared memory.
        """
        held, streamed = (self.token_bytes(maps) for maps in MAPS[self.kernel])
        trips, extra = self.trips(), self("sizes.extra") or 0
        bias = 0 if self("extra.bias") is None else self("extra.bias").element_size()  # of a query and an extra key
        if self.kernel == "extra_backward":
            rows, columns = min(self.rows, extra), trips[0] * self.columns
            return self.programs * (2 * rows * held + columns * (streamed + rows * bias))  # sums in 4 bytes
        if self.kernel == "extra_bias_backward":
            rows, columns = min(self.rows, self("sizes.queries")), min(self.columns, extra)
            pairs = rows * columns
            return self.programs * (trips[0] * (rows * held + columns * streamed + pairs * bias) + 4 * pairs)
        tiles, m = self("mask.rows").shape
        together = self("META.TILES")  # held by a program, each with its columns
        rows = together * float((self("mask.rows") >= 0).sum()) / tiles / math.ceil(m / self.rows)
        columns = self.listed * self.columns_of(together, copied) / (self("sizes.splits") if self("META.SPLIT") else 1)
        if self.kernel == "tiles_backward":
            columns /= math.ceil(self("mask.columns_number") / self.columns)
            pairs = self.rows * self.columns * (4 + self("mask.tiles").element_size())
            return self.programs * (trips[0] * (rows * held + columns * streamed) + pairs)
        numbers = rows * held + columns * streamed + extra * (self.token_bytes(("extra.k", "extra.v")) + rows * bias)
        if self("mask.tiles") is not None:
            numbers += together * self.rows * trips[0] * self.columns * self("mask.tiles").element_size()
        if self("mask.hidden") is not None:
            lanes = self("META.LANES") * self("mask.hidden").element_size()
            numbers += (together * self.rows + trips[0] * self.columns) * lanes
        return self.programs * numbers

    def memory_bytes(self) -> int:
        """Of all tensors, each once."""
        return sum(x.numel() * x.element_size() for x in self.arguments.values() if isinstance(x, Tensor))


def modeled(case: Case, launch: Launch, program: Any) -> Row:
    work, warps = Work(launch), launch.num_warps
    tiles = f"{work('META.TILES')} x " if work("META.TILES") > 1 else ""
    code, trips = sass.parse(sass.disassemble(program.asm["cubin"])), work.trips()
    if len(code.loops) > len(trips):
        raise ValueError(f"expected {len(trips)} loops in {work.kernel} of {case.name}, got {len(code.loops)}")
    counts = code.executed(trips)
    registers, stack = resources(program.asm["cubin"])
    if registers is None or stack is None:
        raise ValueError("expected Triton with its cuobjdump, got one without; try the wheels of PyPI")
    resident = warps_per_sm(registers, program.metadata.shared, warps, CAPABILITY) // warps
    issue, alu, mufu = (n * warps * work.programs / (4 * PROCESSORS * CLOCK) * 1e6 for n in sass.cycles(counts))
    l2_bytes = work.l2_bytes("async_copy_global_to_local" in program.asm["ttgir"])
    limits = {
        "issue": issue / FILLED,
        "L2": l2_bytes / L2_BYTES_PER_S * 1e6,
        "memory": work.memory_bytes() / Rates().bytes_per_s * 1e6,
        "steps": max(1.0, work.programs / PROCESSORS / resident) * sum(trips) * STEP_CYCLES / CLOCK * 1e6,
    }
    limit = max(limits, key=limits.__getitem__)
    lanes = 32 * warps * work.programs / (case.batch * case.tokens() * case.heads)
    return Row(
        version("triton"),
        work.kernel,
        f"{tiles}{work.rows}x{work.columns} w{warps} s{launch.num_stages}",
        registers,
        stack,
        program.metadata.shared,
        work.programs,
        trips,
        [(loop.size, sass.named(loop.counts, "MUFU")) for loop in code.loops],
        sass.order(program.asm["ttgir"]),
        work("mask.tiles") is not None,
        lanes * counts.total(),
        lanes * sass.named(counts, "MUFU"),
        l2_bytes,
        issue,
        alu,
        mufu,
        limits[limit],
        limit,
    )


def floor_of(case: Case, mode: str) -> float:
    """Microseconds of a pass."""
    forward = floor(case, "forward", Rates())
    return 1e6 * (forward if mode == "forward" else floor(case, "both", Rates()) - forward)


def waits(row: Row) -> str:
    """The fewest groups of copies that any wait of the first loop lets fly on; empty without copies."""
    found = [int(event.split()[1]) for event in (row.order or [[]])[0] if event.startswith("wait")]
    return str(min(found)) if found else ""


def cells(row: Row) -> list[str]:
    return [
        row.kernel.replace("_", " "),
        row.config,
        *(str(n) for n in (row.registers, row.stack, row.programs)),
        "+".join(str(n) for n in row.trips),
        "+".join(str(n) for n, _ in row.loops),
        *(number(n, ".0f") for n in (row.instructions_per_query, row.mufu_per_query)),
        waits(row),
        *(number(n, ".0f") for n in (row.l2_bytes / 1e6, row.issue, row.predicted)),
        row.limit,
        number(row.floor, ".1f"),
        number(row.ratio),
    ]


def compared(place: Place) -> list[str]:
    """A row of the table."""
    found = [cells(row) for row in (place.before, place.after) if row is not None]
    return [place.case, place.mode, *(" -> ".join(dict.fromkeys(cell)) for cell in zip(*found, strict=True))]


def earlier(out: Path, state: str) -> dict[tuple[str, str, int], Place]:
    """The launches in `out`, without what there is of a state."""
    file, found = out.with_suffix(".json"), {}
    for entry in json.loads(file.read_text())["results"] if file.exists() else []:
        rows = {x: entry[x] and Row(**entry[x]) for x in ("before", "after")} | {state: None}
        if any(rows.values()):
            place = Place(entry["case"], entry["mode"], entry["launch"], **rows)
            found[place.case, place.mode, place.launch] = place
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known, modes = {case.name: case for case in CUDA_CASES}, ("forward", "backward")
    parser.add_argument("--cases", nargs="+", default=LAYERS, choices=known)
    parser.add_argument("--modes", nargs="+", default=modes, choices=modes)
    parser.add_argument("--alone", action="store_true", help="tiles of any size one at a time, none held together")
    parser.add_argument("--stages", type=int, help="of the software pipeline, in place of the default config's")
    parser.add_argument(
        "--state", default="after", choices=("before", "after"), help="of a change; OUT keeps the other"
    )
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    args = parser.parse_args(argv)
    if support.is_interpreting():
        print("expected kernels that can be compiled, got interpreted ones; try without TRITON_INTERPRET", flush=True)
        return 2
    os.environ["VISATTN_TUNE"] = "off"
    if args.alone:
        Call.few = False  # pyrefly: ignore[bad-assignment]: of this process
    places = earlier(args.out, args.state) if args.out else {}
    programs: dict[tuple, Any] = {}
    for case in (known[name] for name in args.cases):
        for mode, found in launches(case).items():
            if mode not in args.modes:
                continue
            rows = []
            for launch in found:
                chosen = launch._replace(num_stages=args.stages or launch.num_stages)
                if chosen.key not in programs:
                    programs[chosen.key] = chosen.compile(CAPABILITY)
                rows.append(modeled(case, chosen, programs[chosen.key]))
            rows[-1].floor = floor_of(case, mode)
            rows[-1].ratio = sum(row.predicted for row in rows) / rows[-1].floor
            for i, row in enumerate(rows):
                place = places.setdefault((case.name, mode, i), Place(case.name, mode, i))
                setattr(place, args.state, row)
    results = list(places.values())
    show(results, [COLUMNS[i] for i in ON_SCREEN], lambda x: [compared(x)[i] for i in ON_SCREEN], "H200, not measured")
    if args.out:
        setting = {"triton": version("triton")}
        write(results, COLUMNS, compared, TEXT, "kernel_model.py", argv, args.out, setting)
    return 0


if __name__ == "__main__":
    sys.exit(main())
