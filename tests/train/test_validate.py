"""`python -m visattn.train.validate` against the run's own log and against figures computed by hand, image by image."""

import csv
import dataclasses
import importlib.resources
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from runs import NONSENSE, WORDS, attempt
from safetensors.torch import save_file

from visattn.train.metrics import make_console
from visattn.train.validate import Options, main, parse
from visattn.train.validate import validate as score

MODEL = "test_vit"
INFO = importlib.resources.files("timm.data") / "_info"


def make_weights(path, classes):
    torch.manual_seed(0)
    model = timm.create_model(MODEL, img_size=32, num_classes=classes).eval()
    torch.nn.init.normal_(model.get_classifier().weight, std=0.5)  # as it comes, all outputs are nearly equal
    save_file(model.state_dict(), path)
    return model


def write(path, seed):
    """A picture of the test size, which the transform leaves as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path, "PNG")
    return path


@torch.no_grad()
def logits(model, pictures):
    """The outputs for paths or images, without any of the trainer's code."""
    arrays = [np.asarray(Image.open(p) if isinstance(p, Path) else p) for p in pictures]
    images = torch.tensor(np.stack(arrays)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    return model((images - mean) / std)


def by_hand(output, target):
    target = torch.tensor(target)
    ranks = (output > output.gather(1, target[:, None])).sum(1)
    top5 = 100 * (ranks < 5).float().mean().item()
    loss = torch.nn.functional.cross_entropy(output, target).item()
    return {"loss": loss, "top1": 100 * (ranks == 0).float().mean().item(), "top5": top5}


@pytest.fixture
def validate(tmp_path, capsys):
    """Call the command; returns the figures, or the error it printed."""

    def call(*args, exit_code=0):
        file = tmp_path / "results.json"
        code = main([*map(str, args), "--results", str(file)])
        captured = capsys.readouterr()
        assert code == exit_code, captured.err
        return captured.err if exit_code else json.loads(file.read_text()) | {"shown": captured.out}

    return call


def close(results, expected):
    assert {name: results[name] for name in expected} == pytest.approx(expected, abs=2e-4)


def options(tmp_path, data):
    return "--model", MODEL, "--weights", tmp_path / "w.safetensors", "--data", data, "--img-size", 32, "--crop-pct", 1


def test_a_run_scores_as_in_its_log(run, validate):
    code, folder = run("r", "--epochs", 1, "--warmup-epochs", 0, "--ema-decay", 0.5, "--drop-path", 0.5)
    assert code == 0
    with open(folder / "log.csv", newline="") as file:
        row = {name: float(value) for name, value in list(csv.DictReader(file))[-1].items() if value}
    results = validate("--run", folder)
    assert (results["model"], results["data"], results["images"], results["bad_images"]) == (MODEL, "digits", 360, [])
    assert round(results["top1"], 4) == row["top1"]
    assert round(results["top5"], 4) == row["top5"]
    assert results["loss"] == pytest.approx(row["eval_loss"], rel=1e-6)
    assert f"{row['top1']:.2f} %" in results["shown"]
    average = validate("--run", folder, "--ema", "--batch-size", 7)
    assert round(average["top1"], 4) == row["ema_top1"]
    assert average["loss"] == pytest.approx(row["ema_loss"], rel=1e-6) != results["loss"]


def test_unreadable_images_are_named_and_left_out(tmp_path, validate):
    model = make_weights(tmp_path / "w.safetensors", 2)
    paths = [write(tmp_path / "data" / "val" / name / f"{i}.png", i) for name in "ab" for i in range(6)]
    for path in (paths[2], paths[7]):
        path.write_bytes(b"")
    results = validate(*options(tmp_path, tmp_path / "data"), "--batch-size", 5)
    kept = [index for index in range(12) if index not in (2, 7)]
    close(results, by_hand(logits(model, [paths[index] for index in kept]), [index // 6 for index in kept]))
    assert results["images"] == 10
    assert results["bad_images"] == [str(paths[2]), str(paths[7])]
    assert results["shown"].count("unreadable image:") == 2
    assert f"unreadable image: {paths[7]} (no image in a known format)" in results["shown"]
    for path in paths:
        path.write_bytes(b"")
    assert "expected readable images, got none" in validate(*options(tmp_path, tmp_path / "data"), exit_code=2)


@pytest.mark.parametrize("crops", [1, 5, 10])
@pytest.mark.parametrize("mode", ["center", "squash"])
def test_crops_are_averaged_as_probabilities(tmp_path, validate, crops, mode):
    model = make_weights(tmp_path / "w.safetensors", 4)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    for name in "abcd":
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "data" / "val" / name / "0.png")
    size = (64, 40) if mode == "center" else (40, 40)
    resized = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    right, middle = size[0] - 32, size[0] // 2 - 16
    cuts = [resized.crop((x, y, x + 32, y + 32)) for x, y in ((middle, 4), (0, 0), (right, 0), (0, 8), (right, 8))]
    cuts += [cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for cut in cuts]
    mean = logits(model, cuts[:crops]).softmax(1).mean(0, keepdim=True)

    args = (*options(tmp_path, tmp_path / "data")[:-1], 0.8, "--crops", crops, "--crop-mode", mode)
    results = validate(*args)
    assert results["top1"] == 25  # one picture in all four classes
    close(results, {"loss": -mean.log().mean().item()})


@pytest.mark.parametrize("kind", ["a", "r"])
def test_a_and_r_are_scored_over_their_200_classes(tmp_path, validate, kind):
    model = make_weights(tmp_path / "w.safetensors", 1000)
    synsets = (INFO / f"imagenet_{kind}_synsets.txt").read_text().split()
    outputs = [int(line) for line in (INFO / f"imagenet_{kind}_indices.txt").read_text().split()]
    assert len(synsets) == len(outputs) == 200
    chosen = [0, 3, 77, 199]
    paths = [write(tmp_path / "set" / synsets[number] / "0.jpg", number) for number in chosen]
    output = logits(model, paths)
    # Name the second picture's folder after its best class among the 200, so that the accuracy is not zero.
    best = output[1, outputs].argmax().item()
    paths[1].parent.rename(tmp_path / "set" / synsets[best])
    targets = [0, best, 77, 199]
    results = validate(*options(tmp_path, tmp_path / "set"), "--robustness", kind)
    close(results, by_hand(output[:, outputs], targets))
    assert results["top1"] >= 25

    write(tmp_path / "set" / "n00000000" / "0.jpg", 0)
    error = validate(*options(tmp_path, tmp_path / "set"), "--robustness", kind, exit_code=2)
    assert f"expected folders of the 200 classes of ImageNet-{kind.upper()}" in error
    assert "got n00000000; try" in error


def test_c_is_scored_by_corruption(tmp_path, validate):
    model = make_weights(tmp_path / "w.safetensors", 3)
    expected, seed = {}, 0
    for corruption in ("fog", "blur"):
        expected[corruption] = {}
        for severity in "123":
            paths = []
            for name in "abc":
                for index in range(2):
                    seed += 1
                    paths.append(write(tmp_path / "set" / corruption / severity / name / f"{index}.JPEG", seed))
            expected[corruption][severity] = 100 - by_hand(logits(model, paths), [0, 0, 1, 1, 2, 2])["top1"]
        expected[corruption]["mean"] = sum(expected[corruption].values()) / 3
    results = validate(*options(tmp_path, tmp_path / "set"), "--robustness", "c")
    assert results["errors"].keys() == expected.keys()
    for corruption, errors in expected.items():
        assert results["errors"][corruption] == pytest.approx(errors, abs=1e-4)
    assert expected["fog"]["mean"] != expected["blur"]["mean"]
    assert results["mean_error"] == pytest.approx((expected["fog"]["mean"] + expected["blur"]["mean"]) / 2, abs=1e-4)
    assert results["images"] == 36
    assert f"{expected['fog']['mean']:.2f} %" in results["shown"]


def test_real_labels(tmp_path, validate):
    model = make_weights(tmp_path / "w.safetensors", 8)
    paths = [write(tmp_path / "data/val" / str(i % 8) / f"ILSVRC2012_val_{i + 1:08d}.JPEG", i) for i in range(16)]
    order = logits(model, paths).argsort(1, descending=True)
    # Right at first, fifth and sixth guess, in turn; two pictures without labels; one unreadable.
    labels = [[order[i, (0, 4, 5)[i % 3]].item(), order[i, 7].item()] for i in range(16)]
    labels[4], labels[9] = [], []
    paths[1].write_bytes(b"")
    (tmp_path / "real.json").write_text(json.dumps(labels))
    args = (
        *options(tmp_path, tmp_path / "data"),
        "--batch-size",
        5,
        "--real-labels",
        "--real-json",
        tmp_path / "real.json",
    )
    results = validate(*args)
    counted = [i for i in range(16) if i not in (1, 4, 9)]
    assert results["real_top1"] == pytest.approx(100 * sum(i % 3 == 0 for i in counted) / 13)
    assert results["real_top5"] == pytest.approx(100 * sum(i % 3 < 2 for i in counted) / 13)

    paths[0].rename(paths[0].with_name("other.JPEG"))
    assert "expected names like ILSVRC2012_val_00000001.JPEG, got" in validate(*args, exit_code=2)
    error = validate(*args[:-2], exit_code=2)
    assert "expected all images of ImageNet's validation split, got 16; try" in error
    (tmp_path / "real.json").write_text("{")
    assert "--real-json: expected a JSON file of labels" in validate(*args, exit_code=2)


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ([], "expected --run, or --model with either --weights or --pretrained, got none of them; try"),
        (["--model", MODEL, "--data", "digits"], "got --model; try"),
        (["--run", "x", "--pretrained"], "got --run, --pretrained; try"),
        (["--run", "x", "--model", MODEL], "got --run, --model; try"),
        (["--model", MODEL, "--pretrained"], "--data: expected a data set, got none; try"),
        (["--model", MODEL, "--pretrained", "--ema"], "--ema: expected --run"),
        (["--model", MODEL, "--pretrained", "--robustness", "a"], "--robustness: expected --data"),
        (["--model", "test_vt", "--pretrained", "--data", "x"], "expected a registered model, got 'test_vt'; try"),
        (
            ["--model", "test_vit.no", "--pretrained", "--data", "x"],
            "expected a registered model, got 'test_vit.no'; try",
        ),
        (["--run", "nowhere"], "expected a run with args.yaml and model.safetensors in nowhere, got no folder"),
        (["--model", MODEL, "--pretrained", "--data", "digits"], "expected data with the 1000 classes of the weights"),
        (["--model", MODEL, "--weights", "no.pth", "--data", "digits"], "expected weights at no.pth, got no file; try"),
        (["--model", MODEL, "--pretrained", "--data", "no", "--robustness", "c"], "expected the folder of ImageNet-C"),
        (
            ["--model", MODEL, "--pretrained", "--data", "no", "--crop-mode", "border", "--crops", "5"],
            "--crops: expected --crop-mode center or squash, got border; try",
        ),
    ],
)
def test_wrong_options_say_what_to_do(validate, args, error):
    assert error in validate(*args, exit_code=2)


def test_every_option_with_every_value(tmp_path, monkeypatch):
    """Refused in one sentence, or scored."""
    make_weights(tmp_path / "w.safetensors", 2)
    for name in ("a", "b"):
        write(tmp_path / "data" / "val" / name / "0.png", 0)
    monkeypatch.chdir(tmp_path)
    base, scored = [*map(str, options(tmp_path, tmp_path / "data"))], 0
    for field in dataclasses.fields(Options):
        flag = f"--{field.name.replace('_', '-')}"
        rest = base if flag not in base else base[: base.index(flag)] + base[base.index(flag) + 2 :]
        for word in WORDS:
            if attempt(lambda args: score(parse(args), make_console(enabled=False)), [*rest, flag, word]):
                assert not (re.search(r"\b(int|float)\b", str(field.type)) and word in NONSENSE), (flag, word)
                scored += 1
    assert scored > 5


def test_a_head_of_another_size_is_refused(tmp_path, validate):
    make_weights(tmp_path / "w.safetensors", 7)
    error = validate(*options(tmp_path, "digits")[:-2], "--in-chans", 3, exit_code=2)
    assert "expected weights for 10 classes" in error
    assert "head.bias, head.weight has another size; try" in error
    (tmp_path / "set").mkdir()
    error = validate(*options(tmp_path, tmp_path / "set"), "--robustness", "c", exit_code=2)
    assert "expected images in" in error
    assert "try --data DIR with DIR/CORRUPTION/1/CLASS/x.JPEG" in error
