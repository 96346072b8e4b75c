"""`--val-split`: a folder of class folders alone becomes a training and a test split, the same one every time."""

import dataclasses
import shutil

import numpy as np
import pytest
from runs import PLAIN, column, rows

from visattn.train.config import Config
from visattn.train.data import open_data, open_eval, resolve
from visattn.train.errors import ConfigError, DataError, DataNotFoundError
from visattn.train.validate import main as validate

RGB = {"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.2), "interpolation": "bilinear"}


def config_for(data, **options):
    return resolve(dataclasses.replace(Config(), data=str(data), **{"val_split": 0.25, **options}), RGB)


def names(source, root):
    return {source.name(index).removeprefix(str(root)) for index in range(len(source))}


@pytest.fixture
def flat(folder_data):
    """16 images each of blue and red, and 3 of green."""
    (folder_data / "train" / "green").mkdir()
    for index in range(3):
        shutil.copy(folder_data / "train" / "red" / f"{index}.png", folder_data / "train" / "green")
    return folder_data / "train"


def test_each_class_keeps_its_share_for_testing(flat, tmp_path):
    data = open_data(config_for(flat))
    assert data.class_names == ["blue", "green", "red"]
    assert np.bincount(data.train.targets).tolist() == [12, 2, 12]
    assert np.bincount(data.eval.targets).tolist() == [4, 1, 4]
    kept = names(data.eval, flat)
    assert not kept & names(data.train, flat)
    assert data.eval.report == (
        f"{flat}: 9 images of 3 classes; kept for testing, of 35, by --val-split 0.25 and --seed 42"
    )
    for share, images in ((0.1, [2, 1, 2]), (0.9, [14, 2, 14])):  # always one, never all
        assert np.bincount(open_data(config_for(flat, val_split=share)).eval.targets).tolist() == images
    # Anywhere, after any other order of listing, and whatever comes to the other classes.
    shutil.copytree(flat, tmp_path / "elsewhere")
    shutil.copytree(flat / "red", tmp_path / "elsewhere" / "a")
    moved = names(open_eval(config_for(tmp_path / "elsewhere"))[0], tmp_path / "elsewhere")
    assert {name for name in moved if not name.startswith("/a/")} == kept
    assert names(open_eval(config_for(flat, seed=1))[0], flat) != kept


def test_a_run_keeps_its_split(flat, run, capsys):
    options = ("--data", flat, *PLAIN, "--batch-size", 26, "--val-split", 0.25)
    code, whole = run("whole", *options, "--epochs", 2)
    assert code == 0
    code, parts = run("parts", *options, "--epochs", 1)
    assert run("parts", "--resume", parts, "--epochs", 2)[0] == 0
    assert "26 training and 9 test images" in capsys.readouterr().out
    assert validate(["--run", str(whole)]) == 0
    best = max(rows(whole), key=lambda row: float(row["top1"]))
    assert f"{float(best['eval_loss']):.4f}" in capsys.readouterr().out
    assert validate(["--run", str(whole), "--data", str(flat.parent)]) == 2  # its own val/, which has no green
    assert column(parts, "train_loss")[0] != column(parts, "train_loss")[1]
    assert run("parts", "--resume", parts, "--epochs", 3, "--val-split", 0.5)[0] == 2


def test_folders_that_cannot_be_split(flat, folder_data, tmp_path):
    with pytest.raises(DataError, match=r"^--val-split: expected .* alone, got .*/pictures with val, .*; try without"):
        open_data(config_for(folder_data))
    with pytest.raises(ConfigError, match=r"^--val-split: expected a folder .*, got hfds/x; try without it"):
        open_data(config_for("hfds/x"))
    with pytest.raises(DataNotFoundError, match=r"expected the folder .*/no, got none; try --data DIR"):
        open_data(config_for(tmp_path / "no"))
    for path in sorted((flat / "green").iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match=r"^--val-split: expected at least 2 images of each class .*, got 1 of green; "):
        open_data(config_for(flat))


def test_a_flat_folder_suggests_a_split(flat, tmp_path):
    with pytest.raises(DataNotFoundError, match=r"got blue, green, red; try --val-split 0.2, which keeps"):
        open_data(config_for(flat, val_split=None))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataNotFoundError, match=r"got an empty folder; try --data DIR"):
        open_data(config_for(tmp_path / "empty", val_split=None))
