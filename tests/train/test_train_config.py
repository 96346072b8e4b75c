"""Options: defaults < file < command line, and what is said when they are wrong."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import timm
import yaml

from visattn.train.arguments import parse
from visattn.train.checks import check
from visattn.train.config import Config, recipe
from visattn.train.errors import ConfigError
from visattn.train.recipes import read_yaml
from visattn.train.validate import Options

# Every option with its default. People's recipes and scripts rely on both.
FROZEN = """
recipe null, config null, print_config false, resume null, override false, lr_find false,
push_to_hub null, hub_license null
data digits, val_split null, max_bad 0.01, workers 0, model dinat_atto, model_args [],
pretrained false, weights null, train_only [], output output, name null
img_size null, in_chans null, mean null, std null, interpolation null, crop_pct null, crop_mode null
epochs 15, cooldown_epochs 0, patience null
batch_size 64, micro_batch null, opt adamw, sched cosine, lr 0.002, min_lr 1.0e-05,
warmup_lr 1.0e-05, warmup_epochs 2, weight_decay 0.05, layer_decay null, grad_clip null, ema_decay 0.0, ema_warmup true
smoothing 0.1, aux_loss 0.0, drop_path null, mixup 0.0, cutmix 0.0, aug_repeats 1, scale null, ratio null, hflip null,
color_jitter 0.0, auto_augment null, reprob 0.0, train_interpolation null
kd_model null, kd_weights null, kd_type logit, kd_weight 1.0, kd_temperature 1.0
device auto, engine ddp, amp none, compile false, channels_last false, grad_checkpointing false, sync_bn false,
dist_timeout 600, seed 42
nonfinite halt, max_skips 10, checkpoint_every 0, keep_checkpoints 2, tensorboard false, wandb off,
wandb_project visattn, peak_tflops null
"""


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
    config = dataclasses.replace(Config(), mean=(0.1, 0.2, 0.3), grad_clip=5.0, amp="bfloat16", name="x")
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
        ("false", "expected `option: value` lines, got a bool"),
        (f"lr: {'[' * 2000}", "values nested too deeply"),
        ("a: &a {x: 1}\nb: {<<: [*a, *a]}", "an alias of more than one value, *a"),
        (f"lr: 1{' ' * 50_000}", "got more than 50000 characters"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, words):
    with pytest.raises(ConfigError, match=r"expected .*, got .*; try ") as caught:
        read_yaml(write(tmp_path / "a.yaml", text))
    assert words in str(caught.value)


@pytest.mark.parametrize("file", ["/dev/zero", "."])
def test_only_files_are_read(file):
    with pytest.raises(ConfigError, match=f"expected a YAML file at {file}, got something else than a plain file; try"):
        read_yaml(Path(file))


@pytest.mark.parametrize(
    ("flag", "change"),
    [
        ("--min-lr", {"lr": 1e-6}),
        ("--in-chans", {"in_chans": 2}),
        ("--scale", {"scale": (0.9, 0.5)}),
        ("--ratio", {"ratio": (1.3, 0.7)}),
        ("--mean", {"mean": ()}),
        ("--train-only", {"train_only": ("head.*", "")}),
        ("--wandb-project", {"wandb_project": ""}),
        ("--name", {"name": "../elsewhere"}),
        ("--name", {"name": ".."}),
        ("--name", {"name": " "}),
        ("--data", {"data": " "}),
        ("--output", {"output": Path("a/b\nc")}),
        ("--model-args", {"model_args": ("a=\x1b[2J",)}),
        ("--batch-size", {"mixup": 0.8, "batch_size": 7}),
        ("--micro-batch", {"cutmix": 1.0, "micro_batch": 7}),
        ("--model-args", {"model_args": ("window_size",)}),
        ("--model-args", {"model_args": ("window size=7",)}),
        ("--model-args", {"model_args": ("a=1", "a=2")}),
        ("--drop-path", {"model_args": ("drop_path_rate=0.1",)}),
        ("--pretrained or --weights", {"pretrained": True, "weights": Path("a.safetensors")}),
        ("--kd-weights", {"kd_weights": Path("a.safetensors")}),
        ("--kd-type", {"kd_type": "token"}),
        ("--kd-temperature", {"kd_temperature": 2.0}),
        ("--aux-loss or --kd-model", {"aux_loss": 0.4, "kd_model": "test_vit"}),
    ],
)
def test_impossible_values_are_refused(flag, change):
    with pytest.raises(ConfigError, match=r"expected .*, got .*; try ") as caught:
        check(dataclasses.replace(Config(), **change))
    assert flag in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"mixup": 0.8, "micro_batch": 2},
        {"batch_size": 7, "micro_batch": 3},
        {"warmup_epochs": 0, "epochs": 1},
        {"sched": "constant", "warmup_epochs": 1},
        {"model_args": ("window_size=7", "attention_args={a: 1}")},
        {"kd_model": "test_vit", "kd_weights": Path("a.safetensors"), "kd_type": "token", "kd_temperature": 2.0},
        {"name": "a.b", "max_bad": 0.0},
    ],
)
def test_possible_values_are_accepted(change):
    check(dataclasses.replace(Config(), **change))


def test_what_models_bring_is_in_range():
    """Else a run that takes it from its model could not be resumed."""
    for name in timm.list_models(pretrained=True):
        cfg = timm.get_pretrained_cfg(name)
        values = {"mean": cfg.mean, "std": cfg.std, "crop_pct": cfg.crop_pct, "img_size": cfg.input_size[-1]}
        check(dataclasses.replace(Config(), **values))


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


@pytest.mark.parametrize("options", [Config, Options])
def test_every_option_has_a_help_text(options):
    """The comment after it, from which tyro takes it."""
    texts = dict(re.findall(r"^    (\w+): .*?  # (\w.*)$", inspect.getsource(options), re.MULTILINE))
    assert texts.keys() == {field.name for field in dataclasses.fields(options)}


def test_options_and_their_defaults_are_frozen():
    frozen = dict(item.split() for item in FROZEN.replace("\n", ",").split(",") if item.strip())
    now = {}
    for field in dataclasses.fields(Config):
        value = str(field.default) if isinstance(field.default, Path) else field.default
        value = list(value) if isinstance(value, tuple) else value
        now[field.name] = yaml.safe_dump(value, default_flow_style=True).split("\n")[0].strip("'")
    changed = {name for name in now.keys() | frozen.keys() if now.get(name) != frozen.get(name)}
    assert not changed, f"options changed: {sorted(changed)}; CHANGELOG.md needs a line about each, then change FROZEN"
