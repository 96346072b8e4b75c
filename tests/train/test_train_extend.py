"""`--resume` with other options: what can be meant is done and said, the rest is refused."""

import pytest
import yaml
from runs import PLAIN, SMALL, build, column, newest, rows

from visattn.train import run as trainer
from visattn.train.arguments import parse
from visattn.train.errors import CheckpointError, ConfigError


@pytest.fixture
def begun(folder_data, tmp_path):
    """Make a run folder as if it had come to an update: (what build takes to resume it)."""

    def begin(update, *options):
        made = build(
            "--data", folder_data, "--model", "test_vit", *SMALL, "--output", tmp_path, "--name", "r", *options
        )
        made.state.update = update
        made.state.scheduler.step_update(update)
        assert trainer.save(made)
        return "--resume", made.folder

    return begin


def test_a_complete_run_is_extended(folder_data, run, capsys):
    options = ("--data", folder_data, *PLAIN)
    code, folder = run("r", *options, "--epochs", 2)
    assert code == 0
    before = rows(folder)
    code, _ = run("r", "--resume", folder, "--epochs", 4)
    assert code == 0
    said = "from here on --epochs 4 (was 2); the learning rate goes from 1e-05 to 0.000505\n"
    assert said in capsys.readouterr().out
    assert rows(folder)[:2] == before
    _, whole = run("whole", *options, "--epochs", 4)
    assert column(folder, "lr")[2:] == column(whole, "lr")[2:]
    assert len(rows(folder)) == 4
    assert yaml.safe_load((folder / "args.yaml").read_text())["epochs"] == 4
    assert run("r", "--resume", folder)[0] == 0
    assert "from here on" not in capsys.readouterr().out
    assert run("r", "--resume", folder, "--override", "--smoothing", 0.2)[0] == 2
    assert "expected epochs that are left to train, got none and --smoothing 0.2 (was 0.1)" in capsys.readouterr().err
    assert yaml.safe_load((folder / "args.yaml").read_text())["smoothing"] == 0.1


def test_a_run_is_shortened_to_what_has_begun(begun, capsys):
    resume = begun(6, "--epochs", 5, "--cooldown-epochs", 1)  # half of the second of 5 + 1 epochs
    with pytest.raises(ConfigError, match=r"--epochs: expected at least the 2 that have begun, got 1; try --epochs 2"):
        build(*resume, "--epochs", 1, "--cooldown-epochs", 0, "--override")
    with pytest.raises(ConfigError, match=r"--warmup-epochs: expected fewer than --epochs 1"):
        build(*resume, "--epochs", 1, "--warmup-epochs", 1, "--override")
    assert build(*resume, "--epochs", 1).epochs == 2
    shorter = build(*resume, "--epochs", 2, "--cooldown-epochs", 0, "--override")
    assert (shorter.epochs, shorter.trained, shorter.state.update) == (2, False, 6)
    assert build(*resume).epochs == 2


def test_overridden_options_come_into_force_and_stay(begun, capsys):
    resume = begun(4, "--epochs", 2, "--lr", 1e-3, "--weight-decay", 0.05, "--layer-decay", 0.5)
    with pytest.raises(
        CheckpointError, match=r"got --lr 0.0001 \(was 0.001\); try --resume without them, .* --override"
    ):
        build(*resume, "--lr", 1e-4)
    build(*resume, "--lr", 1e-4, "--weight-decay", 0.1, "--amp", "float16", "--nonfinite", "skip", "--override")
    again = build(*resume)  # nothing was saved in between: args.yaml goes first
    assert (again.config.lr, again.config.amp, again.config.nonfinite) == (1e-4, "float16", "skip")
    groups = again.state.optimizer.param_groups
    assert max(group["lr"] for group in groups) == pytest.approx((1e-4 + 1e-5) / 2)
    assert {group["weight_decay"] for group in groups} == {0, 0.1}
    assert trainer.save(again)
    assert build(*resume, "--amp", "none", "--override").config.amp == "none"


@pytest.mark.parametrize(("update", "size", "shift"), [(4, 5, -2), (6, 16, 3), (0, 3, 0)])
def test_another_batch_size_goes_on_after_the_same_images(begun, update, size, shift):
    """Of 32 images in batches of 8: update 6 is half of the second epoch."""
    resume = begun(update, "--epochs", 3)
    made = build(*resume, "--batch-size", size, "--override")
    assert made.state.shift == shift
    made.state.history.append({"update": update})
    assert trainer.save(made)
    again = build(*resume)
    epoch, done = divmod(again.state.place, again.updates)
    again.engine.loaders.batches.begin(epoch, done)
    assert next(iter(again.engine.loaders.batches))[0][:2] == divmod(update * 8, 32)
    assert newest(again.folder).name == f"{update:08d}"


def test_another_batch_size_that_splits_an_epoch_elsewhere_is_refused(begun):
    resume = begun(6, "--epochs", 3)
    for size in (12, 5, 32):
        with pytest.raises(
            CheckpointError, match=f"a divisor of the 16 images of epoch 2 so far, got {size}; try 8 until"
        ):
            build(*resume, "--batch-size", size, "--override")


def test_a_run_with_another_batch_size_ends_where_it_should(folder_data, run):
    _, folder = run("r", "--data", folder_data, *SMALL, "--epochs", 1)
    code, _ = run("r", "--resume", folder, "--epochs", 3, "--batch-size", 16, "--override")
    assert code == 0
    assert [(row["epoch"], row["update"]) for row in rows(folder)] == [("1", "4"), ("2", "6"), ("3", "8")]


def test_what_makes_it_another_run_is_refused(begun):
    resume = begun(4, "--epochs", 2)
    for changed in (("--model", "test_vit2"), ("--seed", 1), ("--opt", "sgd"), ("--ema-decay", 0.9)):
        words = r"got --\S+ \S+ \(was .*--override, which changes all but data, .*, seed$"
        with pytest.raises(CheckpointError, match=words):
            build(*resume, *changed, "--override")


def test_override_needs_a_run(tmp_path):
    with pytest.raises(ConfigError, match=r"--override: expected --resume, whose options it changes, got none"):
        parse(["--override"])
    assert parse(["--override", "--resume", "auto", "--name", "r", "--output", str(tmp_path)]).override
