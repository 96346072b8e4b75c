"""Every option with every kind of hostile value: refused in one sentence, or a finished first update."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest
import timm
import yaml
from runs import NONSENSE, WORDS, attempt
from safetensors.torch import save_file

from visattn.train import distributed, metrics
from visattn.train import run as trainer
from visattn.train.arguments import parse
from visattn.train.checks import check
from visattn.train.config import LAUNCH_ONLY, Config, recipe
from visattn.train.errors import ConfigError
from visattn.train.recipes import read_yaml

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
HINTS = typing.get_type_hints(Config)
# 9^10 words, of which the file holds one.
BOMB = ", ".join(["&a0 [x]", *(f"&a{n} [{', '.join(9 * [f'*a{n - 1}'])}]" for n in range(1, 11))])
YAML = (*NONSENSE, "0", "2147483648", "word", '""', r'"a\nb"', r'"\e[31mred"', f'"{"x" * 5000}"', ".nan", "-.inf")
YAML += ("1.0e-320", "1.0e+30", "[]", "[[1]]", "{a: 1}", "null", "true", "false", "2024-01-01", f"0x{'f' * 5000}")
YAML += (f"[{BOMB}]", "!!binary aGk=", "!!set {a}", "!!int ''", "!!timestamp x", "&a [*a]")
BASE = {"model": "test_dinat", "img_size": 32, "batch_size": 8, "warmup_epochs": 0, "data": "digits"}
# In range, but more than a test has time or memory for.
TOO_MUCH = {("img_size", 8192), ("compile", True)}
# What an option needs beside it before it is looked at.
BESIDE = {name: {"kd_model": "test_dinat", "kd_weights": "weights.safetensors"} for name in FIELDS if "kd_" in name}
BESIDE |= {"aux_loss": {"model": "test_overlock", "model_args": ["aux_head=true"]}}
NUMBERS = {name for name, hint in HINTS.items() if re.search(r"\b(int|float)\b", str(hint))}


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def first_update(config):
    """Take it, for what comes before too: one batch of test images."""
    run = trainer.build(config, distributed.start(config), metrics.make_console(enabled=False))
    run.engine.update(run.engine.loaders.begin(0, 0), metrics.Speed())
    next(iter(run.engine.loaders.eval))
    assert run.state.update == 1


def values(name, words):
    """The words, and for numbers the ends of their range."""
    allowed = FIELDS[name].metadata.get("range")
    ends = {allowed.low, allowed.high, *({allowed.tiny} if allowed.low == 0 else ())} if allowed else ()
    return (*words, *(format(end, ".12g") for end in ends))


def command_lines(name):
    """What is accepted of the option with each value, or with two where it takes two."""
    hint, flag = str(HINTS[name]), f"--{name.replace('_', '-')}"
    Path("base.yaml").write_text(yaml.safe_dump(BASE | BESIDE.get(name, {})))
    # What is no number says the same to all of them; tyro is slow.
    for word in values(name, WORDS if name in NUMBERS else WORDS[len(NONSENSE) :]):
        words = (f"num_heads={word}",) if name == "model_args" else (word,) * (1 + ("float, float" in hint))
        start = () if name in LAUNCH_ONLY else ("--config", "base.yaml")
        if config := attempt(parse, [*start, flag, *words]):
            assert name not in NUMBERS or word not in NONSENSE, words
            yield config


def read(text):
    """The checked config of a file."""
    Path("a.yaml").write_text(text)
    config = read_yaml(Path("a.yaml"))
    check(config)
    return config


def files(name):
    """What is accepted of the option in a file with each value, or with lists of it where it takes these."""
    base = yaml.safe_dump({key: value for key, value in (BASE | BESIDE.get(name, {})).items() if key != name})
    for word in values(name, YAML) if name not in LAUNCH_ONLY else ():
        for text in (word, f"[{word}]", f"[{word}, {word}]") if "tuple" in str(HINTS[name]) else (word,):
            if config := attempt(read, f"{base}{name}: {text}\n"):
                assert name not in NUMBERS or word not in NONSENSE, text
                yield config


@pytest.mark.parametrize("walk", [command_lines, files])
def test_every_option_with_every_value(walk):
    accepted = [config for name in FIELDS for config in walk(name)]
    assert len(accepted) > len(FIELDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_accepted_values_train(name):
    different = {str(recipe(config)): config for config in (*command_lines(name), *files(name))}
    for number, config in enumerate(different.values()):
        if (name, getattr(config, name)) not in TOO_MUCH:
            attempt(first_update, dataclasses.replace(config, name=config.name or str(number)))


def test_every_number_has_a_range():
    assert {name for name in FIELDS if "range" in FIELDS[name].metadata} == NUMBERS
    for name in NUMBERS:
        allowed, whole = FIELDS[name].metadata["range"], "int" in str(HINTS[name])
        outside = (
            allowed.low - 1 if whole else allowed.low / 2 or -1e-9,
            allowed.high + 1 if whole else allowed.high * 2,
        )
        for value in outside:
            value = (value, value) if "tuple" in str(HINTS[name]) else value
            with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')}: expected .*; try "):
                check(Config(**{name: value}))


# What else would take more than there is, or another option's consent.
FEW = {"img_size": 32, "batch_size": 2, "micro_batch": 2, "val_split": None, "aux_loss": 0.0}
FITTING = {
    "low": FEW,
    "tiny": FEW | {"lr": 1e-12},
    "high": {"img_size": 32, "batch_size": 8, "workers": 0, "warmup_epochs": 2, "val_split": None, "aux_loss": 0.0},
}


@pytest.mark.parametrize("end", FITTING)
def test_the_ends_of_all_ranges_train(end):
    """All at once: the lowest, the lowest above 0, the highest."""
    values = BASE | {"kd_model": "test_dinat", "kd_weights": Path("teacher.safetensors"), "name": "r"}
    for name in NUMBERS:
        allowed, default = FIELDS[name].metadata["range"], str(HINTS[name])
        value = allowed.tiny if end == "tiny" and not allowed.low and "float" in default else allowed.low
        value = allowed.high if end == "high" else value
        values[name] = (value,) * (2 if "float, float" in default else 1) if "tuple" in default else value
    config = Config(**values | FITTING[end])
    check(config)
    teacher = timm.create_model("test_dinat", num_classes=10, in_chans=config.in_chans)
    save_file(teacher.state_dict(), config.kd_weights)
    first_update(config)
