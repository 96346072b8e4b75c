"""What the README shows is what happens. `.ci/run` runs its shell commands; here are its Python examples."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_python_examples_run(capsys):
    names = {}
    with torch.no_grad():
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed
    assert f"```\n{printed}```" in README
    assert names["logits"].shape == (2, 10)
    assert [m.shape[-1] for m in names["maps"]] == [80, 40, 20, 10]
    assert names["out"].shape == names["q"].shape
    assert {d.backend for d in names["decisions"]} == {"eager"}


def test_two_commands_for_ci():
    train, test = blocks("bash")
    assert train.strip().endswith("python -m train")
    assert test.strip().endswith("python -m pytest")


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_measured_tables_are_the_committed_ones():
    """Every time and rate in the README's tables stands in the benchmarks' results."""
    results = "".join(
        (ROOT / f"benchmarks/results/bench_{what}_cpu.md").read_text() for what in ("ops", "models", "growth")
    )
    measured = {f"{float(cell):.1f}" for cell in re.findall(r"(?<=\| )\d+\.\d\d?(?= \|)", results)}
    rows = [line for line in README.splitlines() if re.search(r"(\||\w,) (forward|train step)", line)]
    assert len(rows) > 10
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        numbers = [cell for cell in cells if re.fullmatch(r"\d+\.\d", cell)]
        assert len(numbers) >= 2
        assert not set(numbers) - measured, row
