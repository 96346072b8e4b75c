"""What the README shows is what happens: its Python example, here; its shell commands, in `.ci/run`."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_python_example_runs():
    (block,) = blocks("python")
    names = {}
    with torch.no_grad():
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (2, 10)
    assert [m.shape[-1] for m in names["maps"]] == [80, 40, 20, 10]


def test_two_commands_for_ci():
    train, test = blocks("bash")
    assert train.strip().endswith("python -m train")
    assert test.strip().endswith("python -m pytest")


def test_a_screen_or_two():
    assert len(README.splitlines()) <= 120


def test_pypi_shows_pictures_and_leads_to_github():
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    text = README
    for substitution in tool["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    github, raw = (
        "https://github.com/visattn/visattn/blob/main/",
        "https://raw.githubusercontent.com/visattn/visattn/main/",
    )
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 4
    for picture in pictures:
        assert (ROOT / picture.removeprefix(raw)).is_file(), picture
    links = set(re.findall(r"\]\(([^)]+)\)", text)) - set(pictures)
    assert github + "train/README.md" in links
    assert all(link.startswith("https://") for link in links)
