"""`visattn COMMAND ...` and `python -m visattn COMMAND ...`."""

from __future__ import annotations

import csv
import difflib
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from inspect import cleandoc
from pathlib import Path
from typing import Any, Literal, TypeVar

import timm
import tyro
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from timm.models import get_arch_pretrained_cfgs
from tyro.conf import Positional

import visattn
from visattn.export import export
from visattn.export.program import Dynamic
from visattn.flops import forward_flops
from visattn.hub import load, read_labels
from visattn.published import is_known
from visattn.train.errors import printable

T = TypeVar("T")


@dataclass(frozen=True)
class List:
    """List visattn's models.

    $ visattn list
    $ visattn list 'dinat*' --sort top1
    $ visattn list --pretrained --most-params 30
    """

    pattern: Positional[str] = "*"  # of names, with * and ?
    family: str | None = None  # a file of visattn/models, such as nat
    pretrained: bool = False  # only models whose weights can be fetched
    most_params: float | None = None  # in millions
    sort: Literal["name", "params", "gmacs", "top1"] = "name"  # top1: the best first
    names: bool = False  # only names, one a line, for scripts


@dataclass(frozen=True)
class Info:
    """Show a model: size, cost, input, feature maps, weights.

    $ visattn info dinat_mini
    $ visattn info output/RUN
    """

    model: Positional[str]  # a registered name, or the folder of a run


@dataclass(frozen=True)
class Export:
    """Write a model as another runtime reads it, verified against PyTorch.

    $ visattn export output/RUN model.onnx
    $ visattn export dinat_mini model.onnx --pretrained --dynamic size
    $ visattn export nat_tiny model.xml --weights nat_tiny.pth
    """

    model: Positional[str]  # the folder of a run, or a name for timm.create_model
    file: Positional[Path]  # what to write; its suffix names the target
    target: str | None = None  # if the suffix does not say it
    dynamic: Dynamic = "batch"  # sizes that may change; size: batch, height and width
    image_size: tuple[int, ...] | None = None  # height and width in pixels, or one side
    batch_size: int = 1  # images at a time, with --dynamic none
    pretrained: bool = False  # fetch the model's weights
    weights: Path | None = None  # file of weights: .safetensors, or a .pth of tensors
    model_args: tuple[str, ...] = ()  # further arguments of the model, each as name=value
    labels: Path | None = None  # file with the name of a class on each line; None: the run's
    opset: int | None = None  # version of ONNX's operators
    tolerance: float = 1e-5  # largest accepted error relative to PyTorch


def _list(options: List) -> None:
    names = visattn.list_models(options.pattern, family=options.family)
    if options.pretrained:
        names = [name for name in names if _weights(name)]
    numbers = _numbers()
    rows = {name: numbers.get(name, {}) for name in names}
    if options.most_params is not None:
        rows = {name: row for name, row in rows.items() if float(row["params"]) <= options.most_params}
    if options.sort != "name":
        sign = -1 if options.sort == "top1" else 1
        worst = float("inf")
        keys = {n: sign * float(row[options.sort]) if row[options.sort] else worst for n, row in rows.items()}
        rows = {name: rows[name] for name in sorted(rows, key=lambda name: keys[name])}
    if not rows:
        near = difflib.get_close_matches(options.pattern.strip("*"), visattn.list_models(), n=3, cutoff=0)
        raise ValueError(
            f"expected a pattern of models, got {options.pattern}, of which none is; try {', '.join(near)}"
        )
    if options.names:
        print("\n".join(rows))
        return
    table = Table("model", box=None)
    for title in ("params, M", "GMACs", "px", "top-1, %"):
        table.add_column(title, justify="right")
    table.add_column("weights", overflow="fold")
    for name, row in rows.items():
        table.add_row(name, *(row[key] for key in ("params", "gmacs", "size", "top1")), ", ".join(_weights(name)))
    _print(table)
    print(f"{len(rows)} models; top-1 on ImageNet-1K as their authors report it")


def _print(table: Table) -> None:
    """Print a table, on a pipe in its full width."""
    Console(highlight=False, width=None if sys.stdout.isatty() else 400).print(table)


def _numbers() -> dict[str, dict[str, str]]:
    """Parameters (M), GMACs, size (px) and published top-1 of each model with its default weights."""
    with (files(visattn) / "models" / "numbers.csv").open(encoding="utf-8") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def _weights(name: str) -> list[str]:
    """The tags of a model that name weights to fetch."""
    return [cfg.tag or "default" for cfg in get_arch_pretrained_cfgs(name).values() if cfg.has_weights]


def _info(options: Info) -> None:
    name, labels = options.model, []
    model: Any
    if Path(name).is_dir():
        model, _, labels = load(name)
    else:
        model = _create(name, device="meta")
    cfg, size = model.pretrained_cfg, model.pretrained_cfg["input_size"]
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    rows: dict[str, Any] = {"model": cfg.get("architecture", name)}
    rows["parameters"] = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
    rows["cost"] = f"{forward_flops(model, *size) / 2e9:.3f} GMACs at {size[1]}x{size[2]} px"
    rows["input"] = ", ".join(
        f"{key} {cfg[key]}" for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    )
    if info := getattr(model, "feature_info", None):
        info = info if isinstance(info, list) else info.info
        levels = Counter(f"{entry['num_chs']} at 1/{entry['reduction']}" for entry in info)
        rows["feature maps"] = ", ".join(f"{n} x {level}" if n > 1 else level for level, n in levels.items())
    rows["classes"] = f"{model.num_classes}" + (
        f": {', '.join(labels[:8])}{' ...' * (len(labels) > 8)}" if labels else ""
    )
    if not labels:
        for one in get_arch_pretrained_cfgs(name.partition(".")[0]).values():
            if one.has_weights:
                place = f"huggingface.co/{one.hf_hub_id}" if one.hf_hub_id else one.url or one.file
                rows[f"weights {one.tag}"] = f"{place} ({one.license or 'no licence stated'})"
        if top1 := _numbers().get(name.partition(".")[0], {}).get("top1"):
            rows["published"] = f"top-1 {top1} % on ImageNet-1K"
    papers = cfg.get("paper_ids") or ()
    rows["papers"] = papers if isinstance(papers, str) else ", ".join(papers)
    for title, row in rows.items():
        table.add_row(title, Text(printable(str(row))))  # classes may be called anything, [red] too
    _print(table)


def _create(name: str, **options: Any) -> Any:
    """`timm.create_model`, with the nearest names where there is none of this."""
    if not is_known(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0)
        raise ValueError(f"expected a run's folder or a registered model, got {name}; try {', '.join(near)}")
    return timm.create_model(name, **options)


def _export(options: Export) -> None:
    labels = None if options.labels is None else read_labels(options.labels)
    arguments = {}
    for argument in options.model_args:
        name, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"--model-args: expected NAME=VALUE, got {argument!r}; try drop_path_rate=0.1")
        arguments[name] = yaml.safe_load(value)
    if Path(options.model).is_dir() or options.weights is not None or options.pretrained:
        model, _, _ = load(options.model, weights=options.weights, **arguments)
    else:
        print("note: random weights, as neither a run nor --pretrained nor --weights is given", file=sys.stderr)
        model = _create(options.model, **arguments)
    side: Any = options.image_size
    report = export(
        model,
        options.file,
        options.target,
        dynamic=options.dynamic,
        image_size=side[0] if side and len(side) == 1 else side,
        batch_size=options.batch_size,
        labels=labels,
        opset=options.opset,
        tolerance=options.tolerance,
    )
    print(report)


def _own(kind: type[T], run: Callable[[T], None]) -> Callable[[list[str]], int]:
    """A command whose options are the fields of a dataclass."""

    def command(argv: list[str]) -> int:
        run(
            tyro.cli(kind, args=argv, prog=f"visattn {kind.__name__.lower()}", description=cleandoc(kind.__doc__ or ""))
        )
        return 0

    return command


def _trainers(module: str) -> Callable[[list[str]], int]:
    """A command of visattn.train, which needs the extra of that name and a process of its own kind."""

    def command(argv: list[str]) -> int:
        from visattn.train.start import begin

        begin()
        code = import_module(f"visattn.train.{module}").main(argv)
        import_module("visattn.train.__main__").finish(code)
        return code

    return command


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "list": ("the models, with size, cost, accuracy and weights", _own(List, _list)),
    "info": ("one model or run", _own(Info, _info)),
    "train": ("train a classifier on a folder of images", _trainers("__main__")),
    "finetune": ("train with a preset for fine-tuning", _trainers("finetune")),
    "validate": ("loss and accuracy of a run or of weights", _trainers("validate")),
    "predict": ("classes of images, folders and videos", _trainers("predict")),
    "export": ("write ONNX, OpenVINO, torch.export, AOTInductor or ExecuTorch files", _own(Export, _export)),
}


def _usage() -> str:
    lines = [f"  {name:10}{text}" for name, (text, _) in COMMANDS.items()]
    return "\n".join(
        ["usage: visattn COMMAND ...", "", *lines, "", "visattn COMMAND --help shows options and examples."]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. What a user can mend is one sentence on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        print(f"visattn {visattn.__version__}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            near = difflib.get_close_matches(argv[0], COMMANDS, n=1, cutoff=0)[0]
            raise ValueError(f"expected a command of {', '.join(COMMANDS)}, got {argv[0]!r}; try visattn {near}")
        return COMMANDS[argv[0]][1](argv[1:])
    except BrokenPipeError:  # `| head` has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 0
    except ModuleNotFoundError as error:
        said = f"expected the package {error.name}, got none; try pip install 'visattn[train]'"
        print(f"error: {said if argv[0] != 'export' else error}", file=sys.stderr)
    except (ValueError, TypeError, RuntimeError, ImportError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    return 2
