"""A benchmark's results as a table on the screen, and as .json and .md files."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import platform
import sys
import traceback
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
    show(results, columns, row, title)
    if out is not None:
        write(results, columns, row, text, script, argv, out)


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def failure(error: Exception) -> str:
    """Why something has no number, in a line; the whole goes to stderr."""
    traceback.print_exception(error)
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"failed: {type(error).__name__}: {lines[0]}"[:300]


def earlier(out: Path, setting: dict[str, str]) -> list[dict[str, Any]]:
    """The results in `out`, none if they are of another GPU or version of Triton, as `setting` names them, or torch."""
    file = out.with_suffix(".json")
    if not file.exists():
        return []
    record = json.loads(file.read_text())
    same = {name: setting[name] for name in ("GPU", "triton") if name in setting} | {"torch": torch.__version__}
    if any(record["setting"].get(name) != value for name, value in same.items()):
        print(f"results in {file} are of another GPU or version and are dropped")
        return []
    return record["results"]


def show(results: Sequence[Any], columns: Sequence[str], row: Callable[[Any], list[str]], title: str) -> None:
    """Print the results as a table."""
    rows = [row(result) for result in results]
    table = Table(*columns, title=title)
    for _, section in itertools.groupby(rows, lambda cells: cells[:2]):
        for cells in section:
            table.add_row(*cells)
        table.add_section()
    Console().print(table)


def write(
    results: Sequence[Any],
    columns: Sequence[str],
    row: Callable[[Any], list[str]],
    text: str,
    script: str,
    argv: Sequence[str] | None,
    out: Path,
    more_setting: dict[str, str] | None = None,
    after: str = "",
) -> None:
    """Write the results to `out` with suffix .json, and as a table between two texts with suffix .md."""
    rows = [row(result) for result in results]
    setting = {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        **(more_setting or {}),
    }
    command = " ".join([f"python benchmarks/{script}", *(sys.argv[1:] if argv is None else argv)])
    lines = [
        text.format(command=command, setting=", ".join(f"{name} {value}" for name, value in setting.items())),
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(cells) + " |" for cells in rows),
        *([after] if after else []),
    ]
    record = {"setting": setting, "results": [asdict(result) for result in results]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
