"""A trained model with what it takes to use it: from a run's folder, the Hugging Face hub, or a registered name."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from timm.models._hub import hf_split
from torch import Tensor, nn

from visattn.published import Hub, is_known, wait_for
from visattn.weights import WeightsError, check_file, convert_weights, first_line, load_fitting, load_weights

# What timm raises where a config.json is not as it was written.
BROKEN = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)

RUN_WEIGHTS = {False: "model.safetensors", True: "model_ema.safetensors"}  # of a run's folder: averaged or not


class Transform:
    """timm's evaluation transform for a model, after the image has got the model's number of channels."""

    def __init__(self, model: nn.Module):
        data: dict[str, Any] = resolve_model_data_config(model)
        self.mode = "L" if data["input_size"][0] == 1 else "RGB"
        self.mean, self.std = data["mean"], data["std"]
        self.apply: Any = create_transform(**data)

    def __call__(self, image: Image.Image) -> Tensor:
        return self.apply(image.convert(self.mode))


class Classifier(NamedTuple):
    """What `load` gives.

    Attributes:
        model: In evaluation mode, on the CPU; `[B, C, H, W]` float images to `[B, classes]` logits.
        transform: From a PIL image of any mode and size to the model's float `[C, H, W]`, normalized.
        labels: The name of each class, in the order of the logits.
    """

    model: nn.Module
    transform: Transform
    labels: list[str]


def load(
    source: str | os.PathLike,
    *,
    weights: str | os.PathLike | None = None,
    labels: Sequence[str] | None = None,
    ema: bool = False,
    **model_args: Any,
) -> Classifier:
    """Load a trained classifier, its transform and its labels.

    Args:
        source: The folder of a run of `visattn train`, a repository of the Hugging Face hub ("owner/name"), both also
            after timm's "local-dir:" and "hf-hub:", or a registered name, with a tag or without, whose pretrained
            weights are fetched.
        weights: With a registered name: a file of weights instead; its classifier says how many classes there are, and
            a config.json of this model beside it how images are read and what the classes are called.
        labels: Names of the classes; None: those of the run, the repository or ImageNet, else the classes' numbers.
        ema: With a run: its averaged weights.
        model_args: For `timm.create_model`, in the place of the run's or the model's own.

    Raises:
        WeightsError: No such run, repository or model, one without weights, or weights that do not fit.
        ValueError: Labels that are not as many as the classes, or options that the source does not have.
    """
    folder = Path(os.path.expanduser(str(source).removeprefix("local-dir:")))
    if ema and not folder.is_dir():
        raise ValueError(f"expected a run, whose average `ema` is, got {source}; try its folder")
    if weights is not None and (folder.is_dir() or not is_known(str(source))):
        raise ValueError(f"expected a registered name beside `weights`, got {source}; try 'dinat_mini'")
    if folder.is_dir():
        model = _load_run(folder, RUN_WEIGHTS[ema], model_args)
    elif weights is not None and _architecture(Path(weights).parent) == str(source).partition(".")[0]:
        model = _load_run(Path(weights).parent, Path(weights).name, model_args)
    elif weights is not None:
        model = _load_file(str(source), Path(weights), model_args)
    else:
        model = _fetch(str(source), model_args)
    if labels is not None and len(labels) != model.num_classes:
        raise ValueError(
            f"expected {model.num_classes} labels, one per class, got {len(labels)}; try all, in the order of training"
        )
    try:
        return Classifier(model.eval(), Transform(model), [*map(str, labels or _labels(model))])
    except BROKEN as error:
        raise WeightsError(
            f"expected a config.json that says how {source} reads images, got {type(error).__name__}: "
            f"{first_line(error)}; try another run"
        ) from error


def find_in_run(folder: Path, config: str, weights: str) -> Path:
    """The weights in the folder of a run.

    Raises:
        WeightsError: no such folder, or one without this file of its configuration, or without weights.
    """
    path = folder / weights
    if not (folder / config).is_file():
        got = "no folder"
        if folder.is_dir():
            got = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "an empty folder"
        runs = ", ".join(str(path.parent) for path in sorted(folder.glob(f"*/{config}"))[:3])
        hint = (
            f"`visattn train --resume {folder}`, which writes it" if (folder / "args.yaml").is_file() else "output/RUN"
        )
        raise WeightsError(f"expected a run with {config} and {weights} in {folder}, got {got}; try {runs or hint}")
    if not path.is_file():
        hint = f"`visattn train --resume {folder}` to the end of its first epoch"
        raise WeightsError(
            f"expected weights at {path}, got none; try {'--ema-decay in training' if '_ema.' in weights else hint}"
        )
    return path


def _architecture(folder: Path) -> str | None:
    """The name of the model that a folder's config.json is of."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["architecture"]
    except (LookupError, OSError, TypeError, ValueError):
        return None


def _load_run(folder: Path, weights: str, model_args: dict[str, Any]) -> Any:
    """Build the model of a run's config.json with weights beside it."""
    path = find_in_run(folder, "config.json", weights)
    try:
        model: Any = timm.create_model(f"local-dir:{folder}", **model_args)
    except BROKEN as error:
        raise WeightsError(
            f"expected the model of a run in {folder / 'config.json'}, got {first_line(error)}; try another run"
        ) from error
    load_fitting(model, load_weights(path), f"weights of {folder / 'config.json'}", str(path))
    return model


def _load_file(name: str, path: Path, model_args: dict[str, Any]) -> Any:
    """Build a registered model with as many classes as the weights in a file have."""
    weights = load_weights(path)
    model: Any = timm.create_model(name, **model_args)
    weights = convert_weights(weights, model, str(path))
    head = model.pretrained_cfg.get("classifier")
    head = head if isinstance(head, str) or not head else head[0]
    bias = weights.get(f"{head}.bias")
    if bias is not None and bias.shape[0] != model.num_classes:
        classes: dict[str, Any] = {"num_classes": bias.shape[0]}
        model = timm.create_model(name, **(model_args | classes))
    load_fitting(model, weights, f"weights of {name}", str(path))
    return model


def _fetch(name: str, model_args: dict[str, Any]) -> Any:
    """Build a registered model, or that of a repository, with its pretrained weights."""
    if is_known(name):
        return timm.create_model(name, pretrained=True, **model_args)
    if Path(name).is_file():
        raise WeightsError(f"expected a run's folder, OWNER/NAME or a model, got a file; try {Path(name).parent}")
    if not name.startswith("hf-hub:") and (name.count("/") != 1 or Path(name).parent.is_dir()):
        others = [str(path.parent) for path in sorted(Path(name).parent.glob("*/config.json"))] if "/" in name else []
        near = difflib.get_close_matches(name, others or timm.list_models(), n=3, cutoff=0) or ["dinat_mini"]
        raise WeightsError(f"expected a run's folder, OWNER/NAME or a model, got {name!r}; try {', '.join(near)}")
    name = name.removeprefix("hf-hub:")
    source = Hub(*hf_split(name), ("config.json",), None)
    expected = f"expected the folder {name} or {source.address}"
    try:
        if not source.cached():
            wait_for(source, lambda reason: f"{expected}, got {reason}")
        return timm.create_model(f"hf-hub:{name}", pretrained=True, **model_args)
    except Exception as error:  # of the hub's client, whichever it is, of its file, or of the model
        hint = f"again with a network, or a copy at {source.place}"
        raise WeightsError(f"{expected}, got {first_line(error)}; try {hint}") from error


def read_labels(path: Path) -> list[str]:
    """The names of classes from a text file, one a line.

    Raises:
        ValueError: no text file.
    """
    check_file(path, "names of classes", "a text file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # Windows begins files with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected labels in a text file of UTF-8, got {path} ({error}); try another file") from error
    return [line.strip() for line in lines if line.strip()]


def _labels(model: Any) -> list[str]:
    """Name the classes of a model."""
    classes, cfg = model.num_classes, model.pretrained_cfg
    names = cfg.get("label_names") or []
    if isinstance(names, dict):
        names = [names[number] for number in map(str, range(len(names))) if number in names]
    if len(names) == classes:
        return names
    if not names and cfg.get("num_classes") == classes and (subset := infer_imagenet_subset(model)):
        known = ImageNetInfo(subset)
        return [known.index_to_description(number) for number in range(classes)]
    return [str(number) for number in range(classes)]
