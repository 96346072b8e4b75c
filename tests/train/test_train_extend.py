"""`--resume` with other options: what can be meant is done and said, the rest is refused."""

import pytest
import yaml
from runs import PLAIN, SMALL, assert_same_tensors, build, column, newest, rows, stop_after_first_epoch

from visattn.train import metrics
from visattn.train import run as trainer
from visattn.train.arguments import parse
from visattn.train.engine import Engine
from visattn.train.errors import CheckpointError, ConfigError
from visattn.train.model import warmup


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
    assert build(*resume, "--epochs", 1).epochs == 2
    shorter = build(*resume, "--epochs", 2, "--cooldown-epochs", 0, "--override")
    assert (shorter.epochs, shorter.trained, shorter.state.update) == (2, False, 6)
    assert build(*resume).epochs == 2


def test_patience_ends_a_run_early_and_a_resume_knows(folder_data, run, capsys, monkeypatch):
    tops, real = (50.0, 80.0, 90.0, 70.0, 90.0, 80.0, 85.0), Engine.evaluate
    monkeypatch.setattr(Engine, "evaluate", lambda *args: {**real(*args), "top1": tops[args[0].state.update - 1]})
    options = ("--data", folder_data, *PLAIN, "--epochs", 7)
    code, folder = run("r", *options, "--patience", 2)
    assert code == 0
    assert column(folder, "top1") == [50, 80, 90, 70, 90]
    assert "stopped early: 2 epochs without a better top-1; --resume" in capsys.readouterr().out
    stop_after_first_epoch(folder, folder.with_name("parts"))
    for name, more, epochs in (("parts", (), 5), ("r", (), 5), ("r", ("--override", "--patience", 3), 6)):
        assert run(name, "--resume", folder.with_name(name), *more)[0] == 0
        assert column(folder.with_name(name), "top1") == list(tops[:epochs])
    assert_same_tensors(folder.with_name("parts"), run("whole", *options, "--patience", 2)[1])
    capsys.readouterr()
    assert run("all", *options)[0] == 0
    assert "stopped early" not in capsys.readouterr().out
    assert column(folder.with_name("all"), "top1") == list(tops)


def test_an_average_that_gets_better_is_waited_for():
    history = [{"top1": top1, "ema_top1": ema} for top1, ema in ((50, 10), (60, 20), (60, 30), (55, 30))]
    assert metrics.epochs_since_best(history) == 1
    assert metrics.epochs_since_best([row | {"ema_top1": None} for row in history]) == 2
    assert metrics.epochs_since_best([]) == 0


def test_the_warmup_of_a_short_run_shrinks(folder_data, tmp_path, capsys):
    options = ("--data", folder_data, "--img-size", 32, "--batch-size", 8, "--output", tmp_path, "--model", "test_vit")
    for epochs, rates in ((1, [1e-5, 1.005e-3, 1.005e-3]), (3, [1e-5, 1e-5 + 1.99e-3 / 8, 1e-5 + 2 * 1.99e-3 / 8])):
        made, found = build(*options, "--epochs", epochs, "--name", epochs), []
        for update in range(3):
            made.state.scheduler.step_update(update)
            found.append(max(group["lr"] for group in made.state.optimizer.param_groups))
        assert found == pytest.approx(rates)
    config = parse(["--epochs", "2", "--warmup-epochs", "2"])
    assert (config.warmup_epochs, warmup(config)) == (2, 1)


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
