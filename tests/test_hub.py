"""`visattn.load`: a run, the hub, a name with a file."""

import json
import os
import subprocess
import sys
import time

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

import visattn
from tests.hub import Hub
from visattn.hub import read_labels
from visattn.weights import WeightsError

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch with an average."""
    from visattn.train.__main__ import main

    output = tmp_path_factory.mktemp("runs")
    options = "--model test_dinat --img-size 24 --epochs 1 --warmup-epochs 0 --batch-size 500 --ema-decay 0.5"
    assert main([*options.split(), "--output", str(output), "--name", "r"]) == 0
    return output / "r"


def test_run_is_a_model_of_timm(run):
    model, transform, labels = visattn.load(run)
    assert labels == [str(digit) for digit in range(10)]
    assert not model.training
    timms = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    data = resolve_model_data_config(timms)
    assert data["input_size"] == (1, 24, 24)
    assert (data["mean"], data["std"], data["crop_pct"]) == ([0.305], [0.376], 1.0)
    assert timms.pretrained_cfg["label_names"] == labels
    assert "license" not in timms.pretrained_cfg
    image = Image.effect_noise((40, 50), 60)
    tensor = transform(image.convert("RGB"))
    assert torch.equal(tensor, create_transform(**data)(image))
    assert torch.equal(model(tensor[None]), timms(tensor[None]))
    average = visattn.load(run, ema=True).model
    assert not torch.equal(average(tensor[None]), model(tensor[None]))
    assert torch.equal(visattn.load(f"local-dir:{run}").model(tensor[None]), model(tensor[None]))
    assert visattn.load(run, labels=[*"abcdefghij"]).labels == [*"abcdefghij"]


def test_what_is_no_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr(timm, "create_model", None)  # none of these builds anything
    for source, options, said in (
        (run.parent, {}, rf"expected a run .* got r; try {run}"),
        (tmp_path, {}, "expected a run .* got an empty folder; try output/RUN"),
        (run.parent / "rr", {}, f"expected a run's folder, .*; try {run}"),
        ("dinat_minnie", {}, "expected a run's folder, .*; try dinat_mini"),
    ):
        with pytest.raises(WeightsError, match=said):
            visattn.load(source, **options)
    for options in {"weights": "x"}, {"ema": True}:
        with pytest.raises(ValueError, match=r"expected a (run|registered name).*; try"):
            visattn.load("nothing", **options)


def test_run_that_is_not_whole(run, tmp_path):
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(WeightsError, match=r"expected weights at .*, got none; try `visattn train --resume"):
        visattn.load(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"expected weights of .*config.json, got .* which lacks"):
        visattn.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"expected the model of a run in .*config.json, got"):
        visattn.load(tmp_path)
    with pytest.raises(ValueError, match="expected 10 labels, one per class, got 2"):
        visattn.load(run, labels=["a", "b"])


def test_name_with_a_file(tmp_path):
    model = timm.create_model("test_deit_va", num_classes=7)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded, transform, labels = visattn.load("test_deit_va", weights=tmp_path / "w.safetensors")
    assert labels == [*"0123456"]
    image = transform(Image.new("L", (9, 300)))[None]
    assert torch.equal(loaded(image), model.eval()(image))
    save_file(timm.create_model("test_deit_va").state_dict(), tmp_path / "w.safetensors")
    assert visattn.load("test_deit_va", weights=tmp_path / "w.safetensors").labels[:2] == [
        "tench, Tinca tinca",
        "goldfish, Carassius auratus",
    ]


def test_pushed_run_comes_back(run, tmp_path):
    command = f"train --resume {run} --push-to-hub someone/digits --hub-license cc-by-4.0"
    read = "import visattn; m, _, labels = visattn.load('someone/digits'); print(labels, m.head.fc.weight.tolist()[3])"
    with Hub() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path)}
        for words in ["-m", "visattn", *command.split()], ["-c", read]:
            done = subprocess.run(
                [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
    model, _, labels = visattn.load(run)
    assert done.stdout == f"{labels} {model.head.fc.weight.tolist()[3]}\n"
    assert hub.repositories == ["someone/digits"]
    assert {*hub.files} == {"README.md", "config.json", "model.safetensors"}
    card = hub.files["README.md"].decode()
    assert "license: cc-by-4.0" in card
    assert "top-1" in card
    assert "model: test_dinat" in card
    assert str(run.parent) not in card


def test_no_network_is_one_sentence_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    def refuse(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    start = time.perf_counter()
    with pytest.raises(
        WeightsError, match=r"expected the folder someone/digits or .*/someone/digits .*; try again with"
    ):
        visattn.load("someone/digits")
    with pytest.raises(WeightsError, match=r"expected weights of nat_mini.in1k, got none from .*; try again with"):
        visattn.load("nat_mini")
    assert time.perf_counter() - start < 5


def test_config_that_somebody_changed(run, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(run / "model.safetensors")
    written = json.loads((run / "config.json").read_text())

    def load(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**written, **changes}))
        return visattn.load(tmp_path)

    for changes in (
        {"architecture": None},
        {"model_args": [1]},
        {"pretrained_cfg": None},
        {"pretrained_cfg": {**written["pretrained_cfg"], "interpolation": "x"}},
        {"label_names": 5},
    ):
        with pytest.raises(WeightsError, match=r"expected .*config.json.*, got .*; try another run"):
            load(**changes)
    assert load(label_names={str(number): f"c{number}" for number in range(10)}).labels[9] == "c9"
    assert load(label_names={f"n{number}": "c" for number in range(10)}).labels[9] == "9"


def test_slips_in_a_source(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    assert visattn.load("~/r").labels == visattn.load(run).labels
    with pytest.raises(WeightsError, match=f"expected a run's folder, .* got a file; try {run}"):
        visattn.load(run / "model.safetensors")
    with pytest.raises(WeightsError, match=r"expected a run's folder, .* got 'nat_mini.no'; try nat_mini"):
        visattn.load("nat_mini.no")


def test_labels_are_read_from_text_files_alone(tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffa b\r\n\r\n漢\n".encode())
    assert read_labels(tmp_path / "names.txt") == ["a b", "漢"]
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "no"):
        with pytest.raises(ValueError, match=r"expected names of classes at .*, got .*; try a text file"):
            read_labels(path)


def test_weights_of_a_run_know_their_input(run):
    whole, named = visattn.load(run), visattn.load("test_dinat", weights=run / "model.safetensors")
    assert named.labels == whole.labels
    image = Image.effect_noise((40, 50), 60)
    assert torch.equal(named.model(named.transform(image)[None]), whole.model(whole.transform(image)[None]))
