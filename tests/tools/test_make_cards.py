"""The model cards: the text follows from the data, and the data from the models."""

import functools
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import make_cards  # noqa: E402

CARDS = sorted((ROOT / "model_cards").glob("*.yaml"))
by_family = pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)

# Measuring every variant takes half a minute and is left to `make_cards.py --check`: here are one of each kind.
MEASURED = ("test_dinat", "test_dinat_isotropic", "test_dinat", "dinat_mini")


@pytest.fixture
def copy(tmp_path):
    """A copy of the NAT card that a test may spoil."""
    for suffix in (".yaml", ".md"):
        shutil.copy(ROOT / "model_cards" / f"nat{suffix}", tmp_path)
    return tmp_path / "nat.yaml"


measure = functools.cache(make_cards.measure)


@pytest.fixture
def only_measured(monkeypatch):
    check_models = make_cards.check_models
    monkeypatch.setattr(make_cards, "measure", measure)
    monkeypatch.setattr(make_cards, "check_models", lambda card, only=None: check_models(card, MEASURED))


def spoil(path, old, new):
    text = path.read_text()
    assert text.count(old) >= 1, f"{old!r} is not in the card"
    path.write_text(text.replace(old, new, 1))


@by_family
def test_the_text_is_the_rendering_of_the_data(path):
    card = make_cards.load(path)
    assert path.with_suffix(".md").read_text() == make_cards.render(card)
    assert make_cards.render(card) == make_cards.render(make_cards.load(path))


@by_family
def test_no_line_holds_an_unfilled_value(path):
    text = path.with_suffix(".md").read_text()
    assert "None" not in text
    assert "null" not in path.read_text()


def test_check_passes_on_the_repository(only_measured, capsys):
    assert make_cards.main(["--check", "nat"]) == 0, capsys.readouterr().out


def test_usage_runs():
    usage = make_cards.load(ROOT / "model_cards" / "nat.yaml").usage.replace("pretrained=True", "pretrained=False")
    scope = {}
    exec(compile(usage, "nat.yaml", "exec"), scope)
    assert [tuple(x.shape) for x in scope["maps"]] == [
        (1, 64, 30, 41),
        (1, 128, 15, 21),
        (1, 256, 8, 11),
        (1, 512, 4, 6),
    ]
    assert scope["detector"].state_dict().keys() == scope["backbone"].state_dict().keys()


def test_counts_agree_with_the_papers():
    """Ours and the authors' numbers were counted by different code: 1 % covers their rounding."""
    for variant in make_cards.load(ROOT / "model_cards" / "nat.yaml").variants:
        if variant.published is not None:
            assert variant.params / 1e6 == pytest.approx(variant.published.params_m, rel=0.01, abs=0.5), variant.name
            assert variant.gmacs == pytest.approx(variant.published.gflops, rel=0.01, abs=0.05), variant.name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("params: 19984174\n    gmacs: 2.695\n    file: dinat", "params: 19984175\n    gmacs: 2.695\n    file: dinat",
         "dinat_mini: params is 19984175 in the card, 19984174 in the model"),
        ("gmacs: 2.695\n    file: dinat", "gmacs: 2.696\n    file: dinat",
         "dinat_mini: gmacs is 2.696 in the card, 2.695 in the model"),
        ("dinat_mini_in1k_224.pth\n    pub", "dinat_mini_in1k.pth\n    pub", "dinat_mini: weights is ["),
        ("licence_id: mit", "licence_id: apache-2.0", "dinat_mini: licence is ['apache-2.0'] in the card, ['mit']"),
        ("name: test_dinat\n    size: 160", "name: test_dinat\n    size: 192", "test_dinat: size is [192]"),
        ("name: test_dinat\n", "name: test_dinatt\n", "test_dinatt: listed, but not registered"),
        ("top1: 82.7", "top1: 83.7", "nat.md rendered"),
    ],
)  # fmt: skip
def test_an_altered_entry_fails_the_check(copy, only_measured, capsys, old, new, message):
    spoil(copy, old, new)
    assert make_cards.main(["--check", "--cards", str(copy.parent)]) == 1
    assert message in capsys.readouterr().out


def test_a_missing_or_edited_text_fails_the_check(copy, monkeypatch, capsys):
    monkeypatch.setattr(make_cards, "check_models", lambda card, only=None: [])
    argv = ["--check", "--cards", str(copy.parent)]
    copy.with_suffix(".md").write_text(copy.with_suffix(".md").read_text() + "one more line\n")
    assert make_cards.main(argv) == 1
    assert "-one more line" in capsys.readouterr().out
    copy.with_suffix(".md").unlink()
    assert make_cards.main(argv) == 1
    assert make_cards.main(["--cards", str(copy.parent)]) == 0
    assert make_cards.main(argv) == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    params: 19984174", "    param: 19984174", r"got 'param'; try params"),
        ("    size: 224\n", "", r"expected size at nat.yaml: variants\[0\]"),
        ("{source: nat, top1: 81.8", "{source: natt, top1: 81.8", r"got natt; try \['nat', 'dinat'\]"),
        ("[nat_mini, 46.5, 41.7, ", "[nat_mini, 46.5, ", r"expected \[variant, box AP, mask AP, file\]"),
        ("- [nat_mini, 46.5", "- [nat_nano, 46.5", r"got \['nat_nano'"),
        ("- name: nat_tiny", "- name: nat_mini", r"once, got nat_mini again"),
        ("family: nat", "family: gnat", r"expected family 'nat'"),
        ("family: nat", "family: [nat", r"expected yaml in nat.yaml"),
    ],
)
def test_a_malformed_card_names_the_entry(copy, old, new, message):
    spoil(copy, old, new)
    with pytest.raises(make_cards.CardError, match=message):
        make_cards.load(copy)


def test_update_rewrites_the_counts_and_nothing_else(copy, monkeypatch):
    before = copy.read_text()
    spoil(copy, "params: 27901582", "params: null")
    spoil(copy, "gmacs: 4.295", "gmacs: 9.999  # a comment survives")
    counts = {
        v.name: (v.params, v.gmacs, v.classes) for v in make_cards.load(ROOT / "model_cards" / "nat.yaml").variants
    }
    monkeypatch.setattr(make_cards, "registered", lambda modules: list(counts))
    monkeypatch.setattr(make_cards, "measure", lambda name, size: counts[name])
    make_cards.update(copy)
    assert copy.read_text() == before.replace("gmacs: 4.295\n", "gmacs: 4.295  # a comment survives\n", 1)


def test_an_unlisted_model_fails_the_check(monkeypatch):
    card = make_cards.load(ROOT / "model_cards" / "nat.yaml")
    card.variants = [variant for variant in card.variants if variant.name != "test_dinat"]
    assert make_cards.check_models(card, only=()) == ["test_dinat: registered, but not listed"]


def test_measure_counts_multiply_adds(monkeypatch):
    """Against a network whose cost can be written down: one 3x3 convolution and one linear layer."""

    class Net(nn.Module):
        in_chans, num_classes = 3, 10

        def __init__(self, device):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False, device=device)
            self.head = nn.Linear(8, 10, device=device)

        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3)))

    monkeypatch.setattr(timm, "create_model", lambda name, device: Net(device))
    macs = 640 * 640 * 3 * 8 * 9 + 8 * 10
    assert make_cards.measure("net", 640) == (3 * 8 * 9 + 8 * 10 + 10, round(macs / 1e9, 3), 10)
    assert not torch.is_inference_mode_enabled()
