"""The model cards: the text follows from the data, and the data from the models."""

import dataclasses
import functools
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]

import make_cards  # noqa: E402

CARDS = sorted((ROOT / "model_cards").glob("*.yaml"))
by_family = pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)

# Measuring every variant takes half a minute and is left to `make_cards.py --check`: here are one of each kind.
# The part of the card in front of DiNAT-Mini's file name.
MINI = "\n    gmacs: 2.695\n    pretrained:\n      - tag: in1k\n        file: dinat/checkpoints/"
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
    checked = 0
    for variant in make_cards.load(ROOT / "model_cards" / "nat.yaml").variants:
        for published in filter(None, [item.published for item in variant.pretrained]):
            assert variant.params / 1e6 == pytest.approx(published.params_m, rel=0.01, abs=0.5), variant.name
            assert variant.gmacs == pytest.approx(published.gflops, rel=0.01, abs=0.05), variant.name
            checked += 1
    assert checked == 22


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f"params: 19984174{MINI}", f"params: 19984175{MINI}",
         "dinat_mini: params is 19984175 in the card, 19984174 in the model"),
        (MINI, MINI.replace("2.695", "2.696"), "dinat_mini: gmacs is 2.696 in the card, 2.695 in the model"),
        (MINI, MINI.replace("in1k", "in22k"), "dinat_mini: tags is ['in22k'] in the card, ['in1k'] in the model"),
        (MINI, MINI + "checkpoints/", "dinat_mini.in1k: weights is https://shi-labs.com/projects/dinat/checkpoints/che"),
        (MINI, MINI.replace("file", "size: 256\n        file"), "dinat_mini.in1k: size is 256 in the card, 224 in"),
        (MINI, MINI.replace("file", "classes: 9\n        file"), "dinat_mini.in1k: classes is 9 in the card, 1000 in"),
        (MINI, MINI.replace("file: d", "licence_id: bsd\n        file: d"), "dinat_mini.in1k: licence is bsd in the"),
        ("licence_id: mit", "licence_id: apache-2.0", "dinat_mini.in1k: licence is apache-2.0 in the card, mit in"),
        ("name: test_dinat\n    size: 160", "name: test_dinat\n    size: 192", "test_dinat: size is 192 in the card"),
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
        (
            "        file: nat/",
            "        hub: a/b\n        file: nat/",
            "expected either file or hub at nat.yaml",
        ),
        (
            "    pretrained:\n",
            "    published: {source: nat}\n    pretrained:\n",
            "below each tag, got them at nat.yaml",
        ),
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


def test_one_row_for_each_set_of_weights(copy):
    """Several tags of one variant, by hub id and by URL; a variant without weights; tables with and without files."""
    tag = "      - tag: in1k\n"
    spoil(
        copy,
        tag,
        "      - {tag: a, hub: x/y.a, size: 384, published: {source: nat, top1: 83.62, gflops: 9.25}}\n"
        '      - {tag: b, file: "https://h.org/x/b.pth", licence_id: bsd-3-clause}\n' + tag,
    )
    spoil(copy, "nat/checkpoints/CLS/nat_mini.pth", "c.pth")
    spoil(copy, "    gmacs: 0.051\n", "    gmacs: 0.051\n    published: {source: nat, top1: 1.5}\n")
    spoil(copy, "[nat_mini, 46.5, 41.7, nat/checkpoints/DET/nat_mini_maskrcnn.pth]", "[nat_mini, 46.5, ~, ~]")
    table = "  - title: Ninth table\n    source: nat\n    columns: [top-1]\n    rows: [[nat_mini, 80.0]]\n"
    copy.write_text(copy.read_text() + table)

    lines = make_cards.render(make_cards.load(copy)).splitlines()
    assert [line for line in lines if line.startswith(("| `nat_mini.", "| `test_dinat`", "| `nat_mini` | 46.5"))] == [
        "| `nat_mini.a` | – | – | 9.25 | 384 | 1000 | 83.62 | [x/y.a](https://huggingface.co/x/y.a) |",
        "| `nat_mini.b` | 19.98 | 2.695 | – | 224 | 1000 | – | [b.pth](https://h.org/x/b.pth) |",
        "| `nat_mini.in1k` | 19.98 | 2.695 | 2.7 | 224 | 1000 | 81.8 | [c.pth](https://shi-labs.com/projects/c.pth) |",
        "| `test_dinat` | 0.66 | 0.051 | – | 160 | 1000 | 1.5 | – |",
        "| `nat_mini` | 46.5 | – | [mask_rcnn_nat-mini_fpn_3x_coco]"
        "(../configs/detection/mask_rcnn_nat-mini_fpn_3x_coco.py) | – |",
    ]
    assert lines[lines.index("### Ninth table") + 2 :][:3] == [
        "| backbone | top-1, published |",
        "| --- | ---: |",
        "| `nat_mini` | 80.0 |",
    ]


def test_hub_ids_are_checked_against_the_model(monkeypatch):
    card = make_cards.load(ROOT / "model_cards" / "nat.yaml")
    config = timm.models.get_pretrained_cfg("dinat_mini.in1k")
    hub = dataclasses.replace(config, tag="a", url=None, hf_hub_id="timm/b", input_size=(3, 384, 384))
    empty = dataclasses.replace(config, tag="untrained", url="")
    configs = {"dinat_mini.in1k": config, "dinat_mini.a": hub, "dinat_mini.untrained": empty}
    monkeypatch.setattr(make_cards, "measure", measure)
    monkeypatch.setattr(timm.models, "get_arch_pretrained_cfgs", lambda name: configs)
    (variant,) = (variant for variant in card.variants if variant.name == "dinat_mini")
    for id_, problems in (
        ("timm/b", []),
        ("timm/c", ["dinat_mini.a: weights is https://huggingface.co/timm/c in the card, .*/timm/b in the model"]),
    ):
        item = make_cards.Pretrained("a", 384, 1000, "mit", hub=id_)
        variant.pretrained = [variant.pretrained[0], item]
        found = make_cards.check_models(card, only=["dinat_mini"])
        assert len(found) == len(problems)
        assert all(re.fullmatch(pattern, problem) for pattern, problem in zip(problems, found, strict=True)), found


def test_a_card_without_official_code_and_weights(copy):
    card = make_cards.load(copy)
    card.code, card.weights = None, make_cards.Weights(licence="none are published.", note="No weights.")
    for variant in card.variants:
        variant.pretrained = []
    card.results = []
    text = make_cards.render(card)
    assert "the authors published no code. This repository: Apache-2.0.\n\nWeights: none are published." in text
    assert "Published numbers" not in text


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
