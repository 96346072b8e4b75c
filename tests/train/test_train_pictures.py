"""Pictures and tables of a run: what they say is true, and they hold whatever the images and their names are."""

import csv
import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from PIL import Image
from runs import PLAIN, SMALL, build

from visattn.train import analysis, pictures
from visattn.train.engine import Engine
from visattn.train.validate import main as validate

NAMES = [
    "cat",
    r"$\nonsense$",
    "a name that goes on and on and on and is not done yet",
    "猫",
    "кот\n\x1b[31m",
    "\udcff",
]


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def check_tables(folder, images, tmp_path):
    """They agree with one another, and with a validation of the exported weights."""
    pairs, classes = table(folder / "confusion.csv"), table(folder / "classes.csv")
    assert sum(int(row["images"]) for row in pairs) == sum(int(row["images"]) for row in classes) == images
    right = {row["true"]: int(row["images"]) for row in pairs if row["true"] == row["predicted"]}
    for row in classes:
        guesses = sum(int(pair["images"]) for pair in pairs if pair["predicted"] == row["class"])
        recall, precision = right.get(row["class"], 0) / int(row["images"]), right.get(row["class"], 0) / (guesses or 1)
        assert float(row["recall"]) == pytest.approx(recall, abs=1e-4)
        assert row["precision"] == "" if not guesses else float(row["precision"]) == pytest.approx(precision, abs=1e-4)
    assert validate(["--run", str(folder), "--results", str(tmp_path / "v.json")]) == 0
    assert 100 * sum(right.values()) / images == pytest.approx(json.loads((tmp_path / "v.json").read_text())["top1"])


def test_tables_are_of_the_best_weights(folder_data, run, tmp_path, monkeypatch):
    """Those of the first epoch, by the scores given here."""
    tops, real = iter((90.0, *[50.0] * 7)), Engine.evaluate
    monkeypatch.setattr(Engine, "evaluate", lambda *args: {**real(*args), "top1": next(tops)})
    code, folder = run("r", "--data", folder_data, *PLAIN, "--epochs", 8)
    assert code == 0
    check_tables(folder, 12, tmp_path)
    with Image.open(folder / "worst.png") as sheet:
        assert sheet.width > 8 * pictures.TILE


def test_every_test_image_counts_once_over_the_processes(folder_data, launch, tmp_path):
    (folder_data / "val" / "red" / "5.png").unlink()
    (folder_data / "val" / "red" / "2.png").write_bytes(b"")
    options = ("--data", folder_data, *SMALL, "--epochs", 2, "--engine", "fsdp2", "--micro-batch", 1, "--name", "r")
    processes = launch(*options, size=2)
    assert processes.wait() == [0, 0], processes.output()
    check_tables(tmp_path / "out" / "r", 10, tmp_path)


def test_the_first_batch_shows_what_the_model_gets(folder_data, tmp_path, monkeypatch):
    """Mixed labels as fractions, without the smoothing; and the run trains with that batch as it would have."""
    options = ("--data", folder_data, *SMALL, "--mixup", 0.8, "--reprob", 0.5, "--output", tmp_path, "--name", "r")
    run, seen = build("--model", "test_vit", *options), []
    monkeypatch.setattr(analysis, "contact_sheet", lambda *args: seen.append(args))
    expected = list(run.engine.loaders.begin(0, 0))
    batches = list(analysis.show_first_batch(run, run.engine.loaders.begin(0, 0)))
    for (images, target), (same_images, same_target) in zip(expected, batches, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(target, same_target)
    [(pictures, captions, path, _)] = seen
    assert path == run.folder / "first_batch.png"
    pixels = np.stack([np.asarray(picture) for picture in pictures]).transpose(0, 3, 1, 2) / 255
    mean, std = (np.array(values)[:, None, None] for values in (run.config.mean, run.config.std))
    np.testing.assert_allclose(pixels, np.clip(expected[0][0].numpy() * std + mean, 0, 1), atol=1 / 255)
    for caption, weights in zip(captions, expected[0][1], strict=True):
        fractions = {name: float(fraction) for fraction, name in (line.split() for line in caption.split("\n"))}
        assert sum(fractions.values()) == pytest.approx(1, abs=0.011)
        for name, weight in zip(("blue", "red"), weights.tolist(), strict=True):
            assert fractions.get(name, 0) == pytest.approx((weight - 0.05) / 0.9, abs=0.006)


def test_sheets_and_matrices_take_any_names_and_images(tmp_path):
    rng = np.random.default_rng(0)
    images = [
        Image.new(mode, size) for mode, size in itertools.product(("L", "RGB", "P", "1"), ((9, 9), (4000, 3), (1, 99)))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captions = list(itertools.islice(itertools.cycle(NAMES), len(images)))
        pictures.contact_sheet(images, captions, tmp_path / "sheet.png", NAMES[1])
        pictures.contact_sheet(images[:1], NAMES[:1], tmp_path / "one.png")
        for classes, side in ((len(NAMES), 700), (50, 1200), (1000, 1200), (3000, 1200)):
            names = [f"{NAMES[number % len(NAMES)]} {number}" for number in range(classes)]
            truth, predicted = rng.integers(0, classes, (2, 200))
            pictures.draw_confusion(tmp_path / "a.png", truth, predicted, names, NAMES[1])
            with Image.open(tmp_path / "a.png") as picture:
                assert side < picture.height < picture.width < 2100


def test_an_installed_font_with_the_letters_is_found(tmp_path):
    assert pictures.fonts(["猫", "cat"]) == ["DejaVu Sans"]
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((500, 1000))
    pen.lineTo((1000, 0))
    pen.closePath()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "cat"])
    font.setupCharacterMap({ord("猫"): "cat"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (500, 0), "cat": (1000, 0)})
    font.setupHorizontalHeader(ascent=1000, descent=0)
    font.setupNameTable({"familyName": "Cats", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "cats.ttf")
    fontManager.addfont(tmp_path / "cats.ttf")
    try:
        assert pictures.fonts(["猫", "cat"]) == ["DejaVu Sans", "Cats"]
        pictures.contact_sheet([Image.new("L", (9, 9))], ["猫"], tmp_path / "a.png")
    finally:
        fontManager.ttflist.pop()
    pictures.contact_sheet([Image.new("L", (9, 9))], ["猫"], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_names_are_shortened_in_their_middle():
    assert pictures.shorten("n01440764 a fish.JPEG", 99) == "n01440764 a fish.JPEG"
    assert pictures.shorten("n01440764 a fish.JPEG", 12) == "n01440….JPEG"
    assert pictures.shorten("猫" * 9, 9) == "猫猫猫…猫"
    assert pictures.shorten("a\x1b[2J", 20) == r"a\x1b[2J"


def test_pairs_are_listed_by_how_often_they_are_confused():
    truth, predicted = np.array([0, 1, 1, 2, 2, 2, 0]), np.array([0, 2, 2, 1, 0, 0, 1])
    assert pictures.confused(truth, predicted) == [(1, 2, 2), (2, 0, 2), (0, 1, 1), (2, 1, 1)]
    assert pictures.confused(truth, truth) == []
