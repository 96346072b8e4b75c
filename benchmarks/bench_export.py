"""Export a small model of every family to every target, each in a process of its own, and measure the files.

python benchmarks/bench_export.py --out docs/export
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import report
import timm
import torch

import visattn
from visattn.export import TARGETS, ExportError, Report, export, load
from visattn.export.program import DYNAMIC

TEXT = """# What exports where

`{command}` ({setting}). Small models of all families, random weights, exported at {{size}} px; "batch" has a dynamic
batch, "size" a dynamic batch, height and width in one file. Every file was run and compared with PyTorch before it got
its name: at its size, with batches of 1, 2 and 3, or at five sizes with batches of 1 to 3; "error" is the largest
|file - PyTorch| / |PyTorch| among them, "CPU s" the time of tracing, converting and verifying. Speed is CPU time of one
thread for one image, medians of interleaved calls: how many times faster the file is than eager PyTorch, and than
`torch.compile`d PyTorch. What a target refuses is in the last column, in its words. ExecuTorch takes fixed sizes alone,
as it plans its memory when it exports. What is not in the table has not been measured.
"""
COLUMNS = "model", "target", "dynamic", "error", "MB", "CPU s", "x eager", "x compiled", "note"
SIZE, CALLS = (160, 192), 9


@dataclass
class Cell:
    """A model exported to a target, or compiled, with some sizes dynamic."""

    model: str
    target: str
    dynamic: str
    error: float | None = None
    megabytes: float | None = None
    seconds: float | None = None
    times_eager: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.model, self.target, self.dynamic


def _cpu_seconds() -> float:
    """Of this process and of those that it started and that ended: compilers, for one."""
    return sum(os.times()[:4])


def _times_eager(model: torch.nn.Module, run) -> float:
    """How many times faster `run` is than the model, for one image."""
    image, ratios = torch.randn(1, 3, *SIZE), []
    for _ in range(CALLS + 1):
        seconds = []
        for call in (model, run):
            start = time.process_time()
            call(image)
            seconds.append(time.process_time() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])


@torch.no_grad()
def measure(cell: Cell) -> Cell:
    """Fill a cell in."""
    torch.set_num_threads(1)
    model = timm.create_model(cell.model).eval()
    if cell.target == "compile":
        start, dynamic = _cpu_seconds(), {"none": False, "batch": None, "size": True}[cell.dynamic]
        compiled = torch.compile(model, dynamic=dynamic)
        for batch in (1, 2) if cell.dynamic == "batch" else (1,):
            compiled(torch.randn(batch, 3, *SIZE))
        cell.seconds, cell.times_eager = _cpu_seconds() - start, _times_eager(model, compiled)
        return cell
    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder) / f"model{TARGETS[cell.target].suffix}", _cpu_seconds()
        try:
            found: Report = export(model, path, cell.target, dynamic=cell.dynamic, image_size=SIZE)
        except (ExportError, ValueError, ImportError) as error:
            cell.note = str(error).replace("|", "/").replace("\n", " ")[:300]
            return cell
        cell.error, cell.megabytes, cell.seconds = max(found.errors.values()), found.size / 1e6, _cpu_seconds() - start
        cell.note, cell.times_eager = found.said, _times_eager(model, load(path, cell.target))
    return cell


def in_process(cell: Cell, limit: float) -> Cell:
    """Fill a cell in, in a process that may crash or end after `limit` seconds."""
    command = [sys.executable, __file__, "--cell", *cell.key]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        cell.note = f"no file within {limit:.0f} s"
        return cell
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"model"')]
    if not lines:
        cell.note = f"the process ended with {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"[:300]
        return cell
    return Cell(**json.loads(lines[-1]))


def _row(cells: dict[tuple[str, str, str], Cell], cell: Cell) -> list[str]:
    compiled = cells.get((cell.model, "compile", cell.dynamic))
    both = cell.times_eager and compiled and compiled.times_eager
    ratio = report.number(cell.times_eager / compiled.times_eager) if both else ""
    return [
        *cell.key,
        report.number(cell.error, ".1e"),
        report.number(cell.megabytes, ".1f"),
        report.number(cell.seconds, ".0f"),
        report.number(cell.times_eager),
        ratio if cell.target != "compile" else "",
        cell.note,
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="files without suffix; what they hold of this torch is kept")
    parser.add_argument("--models", nargs="+", default=visattn.list_models("test_*"))
    parser.add_argument("--targets", nargs="+", default=["compile", *TARGETS])
    parser.add_argument("--dynamic", nargs="+", default=DYNAMIC)
    parser.add_argument("--limit", type=float, default=900, help="seconds for one file")
    parser.add_argument("--again", action="store_true", help="measure what is there already too")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cell:
        print(json.dumps(asdict(measure(Cell(*args.cell)))))
        return
    kept = [] if args.out is None else [Cell(**values) for values in report.earlier(args.out, {})]
    cells = {cell.key: cell for cell in kept}
    row, text = functools.partial(_row, cells), TEXT.replace("{{size}}", "x".join(map(str, SIZE)))
    for target in args.targets:
        for dynamic in args.dynamic:
            for model in args.models:
                key = model, target, dynamic
                refused = target in TARGETS and TARGETS[target].only_fixed and dynamic != "none"
                if refused or (key in cells and not args.again):
                    continue
                cells[key] = in_process(Cell(*key), args.limit)
                print(*row(cells[key]), flush=True)
                if args.out is not None:
                    order = sorted(cells.values(), key=lambda cell: cell.key)
                    report.write(order, COLUMNS, row, text, "bench_export.py", argv, args.out)


if __name__ == "__main__":
    main()
