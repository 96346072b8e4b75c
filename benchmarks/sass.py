"""What compiled kernels are made of: machine code of NVIDIA GPUs per loop, and the copies that fly during a step.

Machine code comes from the `nvdisasm` that ships with Triton, so no GPU is needed. A loop is what a backward branch
spans; instructions behind a branch that is seldom taken are counted as executed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Cycles that a warp's instruction takes of a scheduler's units besides the one in which it is issued: 16 lanes of
# arithmetic with integers and comparisons, 4 of special functions. 32 lanes of floating-point products are hidden.
ALU, MUFU = 2, 8
_ALU = re.compile(
    r"BMSK|CS2R|F2FP|FCHK|FMNMX3?|FSETP?|FSEL|HMNMX2|HSETP2|I2FP|IABS|IADD3|IMNMX|ISETP|LEA|LOP3|MOV|P2R|PLOP3|PRMT|R2P"
    r"|SEL|SGXT|SHF|VABSDIFF|VIADD|VIADDMNMX|VIMNMX3?"
)
_MUFU = re.compile(r"MUFU|F2I|I2F|POPC|FLO")
_LABEL = re.compile(r"\s*(\.L\w+):")
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")
_TARGET = re.compile(r"`\((\.L\w+)\)")


@dataclass(frozen=True)
class Loop:
    """Instructions that a backward branch repeats, and how many of each there are; those of inner loops are the inner
    loops' own."""

    first: int
    last: int
    counts: Counter[str]

    @property
    def size(self) -> int:
        return self.counts.total()


@dataclass(frozen=True)
class Code:
    """A kernel: what runs once, and its loops in the order in which they stand."""

    once: Counter[str]
    loops: tuple[Loop, ...]

    def executed(self, trips: Sequence[int]) -> Counter[str]:
        """Instructions of a warp, with so many trips of each loop, the last number for all that follow."""
        found = Counter(self.once)
        for i, loop in enumerate(self.loops):
            n = trips[min(i, len(trips) - 1)] if trips else 1
            found.update({name: n * count for name, count in loop.counts.items()})
        return found


def disassemble(cubin: bytes) -> str:
    """The machine code as text."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(program), "-c", file.name], capture_output=True, text=True, check=True).stdout


def parse(text: str) -> Code:
    """Loops and counts of what `disassemble` returns."""
    found: list[tuple[int, str, str]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif part := _LINE.search(line):
            address = int(part[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
            found.append((address, part[2], part[3]))
    while found and (found[-1][1] in ("NOP", "BRA")):  # behind the end
        found.pop()
    spans: dict[int, int] = {}
    for address, name, arguments in found:
        target = _TARGET.search(arguments) if name.startswith("BRA") else None
        start = labels.get(target[1], address) if target else address
        if start < address:
            spans[start] = max(address, spans.get(start, 0))
    inner = sorted(spans.items(), key=lambda span: span[1] - span[0])
    counts: list[Counter[str]] = [Counter() for _ in inner]
    once: Counter[str] = Counter()
    for address, name, _ in found:
        owner = next((i for i, (first, last) in enumerate(inner) if first <= address <= last), None)
        (once if owner is None else counts[owner])[name] += 1
    loops = (Loop(first, last, counts[i]) for i, (first, last) in enumerate(inner))
    return Code(once, tuple(sorted(loops, key=lambda loop: loop.first)))


def named(counts: Counter[str], *prefixes: str) -> int:
    """How many instructions begin with one of these, as "MUFU.EX2"."""
    return sum(n for name, n in counts.items() if name.startswith(prefixes))


def cycles(counts: Counter[str]) -> tuple[int, int, int]:
    """Cycles that a warp's instructions take of a scheduler, of its integer units and of its special function units."""
    alu, mufu = (sum(n for name, n in counts.items() if names.fullmatch(name.split(".")[0])) for names in (_ALU, _MUFU))
    return counts.total(), ALU * alu, MUFU * mufu


_EVENTS = {
    "wait": r"async_wait .*num = (\d+)",
    "copy": r"async_copy_global_to_local|async_tma_copy_global_to_local",
    "load": r"tt\.load",
    "dot": r"warp_group_dot |tt\.dot |tc_gen5_mma ",
}


def order(ttgir: str) -> list[list[str]]:
    """Per loop of Triton's GPU code its copies, loads, products and waits, as ["wait 2", "dot", "copy"].

    "wait n" lets the last n groups of copies fly on: with "wait 0" none overlaps what follows.
    """
    loops: list[list[str]] = []
    depth: list[tuple[int, list[str]]] = []  # indentation of the open loops and their events
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if depth and indent <= depth[-1][0] and line.strip():
            depth.pop()
        if "scf.for" in line:
            depth.append((indent, []))
            loops.append(depth[-1][1])
        elif depth:
            for name, pattern in _EVENTS.items():
                if event := re.search(pattern, line):
                    depth[-1][1].append(" ".join([name, *event.groups()]))
    return loops
