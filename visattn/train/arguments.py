"""The command line: defaults, under a recipe or a flat YAML file, under what is typed."""

import argparse
import dataclasses
import os
import sys
from inspect import cleandoc
from pathlib import Path

import tyro

from visattn.train.checks import check, check_words
from visattn.train.config import Config
from visattn.train.errors import CheckpointError, ConfigError
from visattn.train.recipes import find_recipe, read_yaml

AUTO = Path("auto")


def parse(argv: list[str] | None = None) -> Config:
    """Read the command line (and the recipe or file it names) into a checked Config."""
    check_words(sys.argv[1:] if argv is None else argv)
    early = argparse.ArgumentParser(prog="visattn train", add_help=False, allow_abbrev=False)
    early.add_argument("--recipe")
    early.add_argument("--config", type=Path)
    early.add_argument("--resume", type=Path)
    early.add_argument("--weights")
    early.add_argument("--name")
    early.add_argument("--output", type=Path, default=Config.output)
    named, _ = early.parse_known_args(argv)
    check_words([str(path) for path in (named.config, named.resume) if path], names=True)
    automatic = named.resume == AUTO
    if automatic and not named.name:
        raise ConfigError("--resume auto: expected the name of the run too, got none; try --name NAME")
    for option in ("recipe", "config"):
        if getattr(named, option) is not None and named.resume and not automatic:
            raise ConfigError(
                f"expected --{option} or --resume, got both; try --resume alone: a run keeps its own args.yaml"
            )
    if named.recipe is not None and named.config:
        raise ConfigError(
            "expected --recipe or --config, got both; try --recipe NAME --print-config, and --config with what it shows"
        )

    base = Config()
    folder = named.resume
    if automatic:
        folder = named.output / named.name
        folder = folder if os.path.isfile(folder / "args.yaml") else None
    if folder:
        base = read_yaml(run_folder(folder) / "args.yaml", hint="--resume output/RUN")
    elif named.recipe is not None:
        base = find_recipe(named.recipe)
    elif named.config:
        base = read_yaml(named.config)
        if named.weights is not None:  # in the place of the published ones that the file asks for
            base = dataclasses.replace(base, pretrained=False)
    config = tyro.cli(Config, args=argv, default=base, prog="visattn train", description=cleandoc(Config.__doc__ or ""))
    if config.override and not named.resume:
        raise ConfigError("--override: expected --resume, whose options it changes, got none; try without it")
    if config.lr_find:
        if named.resume:
            raise ConfigError("--lr-find: expected a new run, got --resume; try without --resume")
        config = dataclasses.replace(config, name=config.name and f"{config.name}-lr-find")  # the run's own stays free
    config = dataclasses.replace(config, resume=folder)
    check(config)
    return config


def run_folder(resume: Path) -> Path:
    """The folder of the run that `--resume` names by itself or by one of its files."""
    for folder in (resume, resume.parent, resume.parent.parent):
        if os.path.isfile(folder / "args.yaml"):  # Path.is_file raises where a name is too long
            return folder
    raise CheckpointError(f"--resume: expected a run folder, got no args.yaml in {resume}; try --resume output/RUN")
