"""A benchmark's results as a table on the screen, and as .json and .md files."""

from __future__ import annotations

import itertools
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table


def number(value: float | None, form: str = ".2f") -> str:
    """A cell; empty without a value."""
    return "" if value is None else format(value, form)


def publish(
    results: Sequence[Any],
    columns: Sequence[str],
    row: Callable[[Any], list[str]],
    text: str,
    script: str,
    argv: Sequence[str] | None,
    out: Path | None,
    title: str = "one thread, CPU time",
) -> None:
    """Print the results, dataclasses, and write them to `out` with suffix .json, and under the text with suffix .md.

    Rows with the same first two cells stand together. The text has places for `{command}` and `{setting}`, which
    names versions and the machine.
    """
    rows = [row(result) for result in results]
    table = Table(*columns, title=title)
    for _, section in itertools.groupby(rows, lambda cells: cells[:2]):
        for cells in section:
            table.add_row(*cells)
        table.add_section()
    Console().print(table)
    if out is None:
        return
    setting = {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    command = " ".join([f"python tools/{script}", *(sys.argv[1:] if argv is None else argv)])
    lines = [
        text.format(command=command, setting=", ".join(f"{name} {value}" for name, value in setting.items())),
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(cells) + " |" for cells in rows),
    ]
    record = {"setting": setting, "results": [asdict(result) for result in results]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
