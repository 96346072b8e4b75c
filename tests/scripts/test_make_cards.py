"""The model cards: `make_cards.py --check` compares all of them, here is what it must notice."""

import re
import shutil
from pathlib import Path

import make_cards
import pytest
import timm

import visattn
from visattn.models import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
NAT = ROOT / "model_cards" / "nat.yaml"


@pytest.fixture
def copy(tmp_path):
    """A copy of the NAT card that a test may spoil."""
    return Path(shutil.copy(NAT, tmp_path))


@pytest.fixture
def quick(monkeypatch):
    """Measure two models only: all of a family take seconds."""
    measure = make_cards.measure
    few = ("test_dinat", "test_isotropic_vitrpb")
    monkeypatch.setattr(make_cards, "measure", lambda name, tag: measure(name, tag) if name in few else (0, 0.0))


def spoil(path, old, new):
    text = path.read_text()
    assert old in text, f"{old!r} is not in the card"
    path.write_text(text.replace(old, new, 1))


def test_every_family_has_one_card():
    cards = [make_cards.load(path) for path in (ROOT / "model_cards").glob("[!_]*.yaml")]
    assert sorted(family for card in cards for family in card.families) == sorted(FAMILIES)


def test_check_names_the_file_that_is_out_of_date(copy, quick, capsys):
    argv = ["--cards", str(copy.parent)]
    assert make_cards.main([*argv, "--check"]) == 1  # not written yet
    assert make_cards.main(argv) == 0
    assert make_cards.main([*argv, "--check"]) == 0
    spoil(copy, "top1: 82.7", "top1: 83.7")
    capsys.readouterr()
    assert make_cards.main([*argv, "--check"]) == 1
    out = capsys.readouterr().out
    assert "nat.md is out of date" in out
    assert re.search(r"^-\| `dinat_tiny.in1k` .* 82.7 ", out, re.MULTILINE)


def test_an_altered_model_fails_the_check(copy, quick, monkeypatch, capsys):
    argv = ["--cards", str(copy.parent)]
    assert make_cards.main(argv) == 0
    monkeypatch.setattr(make_cards, "measure", lambda name, tag: (0, 0.001))
    assert make_cards.main([*argv, "--check"]) == 1
    assert "+| `dinat_tiny.in1k` | 0.00 | 0.001 |" in capsys.readouterr().out


def test_rows_come_from_the_code(copy, quick):
    """A model without a published result, and one without weights, stand there with all that the code knows."""
    spoil(copy, "  dinat_mini: {", "  nat_mini.in1k: {")
    spoil(copy, "  nat_mini: {source: nat, top1: 81.8, params_m: 20, gflops: 2.7}\n", "")
    lines = make_cards.render(make_cards.load(copy)).splitlines()
    url = timm.get_pretrained_cfg("dinat_mini").url
    hub = "shi-labs/dinat-mini-in1k-224"
    link = f"[{hub}](https://huggingface.co/{hub}) or [dinat_mini_in1k_224.pth]({url})"
    assert f"| `dinat_mini.in1k` | 0.00 | 0.000 | 224 | 0.875 | 1000 | {link} | mit | – | – | – | – |" in lines
    assert "| `test_dinat` | 0.66 | 0.051 | 160 | 0.875 | 1000 | – | – | – | – | – | – |" in lines
    assert "| `test_isotropic_vitrpb` | 0.32 | 0.030 | 160 | 0.875 | 1000 | – | – | – | – | – | – |" in lines
    rows = [line.split("`")[1].partition(".")[0] for line in lines if line.count("|") == 13 and "`" in line]
    names = [*visattn.list_models(family="nat"), *visattn.list_models(family="nat_isotropic")]
    assert sorted(rows) == sorted(names)


def test_one_row_for_each_set_of_weights(monkeypatch):
    monkeypatch.setattr(make_cards, "measure", lambda name, tag: (1e6, 1.0))
    lines = make_cards.render(make_cards.load(ROOT / "model_cards" / "transnext.yaml")).splitlines()
    hub = "DaiShiResearch/transnext-small-384-1k-ft-1k"
    row = f"| 1.00 | 1.000 | 384 | 1.0 squash | 1000 | [{hub}](https://huggingface.co/{hub}) | apache-2.0 "
    assert f"| `transnext_small.in1k_384` {row}| 86.0 | 32.1 | 49.7 | official |" in lines
    assert sum(line.startswith("| `transnext_small.") for line in lines) == 2


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        ("pvt", ["| `agent*`, `inline*` | fetchable (`pretrained=True`) from cloud.tsinghua.edu.cn |"]),
        ("resnest", ["| `resnest14_va`, `resnest26_va` | fetchable (`pretrained=True`) from the Hugging Face hub"]),
        ("biformer", ["| `biformer*` | file only: ", "| `test_biformer` | none: random initialisation only |"]),
    ],
)  # fmt: skip
def test_the_weights_are_told_first(family, rows, quick):
    text = make_cards.render(make_cards.load(ROOT / "model_cards" / f"{family}.yaml"))
    section = text[text.index("## Weights") : text.index("## Models")]
    for row in rows:
        assert row in section


def test_counts_agree_with_the_papers():
    """Ours and the authors' numbers were counted by different code: 1 % covers their rounding."""
    checked = 0
    for line in NAT.with_suffix(".md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 14 and cells[-2] in ("nat", "dinat"):
            params, gmacs, gflops, params_m = (float(cells[index]) for index in (2, 3, 10, 11))
            assert params == pytest.approx(params_m, rel=0.01, abs=0.5), line
            assert gmacs == pytest.approx(gflops, rel=0.01, abs=0.05), line
            checked += 1
    assert checked == 22


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("summary: >-", "sumary: >-", r"got 'sumary'; try summary"),
        ("title: N", "limits_: N", r"got 'limits_'; try limits"),
        ("usage: |", "base: |", r"expected usage at nat.yaml, got title, "),
        ("  nat_mini: {source", "  nat_mni: {source", r"expected a model .*published, got 'nat_mni'; try nat_mini"),
        ("  nat_mini: {source", "  nat_mini.in2k: {source", r"got 'nat_mini.in2k'; try nat_mini.in1k"),
        ("{source: nat, top1: 81.8", "{source: natt, top1: 81.8", r"got natt; try nat, dinat"),
        ("{source: nat, top1: 81.8", "{source: nat, top: 81.8", r"nat.yaml: nat_mini, got 'top'; try top1"),
        ("[nat_mini, 46.5, 41.7, ", "[nat_mini, 46.5, ", r"expected \[model, box AP, mask AP, file\]"),
        ("- [nat_mini, 46.5", "- [nat_nano, 46.5", r"got \['nat_nano'"),
        ("mask_rcnn_{model}", "mask_cnn_{model}", r"got no configs/detection/mask_cnn_nat-mini_fpn_3x_coco.py"),
        ("  note: >-", "  file_only: {nat_t*: by hand}\n  note: >-", r"at file_only .*'nat_t\*', which is nat_tiny"),
        ("  note: >-", "  file_only: {nat_x*: by hand}\n  note: >-", r"'nat_x\*', which is none"),
        ("papers:\n", "papers:\n  - agnt\n", r"papers of _papers.yaml in nat.yaml, got agnt; try agent"),
        ("families: [nat", "families: [nats", r"expected families of .*, got nats"),
        ("title: N", "title: [N", r"expected yaml in nat.yaml"),
    ],
)
def test_a_malformed_card_names_the_entry(copy, old, new, message):
    spoil(copy, old, new)
    with pytest.raises(make_cards.CardError, match=message):
        make_cards.load(copy)


def test_usage_runs():
    usage = make_cards.load(NAT).usage.replace("pretrained=True", "pretrained=False")
    scope = {}
    exec(compile(usage, "nat.yaml", "exec"), scope)
    assert [tuple(x.shape) for x in scope["maps"]] == [
        (1, 64, 30, 41),
        (1, 128, 15, 21),
        (1, 256, 8, 11),
        (1, 512, 4, 6),
    ]
    assert scope["detector"].state_dict().keys() == scope["backbone"].state_dict().keys()


def test_the_readme_has_a_row_for_every_family():
    table = make_cards.TABLE.search((ROOT / "README.md").read_text())[0]
    cards = re.findall(r"^\| \[.+?\]\(model_cards/(\w+)\.md\) \|", table, re.MULTILINE)
    assert cards == [path.stem for path in sorted((ROOT / "model_cards").glob("[!_]*.yaml"))]


def test_the_readme_is_written_and_checked(copy, quick, capsys):
    cards = copy.parent / "model_cards"
    cards.mkdir()
    copy = Path(shutil.move(copy, cards))
    readme = cards.parent / "README.md"
    readme.write_text("before\n<!-- families: scripts/make_cards.py -->\nold\n<!-- end -->\nafter\n")
    argv = ["--cards", str(cards)]
    assert make_cards.main(argv) == 0
    row = "| `nat_mini` | 26 | 0 | 80.0 to 87.5 | 55.3 | 54.0 | 25 fetched |\n<!-- end -->\nafter\n"
    assert readme.read_text().endswith(row)
    assert make_cards.main([*argv, "--check"]) == 0
    spoil(copy, "[dinat_large, 55.3,", "[dinat_large, 55.4,")
    assert make_cards.main(argv[:2]) == 0
    assert "| 55.4 | 54.0 |" in readme.read_text()
    spoil(readme, "| 55.4 |", "| 99.9 |")
    capsys.readouterr()
    assert make_cards.main([*argv, "--check"]) == 1
    assert "README.md is out of date" in capsys.readouterr().out
