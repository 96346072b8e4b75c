"""`visattn predict`: what it finds, tells and writes, and what it says where it cannot."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import visattn
from visattn.cli import main


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # otherwise the command starts itself anew
    monkeypatch.setattr("visattn.train.__main__.finish", lambda code: code)


@pytest.fixture
def pictures(tmp_path):
    """Five pictures, one of which is none, in a folder and one below it; other files."""
    folder = tmp_path / "pictures"
    (folder / "below 漢字").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("1.png", "10.png", "2.jpg", "below 漢字/wide.png"):
        size = (20, 200, 3) if "wide" in name else (30, 24, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / name)
    (folder / "3.png").write_text("no picture")
    (folder / "notes.txt").touch()
    return folder


def expected(run, path):
    """Class and probability of a picture by hand."""
    model, transform, labels = visattn.load(run)
    with Image.open(path) as image, torch.no_grad():
        probability, index = model(transform(image)[None]).softmax(-1).max(-1)
    return labels[index], probability.item()


def test_folder(finished, pictures, tmp_path, capsys):
    words = ["--run", str(finished), str(pictures), "--topk", "2", "--workers", "2", "--batch-size", "1"]
    assert main(["predict", *words, "--output", str(tmp_path / "o.csv"), "--sheet", str(tmp_path / "o.png")]) == 0
    said = capsys.readouterr().out.splitlines()
    names = ["1.png", "2.jpg", "3.png", "10.png", "below 漢字/wide.png"]
    assert [line.partition(": ")[0] for line in said if str(pictures) in line and "unreadable" not in line] == [
        str(pictures / name) for name in names if name != "3.png"
    ]
    assert f"unreadable: {pictures / '3.png'} (no image in a known format)" in said
    assert said[-1] == "4 predicted, 1 unreadable"
    with open(tmp_path / "o.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows if row["rank"] != "2"] == [str(pictures / name) for name in names]
    for row in rows:
        if row["rank"] == "1":
            assert (row["label"], float(row["probability"])) == expected(finished, row["image"])
    with Image.open(tmp_path / "o.png") as sheet:
        assert len(sheet.convert("L").getcolors(256)) > 100
        assert sheet.width > sheet.height  # of one row
    assert main(["predict", *words, "--output", str(tmp_path / "o.jsonl"), "--quiet"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    objects = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [one["predictions"][0]["label"] for one in objects if "error" not in one] == [
        row["label"] for row in rows if row["rank"] == "1"
    ]
    assert "known format" in objects[2]["error"]


def test_video(finished, tmp_path, capsys):
    av = pytest.importorskip("av")
    with av.open(tmp_path / "clip.mp4", "w") as video:
        stream = video.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for level in range(0, 250, 50):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8), format="rgb24")
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    (tmp_path / "broken.mp4").write_bytes(b"x" * 100)
    assert main(["predict", "--run", str(finished), f"{tmp_path}/*.mp4", "--batch-size", "2"]) == 0
    said = capsys.readouterr().out
    assert [f"clip.mp4#{number}:" in said for number in range(6)] == [True] * 5 + [False]
    assert "unreadable: " in said
    assert said.endswith("5 predicted, 1 unreadable\n")


def test_slips(finished, pictures, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "labels.txt").write_text("a\nb\n")
    run = ["--run", str(finished)]
    for words, said in (
        ([*run], "expected images or videos, got none in no argument; try photos/"),
        ([*run, str(tmp_path / "empty")], "expected images or videos, got none in"),
        ([*run, "x*.png"], "expected an image, a video, a folder or a pattern of these, got x*.png"),
        ([*run, str(pictures / "3.png")], "expected images that can be read, got none of 1"),
        ([str(pictures)], "expected --run or --model, got both or none"),
        ([*run, "--model", "test_vit", str(pictures)], "expected --run or --model, got both or none"),
        ([*run, str(pictures), "--output", "o.txt"], "--output: expected a .csv or .jsonl file, got o.txt"),
        ([*run, str(pictures), "--sheet", "o.jpg"], "--sheet: expected a .png file, got o.jpg"),
        ([*run, str(pictures), "--quiet", "--sheet", "no/o.png"], "--sheet: expected a folder to write to"),
        ([*run, str(pictures), "--labels", str(tmp_path / "labels.txt")], "expected 10 labels, one per class, got 2"),
        ([*run, str(pictures), "--topk", "0"], "--topk: expected 1 to"),
        ([*run, str(pictures), "--device", "moon"], "--device: expected a usable device, got 'moon'"),
        (["--run", str(tmp_path / "r"), str(pictures)], "expected a run's folder"),
        (["--model", "dinat_minnie", str(pictures)], "expected a run's folder, OWNER/NAME or a model"),
        ([*run, str(pictures), "--ema"], "expected weights at"),
    ):
        assert main(["predict", *words]) in (1, 2)
        error = capsys.readouterr().err
        assert error.startswith(f"error: {said}"), error
        assert "; try " in error
        assert error.count("\n") == 1


def test_any_file_may_lie_among_the_images(finished, pictures, capsys):
    pytest.importorskip("av")
    (pictures / "1.png").rename(pictures / "a\n\udcff[1].png")
    (pictures / "2.jpg").rename(pictures / "[2].jpg")
    os.mkfifo(pictures / "pipe.mp4")
    os.mkfifo(pictures / "pipe.png")
    files = [str(path) for path in pictures.iterdir() if path.is_file() or path.suffix == ".mp4"]
    for words in ([str(pictures)], files):
        assert main(["predict", "--run", str(finished), *words]) == 0
        said = capsys.readouterr().out
        assert f"unreadable: {pictures / 'pipe.mp4'} (Not a regular file)" in said
        assert f"{pictures}/a\\n\\udcff[1].png: " in said
        assert f"{pictures}/[2].jpg: " in said


def test_outputs_are_checked_before_the_work(finished, pictures, monkeypatch, capsys):
    monkeypatch.setattr("visattn.train.predict.load", None)
    (pictures / "link.png").symlink_to("1.png")
    for words, said in (
        (["--output", "no/o.csv"], "--output: expected a folder to write to, got no; try"),
        (["--sheet", str(pictures / "1.png")], "--sheet: expected a .png file that is no input, got"),
        (["--sheet", str(pictures / "link.png")], "--sheet: expected a .png file that is no input, got"),
    ):
        assert main(["predict", "--run", str(finished), str(pictures), *words]) == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")
