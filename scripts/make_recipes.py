"""Write configs/imagenet/<model>.yaml, the training recipe of every model, from tools/recipes.yaml.

    python scripts/make_recipes.py            # write every file, remove files of no model
    python scripts/make_recipes.py --check    # CI: exit 1 and name what differs

Each file is complete and depends on no other. Its comment gives the numbers of the model's card, and where the recipe
comes from.
"""

import argparse
import dataclasses
import fnmatch
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import yaml
from timm.models import get_pretrained_cfg

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import visattn  # noqa: E402, F401  registers its models with timm
from visattn.train.config import FREE_ON_RESUME, LAUNCH_ONLY, Config  # noqa: E402

RECIPES = ROOT / "configs" / "imagenet"
SOURCE = ROOT / "tools" / "recipes.yaml"
# A recipe holds what a run computes, not how and where; of that only what a sensible start on GPUs needs.
OPTIONS = [
    field.name
    for field in dataclasses.fields(Config)
    if field.name not in LAUNCH_ONLY and (field.name not in FREE_ON_RESUME or field.name in ("workers", "micro_batch"))
]
GROUPS = ("img_size", "epochs", "smoothing", "kd_model", "amp")  # options that begin a paragraph
TEXT = ("note", "recalled", "ours")  # what a size may hold besides options


class RecipeError(ValueError):
    """A table of recipes that does not fit the models."""


@dataclasses.dataclass
class Recipe:
    """What the table says about one model."""

    options: dict[str, Any]
    comment: str
    start: str | None
    marks: dict[str, str]  # option: where its value is from


def models() -> list[str]:
    """The models that get a recipe: all that visattn registers but those for tests."""
    return sorted(
        name
        for name in timm.list_models()
        if timm.model_entrypoint(name).__module__.startswith("visattn.") and not name.startswith("test_")
    )


def registered_input(name: str) -> dict[str, Any]:
    """The model's input in the words of Config."""
    cfg = get_pretrained_cfg(name)
    values = {key: getattr(cfg, key) for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    return {"in_chans": cfg.input_size[0], "img_size": cfg.input_size[-1], **values}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern of the table means the model."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def entry_of(table: dict[str, Any], name: str) -> dict[str, Any]:
    """The first entry of the table with a pattern for the model."""
    for entry in table["recipes"]:
        if matches(name, entry["models"]):
            return entry
    raise RecipeError(f"{SOURCE.name}: expected a recipe for every model, got none for {name}; try adding one")


def find(table: dict[str, Any], name: str) -> Recipe:
    """The recipe of one model: its entry, and the entry's sizes that match."""
    entry = entry_of(table, name)
    layers = [entry, *(size for pattern, size in entry.get("sizes", {}).items() if matches(name, [pattern]))]
    options = {**dataclasses.asdict(Config()), **registered_input(name), "model": name}
    for layer in (table["common"], entry["options"], *layers[1:]):
        options |= {key: value for key, value in layer.items() if key not in TEXT}
    if unknown := options.keys() - {field.name for field in dataclasses.fields(Config)}:
        raise RecipeError(
            f"{SOURCE.name}: expected options of visattn/train/config.py for {name}, got {sorted(unknown)}; try --help"
        )
    marks = {key: word for word in ("recalled", "ours") for layer in layers for key in layer.get(word, ())}
    comment = " ".join([entry["source"], *(layer["note"] for layer in layers[1:] if "note" in layer)])
    return Recipe({key: options[key] for key in OPTIONS}, comment, entry.get("start"), marks)


def cards() -> dict[str, str]:
    """For each model the sentence with the numbers of its card."""
    sentences = {}
    for path in sorted((ROOT / "model_cards").glob("*.yaml")):
        card = yaml.safe_load(path.read_text(encoding="utf-8"))
        for variant in card["variants"]:
            published, tag = variant.get("published"), ""
            for weights in variant.get("pretrained", ())[:1]:  # the default ones
                published, tag = weights.get("published"), f" ({weights['tag']})"
            top1 = "its model card has no top-1"
            if published and "top1" in published:
                source = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", card["sources"][published["source"]])
                top1 = f"top-1 {published['top1']} %{tag}, from {source}"
            cost = (
                f"{variant['params'] / 1e6:.1f} M parameters, {variant['gmacs']:.1f} GMACs at {variant['size']} pixels"
            )
            sentences[variant["name"]] = f"{cost}; {top1}"
    return sentences


def render(name: str, recipe: Recipe, numbers: str) -> str:
    """The text of one file."""
    command = f"torchrun --nproc-per-node 8 -m train --config configs/imagenet/{name}.yaml --data /path/to/imagenet"
    lines = [f"{name} on ImageNet-1k: {numbers}.", recipe.comment.replace("\n", " ")]
    if recipe.start and not recipe.options["pretrained"]:
        lines.append(f"--weights names the file to start from, weights {recipe.start}.")
        command += " --weights FILE"
    lines = [f"# {line}" for text in lines for line in textwrap.wrap(text, 118, break_on_hyphens=False)]
    if len(command) > 116:
        command = command.replace(" --data", " \\\n#     --data")
    lines += ["#", f"#   {command}"]
    for key, value in recipe.options.items():
        value = list(value) if isinstance(value, tuple) else value
        value = yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize).removesuffix("...\n").strip()
        mark = {"recalled": "  # recalled", "ours": "  # our choice", None: ""}[recipe.marks.get(key)]
        lines += [""] * (key in GROUPS) + [f"{key}: {value}{mark}"]
    return "\n".join(lines) + "\n"


def render_all() -> dict[Path, str]:
    """Every file with its text."""
    table = yaml.safe_load(SOURCE.read_text(encoding="utf-8"))
    sentences = cards()
    return {RECIPES / f"{name}.yaml": render(name, find(table, name), sentences[name]) for name in models()}


def main(argv: list[str] | None = None) -> int:
    """Write or check the files; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if a file differs")
    check = parser.parse_args(argv).check
    wanted = render_all()
    differ = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    orphans = sorted(set(RECIPES.glob("*.yaml")) - wanted.keys())
    if check:
        for path in differ + orphans:
            print(f"{path.relative_to(ROOT)}: differs; run `python scripts/make_recipes.py`", file=sys.stderr)
        return int(bool(differ or orphans))
    RECIPES.mkdir(parents=True, exist_ok=True)
    for path in orphans:
        path.unlink()
    for path in differ:
        path.write_text(wanted[path], encoding="utf-8")
    print(f"{len(wanted)} recipes: {len(differ)} written, {len(orphans)} removed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
