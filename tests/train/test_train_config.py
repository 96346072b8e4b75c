"""Options: defaults < file < command line, and what is said when they are wrong."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from train.config import LAUNCH_ONLY, Config, check, parse, read_yaml, recipe
from train.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs" / "imagenet").glob("*.yaml"))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_command_line_overrides_file_overrides_defaults(tmp_path):
    file = write(tmp_path / "a.yaml", "lr: 1e-4\nepochs: 7\nscale: [0.5, 1]\nwarmup_epochs: 1\n")
    config = parse(["--config", str(file), "--epochs", "9"])
    assert (config.lr, config.epochs, config.scale, config.batch_size) == (1e-4, 9, (0.5, 1.0), Config().batch_size)
    assert isinstance(config.lr, float)
    assert parse([f"--config={file}"]).epochs == 7


def test_recipe_round_trips_through_yaml(tmp_path):
    config = dataclasses.replace(Config(), mean=(0.1, 0.2, 0.3), grad_clip=5.0, amp="bfloat16", run="x")
    assert read_yaml(write(tmp_path / "a.yaml", yaml.safe_dump(recipe(config)))) == config


def test_unknown_key_names_the_nearest_and_exits_with_2(tmp_path, run, capsys):
    code, folder = run("r", "--config", write(tmp_path / "a.yaml", "weigth_decay: 0.1\n"))
    assert code == 2
    assert not folder.exists()
    error = capsys.readouterr().err
    assert "unknown key 'weigth_decay'; try 'weight_decay'" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs: many", "epochs: expected int, got 'many'"),
        ("epochs: 3.5", "epochs: expected int"),
        ("epochs: true", "epochs: expected int"),
        ("lr: true", "lr: expected float"),
        ("model: 3", "model: expected str"),
        ("scale: [0.1]", "scale: expected tuple"),
        ("amp: fp8", "amp: expected one of none, bfloat16, float16"),
        ("interpolation: cubic", "interpolation: expected one of nearest"),
        ("- a\n- b", "expected `option: value` lines, got a list"),
        ("a: [", "expected flat YAML"),
        ("resume: x", "unknown key 'resume'"),
        ("1: 2", "unknown key 1"),
        ("lr: !!python/object/apply:os.getcwd []", "expected flat YAML"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, words):
    with pytest.raises(ConfigError, match=r"expected .*, got .*; try ") as caught:
        read_yaml(write(tmp_path / "a.yaml", text))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0, "warmup_epochs": 0},
        {"lr": float("nan")},
        {"lr": 1e-6},
        {"in_chans": 2},
        {"reprob": 1.5},
        {"scale": (0.9, 0.5)},
        {"std": (0.0,)},
        {"warmup_epochs": 99},
        {"mixup": 0.8, "batch_size": 7},
    ],
)
def test_impossible_values_are_refused(change):
    with pytest.raises(ConfigError, match=r"expected .*, got .*; try "):
        check(dataclasses.replace(Config(), **change))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--model", "test_vitt"), "'test_vitt'; try test_vit"),
        (("--opt", "adamww"), "'adamww'; try adamw"),
        (("--device", "abacus"), "--device: expected a usable device"),
        (("--auto-augment", "magic"), "--auto-augment: expected a timm policy"),
        (("--mean", "0.1", "0.2"), "--mean: expected 1 or 1 values, got 2"),
        (("--batch-size", "5000"), "--batch-size: expected at most the 1437 training images"),
        (("--config", "a.yaml", "--resume", "b"), "expected --config or --resume, got both"),
    ],
)
def test_impossible_runs_exit_with_2(run, capsys, args, words):
    code, folder = run("r", *args)
    assert code == 2
    assert words in capsys.readouterr().err
    assert not folder.exists()


def test_unknown_flag_exits_with_2(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("r", "--modle", "x")
    assert "--model" in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_complete_and_valid(path):
    config = read_yaml(path)
    check(config)
    options = {field.name for field in dataclasses.fields(Config)} - set(LAUNCH_ONLY) - {"run"}
    assert set(yaml.safe_load(path.read_text())) - {"workers"} == options - {"workers"}
    assert isinstance(config.model, str)
    assert config.model == path.stem
    assert len(path.read_text().splitlines()) <= 60


def test_there_is_a_shipped_recipe():
    assert RECIPES
