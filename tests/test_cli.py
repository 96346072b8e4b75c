"""The `visattn` command: what finds models, and what wrong words get. Its other commands have their own tests."""

import subprocess
import sys

import pytest
import timm
from timm.models._hub import save_for_hf

import visattn
from visattn.cli import COMMANDS, main


def test_list(capsys):
    assert main(["list", "dinat_*", "--names"]) == 0
    assert capsys.readouterr().out.split() == visattn.list_models("dinat_*")
    assert main(["list", "*nat_*", "--pretrained", "--sort", "top1", "--most-params", "30"]) == 0
    head, *rows, foot = capsys.readouterr().out.splitlines()
    names, params, top1 = ([row.split()[column] for row in rows] for column in (0, 1, 4))
    assert names[0] == "nat_tiny"
    assert "dinat_tiny" in names
    assert "nat_base" not in names
    assert "dinat_atto" not in names  # without weights
    assert max(map(float, params)) <= 30
    assert top1 == sorted(top1, reverse=True)
    assert head.split() == ["model", "params,", "M", "GMACs", "px", "top-1,", "%", "weights"]
    assert foot.startswith(f"{len(rows)} models")
    assert rows[0].split()[-1] == "in1k"


def test_every_model_has_its_numbers(capsys):
    assert main(["list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert [row[0] for row in rows] == visattn.list_models()
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows)


def test_info(capsys):
    assert main(["info", "nat_mini"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "19.98 M" in said
    assert "2.695 GMACs at 224x224 px" in said
    assert "512 at 1/32" in said
    assert "nat-mini-in1k-224 (mit)" in said
    assert "top-1 81.8 %" in said
    assert main(["info", "resnet18"]) == 0  # of timm
    assert "11.69 M" in capsys.readouterr().out
    assert main(["info", "test_patchconvnet"]) == 0
    assert "feature maps 3 x 32 at 1/16 classes" in " ".join(capsys.readouterr().out.split())


def test_info_shows_names_as_they_are(tmp_path, capsys):
    model = timm.create_model("test_vit", num_classes=3)
    save_for_hf(model, tmp_path, model_config={"label_names": ["[/x]", "[red]", "a\nb"]}, safe_serialization=True)
    assert main(["info", str(tmp_path)]) == 0
    assert "3: [/x], [red], a\\nb " in capsys.readouterr().out
    assert main(["info", "resnet18"]) == 0
    assert "papers arXiv:2110.00476" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "words", [["lst"], ["list", "zzz"], ["list", "--family", "x"], ["info", "dinat_mni"], ["info", "nat_mini.no"]]
)
def test_slips_are_one_sentence(words, capsys):
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: expected ")
    assert said.err.count("\n") == 1
    assert "; try " in said.err


def test_help_and_pipes():
    python = [sys.executable, "-m", "visattn"]
    said = subprocess.run(python, capture_output=True, text=True, check=True).stdout
    assert all(f"\n  {name} " in said for name in COMMANDS)
    piped = f"{' '.join(python)} list | head -1"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(" model")
    assert done.stderr == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command, capsys, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # otherwise the trainer starts itself anew
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"visattn {command}" in capsys.readouterr().out.partition("options")[0].partition("\n")[2]
