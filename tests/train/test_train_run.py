"""Whole runs: they learn, repeat themselves, do as the options say, and leave the files they promise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from runs import newest, rows

from visattn.train import distributed, metrics
from visattn.train import run as trainer
from visattn.train.arguments import parse

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--img-size", 32, "--batch-size", 8, "--epochs", 2, "--warmup-epochs", 0)
REPORT = re.compile(
    r"^test accuracy \d+\.\d\d % \(best \d+\.\d\d % at epoch \d+(, EMA \d+\.\d\d %)?\) in \d+ s$", re.MULTILINE
)


def test_digits_are_learned(run, capsys):
    code, folder = run("r", "--epochs", 4, "--warmup-epochs", 1, model="test_convnext")
    assert code == 0
    log = rows(folder)
    assert len(log) == 4
    assert float(log[-1]["top1"]) > 80  # chance is 10
    assert float(log[-1]["train_loss"]) < 0.7 * float(log[0]["train_loss"])
    assert REPORT.search(capsys.readouterr().out)


def test_folder_run_leaves_the_promised_files(folder_data, run):
    code, folder = run("r", "--data", folder_data, *SHORT, "--auto-augment", "rand-m9-mstd0.5-inc1")
    assert code == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "args.yaml",
        "log.csv",
        "checkpoints",
        "config.json",
        "model.safetensors",
        "model.safetensors.sha256",
        "curves.png",
        "first_batch.png",
        "confusion.png",
        "confusion.csv",
        "classes.csv",
        "worst.png",
    }
    log = rows(folder)
    assert tuple(log[0]) == metrics.COLUMNS
    assert [row["epoch"] for row in log] == ["1", "2"]
    assert 0 < float(log[1]["lr"]) < float(log[0]["lr"]) < 2e-3
    with Image.open(folder / "curves.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(image.convert("L").getcolors(256)) > 10


def test_same_seed_same_losses(folder_data, run):
    options = ("--data", folder_data, *SHORT, "--reprob", 0.5, "--drop-path", 0.1)
    losses = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(3)
        _, folder = run(name, *options, "--seed", seed)
        losses[name] = [(row["train_loss"], row["eval_loss"], row["top1"]) for row in rows(folder)]
    assert losses["a"] == losses["b"]
    assert losses["a"] != losses["c"]


@pytest.mark.parametrize("mixup", [0, 0.2])
def test_label_smoothing_bounds_the_training_loss(folder_data, run, mixup):
    """Two classes smoothed by 0.5 have targets of 0.75 and 0.25, whose entropy 0.562 no loss can undercut."""
    options = ("--data", folder_data, *SHORT, "--mixup", mixup)
    _, smooth = run("smooth", *options, "--smoothing", 0.5)
    _, sharp = run("sharp", *options, "--smoothing", 0)
    assert min(float(row["train_loss"]) for row in rows(smooth)) >= 0.562
    assert float(rows(sharp)[-1]["train_loss"]) < 0.5
    assert float(rows(sharp)[-1]["eval_loss"]) < 0.2


def test_options_reach_the_model_the_optimizer_and_the_transforms(folder_data, tmp_path):
    options = ("--model", "test_vit", "--data", folder_data, *SHORT, "--output", tmp_path / "out", "--name", "r")
    options += ("--drop-path", 0.3, "--layer-decay", 0.5, "--weight-decay", 0.1, "--color-jitter", 0.2, "--hflip", 0.4)
    options += ("--crop-pct", 0.5, "--cooldown-epochs", 3, "--reprob", 0.6)
    config = parse([str(value) for value in options])
    built = trainer.build(config, distributed.start(config), metrics.make_console())
    rates = [module.drop_prob for module in built.state.task.modules() if type(module).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.3)
    groups = built.state.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    assert {1.0, 0.5} < {group["lr_scale"] for group in groups}
    train, test = built.engine.loaders.train, built.engine.loaders.eval
    transforms = {type(step).__name__: step for step in train.dataset.transform.transforms}
    assert transforms["RandomHorizontalFlip"].p == 0.4
    assert transforms["ColorJitter"].brightness == pytest.approx([0.8, 1.2])
    assert train.random_erasing.erasing.probability == 0.6
    assert test.random_erasing is None
    assert test.dataset.transform.transforms[0].size == 64
    assert built.epochs == 2 + 3


def final_weights(folder):
    shard = next(newest(folder).glob("*.safetensors"))
    weights = safetensors.torch.load_file(shard)
    return torch.cat([v.flatten() for k, v in weights.items() if k.startswith("model.") and v.is_floating_point()])


def test_accumulated_gradients_equal_a_larger_pass(folder_data, run):
    """--micro-batch only bounds the images of a forward pass: 5 of 32 become 8 passes of 4."""
    fixed = ("--data", folder_data, "--img-size", 32, "--epochs", 1, "--warmup-epochs", 0, "--opt", "sgd")
    fixed += ("--scale", 1, 1, "--ratio", 1.2, 1.2, "--hflip", 0, "--lr", 0.1)
    _, large = run("large", *fixed, "--batch-size", 32)
    _, joined = run("joined", *fixed, "--batch-size", 32, "--micro-batch", 5)
    _, small = run("small", *fixed, "--batch-size", 8)
    torch.testing.assert_close(final_weights(large), final_weights(joined), atol=1e-5, rtol=1e-4)
    assert (final_weights(large) - final_weights(small)).abs().max() > 1e-3
    assert [newest(folder).name for folder in (large, joined, small)] == ["00000001", "00000001", "00000004"]


def test_clipping_limits_the_step(folder_data, run):
    fixed = ("--data", folder_data, "--img-size", 32, "--batch-size", 32, "--epochs", 1, "--warmup-epochs", 0)
    fixed += ("--opt", "sgd", "--lr", 1, "--weight-decay", 0)
    _, start = run("start", *fixed, "--grad-clip", 1e-9)
    _, clipped = run("clipped", *fixed, "--grad-clip", 1e-2)
    # One step of Nesterov SGD (momentum 0.9) from zero momentum moves by lr x 1.9 x the gradient.
    assert (final_weights(clipped) - final_weights(start)).norm().item() == pytest.approx(1.9e-2, rel=1e-2)
    # float16 may skip its first steps, which overflow; clipping the still scaled gradients would leave steps of 1e-7.
    _, half = run("half", *fixed, "--grad-clip", 1e-2, "--amp", "float16", "--batch-size", 8)
    assert 1e-2 < (final_weights(half) - final_weights(start)).norm().item() < 0.2


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_stays_close(folder_data, run, amp):
    fixed = ("--data", folder_data, *SHORT, "--layer-decay", 0.9, "--lr", 2e-5)
    _, full = run("full", *fixed)
    code, mixed = run(amp, *fixed, "--amp", amp)
    assert code == 0
    scaler = json.loads((newest(mixed) / "state.json").read_text())["scaler"]
    assert bool(scaler) == (amp == "float16")
    first, other = (float(rows(folder)[0]["train_loss"]) for folder in (full, mixed))
    assert first != other
    assert other == pytest.approx(first, rel=0.1)
    assert float(rows(mixed)[1]["train_loss"]) < other


def test_logs_are_plain_text(folder_data, tmp_path):
    """A real process, piped, with the variables that make rich colour its output."""
    command = (sys.executable, "-m", "train", "--model", "test_vit", "--data", folder_data, *SHORT)
    done = subprocess.run(
        [*map(str, command), "--output", str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": "40", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout)
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith("epoch ")]) == 2
    assert REPORT.search(done.stdout)
    folder = Path(lines[-1].removeprefix("output: "))
    assert re.fullmatch(r"test_vit-pictures-\d{8}-\d{6}", folder.name)
    assert newest(folder).name == "00000008"
