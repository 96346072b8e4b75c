"""The pages of docs/: their Python runs, their links lead somewhere, their numbers are those of the results.

That the site builds without a warning is checked by `.ci/run`.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# ```python runs, all blocks of a page one after the other; ```py needs what is not here: a run, mmdetection
RUNNABLE = [page for page in PAGES if "\n```python\n" in page.read_text()]


def name(page):
    return page.relative_to(DOCS).as_posix()


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_python_runs(page, tmp_path, monkeypatch, capsys):
    """And prints what a block without a language shows."""
    if name(page) == "tutorials/export.md":
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    names, printed = {}, ""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(block, name(page), "exec"), names)
            printed += capsys.readouterr().out
        elif not language:
            assert block in printed


def test_the_examples_are_found():
    assert {"ops/index.md", "tutorials/look_inside.md", "tutorials/swap_attention.md"} <= {name(p) for p in RUNNABLE}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=str)
def test_links_lead_somewhere(page):
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]


def test_measured_tables_are_the_committed_ones():
    """Every time and rate in the tables of benchmarks/index.md stands in the benchmarks' results."""
    results = "".join(
        (ROOT / f"benchmarks/results/bench_{what}_cpu.md").read_text() for what in ("ops", "models", "growth")
    )
    measured = {f"{float(cell):.1f}" for cell in re.findall(r"(?<=\| )\d+\.\d\d?(?= \|)", results)}
    text = (DOCS / "benchmarks" / "index.md").read_text()
    rows = [line for line in text.splitlines() if re.search(r"(\||\w,) (forward|train step)", line)]
    assert len(rows) > 10
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        numbers = [cell for cell in cells if re.fullmatch(r"\d+\.\d", cell)]
        assert len(numbers) >= 2
        assert not set(numbers) - measured, row


def test_pictures_stay_small():
    assert sum(file.stat().st_size for file in (DOCS / "assets").iterdir()) < 3e6
