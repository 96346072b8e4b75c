"""`--lr-find`: the sweep and its suggestion."""

import csv
import math

import numpy as np
import pytest
from PIL import Image
from runs import SMALL, build

from visattn.train.arguments import parse
from visattn.train.engine import Engine, Taken
from visattn.train.errors import ConfigError, NonFiniteLossError
from visattn.train.lr_find import UPDATES, Sweep, find_lr


def test_a_sweep_leaves_a_curve_and_a_suggestion_but_no_run(folder_data, run, capsys):
    options = ("--data", folder_data, *SMALL, "--epochs", 1)
    code, folder = run("r", *options, "--lr-find")
    assert code == 0
    assert not folder.exists()
    folder = folder.with_name("r-lr-find")
    assert sorted(path.name for path in folder.iterdir()) == ["args.yaml", "lr_find.csv", "lr_find.png"]
    with open(folder / "lr_find.csv", newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert 30 < len(rows) <= UPDATES
    steps = np.diff(np.log10([row["lr"] for row in rows]))
    np.testing.assert_allclose(steps, 8 / (UPDATES - 1))
    lowest = min(rows, key=lambda row: row["smoothed"])
    assert f"try --lr {lowest['lr'] / 10:.1e}: a tenth of" in capsys.readouterr().out
    assert 1e-5 < lowest["lr"] < 1
    with Image.open(folder / "lr_find.png") as picture:
        assert picture.size == (840, 600)
    assert run("r", *options)[0] == 0


@pytest.mark.parametrize("end", ["raised", "nan"])
def test_the_suggestion_is_a_tenth_of_the_best_rate(folder_data, tmp_path, monkeypatch, end):
    """Of losses that fall until 1e-2, up to the smoothing's lag; whatever they end with."""

    def update(self, batches, speed):
        self.state.update += 1
        lr = max(group["lr"] for group in self.state.optimizer.param_groups)
        self.state.scheduler.step_update(self.state.update)
        if lr > 0.5 and end == "raised":
            raise NonFiniteLossError("x")
        return Taken(math.nan if lr > 0.5 else 2 + abs(math.log10(lr) + 2), 1.0, lr, False)

    monkeypatch.setattr(Engine, "update", update)
    options = ("--data", folder_data, "--model", "test_vit", *SMALL, "--layer-decay", 0.5, "--output", tmp_path)
    made = build(*options, "--lr-find", "--name", "r")
    assert 1e-3 <= find_lr(made) < 5e-3
    assert "nan" not in (made.folder / "lr_find.csv").read_text()
    sweep = Sweep(made.state.optimizer)
    first = [group["lr"] for group in made.state.optimizer.param_groups]
    sweep.step_update(UPDATES - 1)
    assert [group["lr"] * 1e-8 for group in made.state.optimizer.param_groups] == pytest.approx(first)
    assert len(set(first)) > 2


def test_no_suggestion_where_the_loss_never_falls(folder_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Engine, "update", lambda *args: Taken(1.0, 1.0, 1e-3, False))
    made = build("--data", folder_data, "--model", "test_vit", *SMALL, "--output", tmp_path, "--lr-find")
    assert find_lr(made) is None


def test_a_sweep_is_of_a_new_run():
    with pytest.raises(ConfigError, match=r"--lr-find: expected a new run, got --resume; try without"):
        parse(["--lr-find", "--resume", "auto", "--name", "r"])
