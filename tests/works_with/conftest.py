"""Real runs with other people's libraries; `python -m pytest tests/works_with -m slow --table docs/works_with.md`.

Each test asserts a number and gives it to `works`, which makes a row of the table. A library that is not installed is
skipped (`pytest.importorskip`), and the table says so. `pip install visattn[works-with]` brings them all.
"""

from collections.abc import Callable
from importlib.metadata import version

import pytest

HEAD = """# What visattn works with

Written by `python -m pytest tests/works_with -m slow --table docs/works_with.md`: every row is a run on a CPU that
asserts the number beside it. The libraries, in these versions, are the extra `works-with`.

| Library | Version | What ran | Measured |
| --- | --- | --- | --- |
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", help="write what ran to this Markdown file")


@pytest.fixture
def works(record_property) -> Callable[[str, str, str], None]:
    """Note a row: the library's distribution on PyPI, what ran, and what was measured."""

    def note(library: str, what: str, measured: str) -> None:
        record_property("row", [library, version(library), what, measured])

    return note


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    path = config.getoption("--table", None)
    if path is None:
        return
    rows = [value for r in terminalreporter.stats.get("passed", []) for key, value in r.user_properties if key == "row"]
    for report in terminalreporter.stats.get("skipped", []):
        rows.append([report.nodeid.partition("::")[0].rpartition("test_")[2][:-3], "-", "not run", report.longrepr[2]])
    lines = [f"| {' | '.join(row)} |\n" for row in sorted(rows)]
    with open(path, "w", encoding="utf-8") as file:
        file.write(HEAD + "".join(lines))
