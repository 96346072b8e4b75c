"""Write the GPU section of every op's README from benchmarks/results/<gpu>/bench_ops.json.

python benchmarks/gpu_tables.py          # after benchmarks/bench_ops.py --device cuda
python benchmarks/gpu_tables.py --check  # only say which READMEs differ, with status 1
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gpu_report import GpuResult
from op_cases import CUDA_CASES, OPS, op_of
from report import number

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEADING, NEXT = "## On a GPU\n", "## Tracing\n"


def readme(op: str) -> Path:
    return ROOT / "visattn" / "ops" / op / "README.md"


def section(op: str, records: dict[str, Any]) -> str:
    """The section with its heading; `records` are the contents of result files by the names of their folders."""
    parts = [HEADING]
    cases = {case.name for case in CUDA_CASES if op_of(case) == op}
    for folder, record in records.items():
        results = [r for r in (GpuResult(**r) for r in record["results"]) if r.case in cases]
        if not results:
            continue
        setting = ", ".join(f"{name} {record['setting'][name]}" for name in ("torch", "triton", "natten", "copy"))
        link = f"../../../benchmarks/results/{folder}/bench_ops.md"
        parts.append(f"{record['setting']['GPU']} ({setting}); [all columns and what they mean]({link}).\n")
        parts.append("\n".join(table(results)) + "\n")
    if len(parts) == 1:
        measure = f"`python benchmarks/bench_ops.py --device cuda --ops {op}`"
        parts.append(
            f"Not measured. {measure} measures,\nand `python benchmarks/gpu_tables.py` writes the table here.\n"
        )
    return "\n".join(parts)


def table(results: list[GpuResult]) -> list[str]:
    lines = ["| case | mode | provider | us | GB/s | x triton | x floor |", "|---|---|---|---:|---:|---:|---:|"]
    for r in results:
        us = f"{r.median_ms * 1e3:.1f}" if r.median_ms else f"not measured: {r.note}".replace("|", "/")
        figures = [us, number(r.gb_per_s, ".0f"), number(r.times_triton), number(r.times_floor)]
        lines.append("| " + " | ".join([r.case, r.mode, r.provider, *figures]) + " |")
    return lines


def with_section(text: str, new: str) -> str:
    """A README with this section in place of the one that it has, else before the one on tracing."""
    if HEADING in text:
        before, _, rest = text.partition(HEADING)
        after = rest[rest.index("\n## ") + 1 :] if "\n## " in rest else ""
    else:
        before, found, after = text.partition(NEXT)
        after = found + after
    return before + new + ("\n" + after if after else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    records = {file.parent.name: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*/bench_ops.json"))}
    differing = []
    for op in OPS:
        text = readme(op).read_text()
        if (new := with_section(text, section(op, records))) != text:
            differing.append(op)
            if not args.check:
                readme(op).write_text(new)
    if args.check and differing:
        print(f"READMEs that differ from the results: {', '.join(differing)}; run python benchmarks/gpu_tables.py")
    return int(args.check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
