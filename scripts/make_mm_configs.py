"""Write the leaves of configs/detection and configs/segmentation from tools/mm_recipes.yaml.

    python scripts/make_mm_configs.py            # write every file, remove leaves of no recipe
    python scripts/make_mm_configs.py --check    # CI: exit 1 and name what differs

A leaf is a config of mmengine over the files of `_base_` beside it. Its comment says where its settings are from, and
the numbers that the model's card has for it. The channels that necks and heads expect are the model's.
"""

import argparse
import functools
import sys
import textwrap
from pathlib import Path
from typing import Any

import timm
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import make_cards  # noqa: E402

import visattn  # noqa: E402, F401  registers its models with timm

CONFIGS = ROOT / "configs"
SOURCE = ROOT / "tools" / "mm_recipes.yaml"
WIDTH = 120
KEYS = {"file", "bases", "source", "note", "backbone", "optimizer", "no_decay", "settings", "models"}


class RecipeError(ValueError):
    """A table of recipes that does not fit the models."""


class Code(str):
    """A value of the table that stands in the config as it is, tagged `!python`; it is never run here."""


class NoDecay(list):
    """Names of parameters without weight decay, as keys of mmengine's `custom_keys`."""


class Loader(yaml.SafeLoader):
    """YAML's safe loader, with `!python`."""


Loader.add_constructor("!python", lambda loader, node: Code(loader.construct_scalar(node)))


def merge(into: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A copy of `into` with the values of `new`, dicts within dicts too."""
    merged = dict(into)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


@functools.cache
def channels(model: str) -> list[int]:
    """Channels of the model's last four feature levels."""
    levels = timm.create_model(model, device="meta").feature_info
    levels = levels if isinstance(levels, list) else levels.info
    return [level["num_chs"] for level in levels[-4:]]


def inputs(folder: str, head: str, numbers: list[int]) -> dict[str, Any]:
    """What the neck or the head says of the backbone's maps."""
    if folder == "detection":
        return {"panoptic_head" if head.startswith("mask2former") else "neck": {"in_channels": numbers}}
    if head == "semantic_fpn":
        return {"neck": {"in_channels": numbers}}
    if head == "mask2former":
        return {"decode_head": {"in_channels": numbers}}
    taken = numbers if head == "upernet" else numbers[3]
    return {"decode_head": {"in_channels": taken}, "auxiliary_head": {"in_channels": numbers[2]}}


def leaf(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """The values of one config."""
    entry = {"model_name": name, **recipe["backbone"], **recipe["models"][name]}
    also = entry.pop("also", {})
    if timm.get_pretrained_cfg(entry["model_name"]).has_weights:
        entry["pretrained"] = True
    folder, head = recipe["file"].partition("/")[0], recipe["bases"][0]
    numbers = channels(entry["model_name"])
    taken = [numbers[i] for i in entry["out_indices"]] if "out_indices" in entry else numbers
    values: dict[str, Any] = {"model": {"backbone": {"type": "TimmBackboneVA", **entry}, **inputs(folder, head, taken)}}
    if "optimizer" in recipe:
        values["optim_wrapper"] = {"optimizer": recipe["optimizer"]}
    values = merge(merge(values, recipe.get("settings", {})), also)
    if "no_decay" in recipe:
        values["optim_wrapper"]["paramwise_cfg"] = {"custom_keys": NoDecay(recipe["no_decay"])}
    return values


def _python(value: Any, indent: int, before: int = 0) -> str:
    """`value` in the style of ruff, in a line that has `indent` spaces and `before` other characters in front of it."""
    if isinstance(value, Code):
        return textwrap.indent(value, " " * indent).lstrip()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, NoDecay):
        if len(value) == 1:
            return f'{{"{value[0]}": dict(decay_mult=0.0)}}'
        parts = ["key: dict(decay_mult=0.0)", f"for key in {_python(list(value), indent + 4, 11)}"]
        line = f"{{{' '.join(parts)}}}"
        return (
            line
            if indent + before + len(line) < WIDTH
            else _python(Code("{\n    " + "\n    ".join(parts) + "\n}"), indent)
        )
    if isinstance(value, dict):
        start, end, heads, items = "dict(", ")", [f"{key}=" for key in value], list(value.values())
    elif isinstance(value, list):
        start, end, heads, items = "[", "]", [""] * len(value), value
    else:
        return repr(value)
    parts = [(head, _python(item, indent + 4, len(head))) for head, item in zip(heads, items, strict=True)]
    line = start + ", ".join(head + text for head, text in parts) + end
    # one character for the comma behind it
    if "\n" not in line and indent + before + len(line) < WIDTH:
        return line
    lines = [f"{' ' * (indent + 4)}{head}{text},\n" for head, text in parts]
    return f"{start}\n{''.join(lines)}{' ' * indent}{end}"


def render(recipe: dict[str, Any], name: str, published: str, sources: dict[str, str]) -> str:
    """The text of one file."""
    source = f"Settings of {sources[recipe['source']]}." if "source" in recipe else ""
    values = leaf(recipe, name)
    weights = "" if "pretrained" in values["model"]["backbone"] else "Weights to start from: model.backbone.checkpoint."
    written = "Written by scripts/make_mm_configs.py from tools/mm_recipes.yaml."
    comment = " ".join(filter(None, [source, recipe.get("note", ""), weights, published, written]))
    lines = [f"# {line}" for line in textwrap.wrap(comment, WIDTH - 2, break_on_hyphens=False)]
    bases = [f"_base_/{base}.py" for base in [*recipe["bases"], "runtime"]]
    lines.append(f"_base_ = {_python(bases, 0, 8)}")
    for key, value in values.items():
        lines.append(f"{key} = {_python(value, 0, len(key) + 3)}")
    return "\n".join(lines) + "\n"


def published_numbers() -> dict[str, str]:
    """For each config that a card names, the sentence with its numbers."""
    sentences: dict[str, str] = {}
    for path in sorted((ROOT / "model_cards").glob("*.yaml")):
        card = make_cards.load(path)
        for table in card.results:
            for row in table.rows if table.config else ():
                columns = zip(table.columns, row[1:], strict=False)
                numbers = [f"{k} {v}" for k, v in columns if v is not None and f"{{{k}}}" not in table.config]
                config = make_cards.config_of(table, row)
                if config in sentences:
                    raise RecipeError(f"expected one row of the cards for {config}, got two; the second in {path.name}")
                sentences[config] = f"Official, not reproduced here: {', '.join(numbers)} (model_cards/{path.stem}.md)."
    return sentences


def render_all() -> dict[Path, str]:
    """Every leaf with its text."""
    table = yaml.load(SOURCE.read_text(encoding="utf-8"), Loader)
    published = published_numbers()
    texts: dict[Path, str] = {}
    for recipe in table["recipes"]:
        if unknown := recipe.keys() - KEYS:
            raise RecipeError(f"expected keys of {sorted(KEYS)} for {recipe['file']}, got {sorted(unknown)}")
        for name in recipe["models"]:
            config = f"{recipe['file'].format(model=name.replace('_', '-'))}.py"
            if CONFIGS / config in texts:
                raise RecipeError(f"expected one recipe for {config}, got two; try another file name")
            numbers = published.pop(config, "No number is published for it.")
            texts[CONFIGS / config] = render(recipe, name, numbers, table["sources"])
    if published:
        raise RecipeError(f"expected a recipe for every config that a card names, got none for {sorted(published)}")
    return texts


def main(argv: list[str] | None = None) -> int:
    """Write or check the files; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if a file differs")
    check = parser.parse_args(argv).check
    wanted = render_all()
    differ = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    orphans = sorted(
        {path for folder in ("detection", "segmentation") for path in (CONFIGS / folder).glob("*.py")} - wanted.keys()
    )
    if check:
        for path in differ + orphans:
            print(f"{path.relative_to(ROOT)}: differs; run `python scripts/make_mm_configs.py`", file=sys.stderr)
        return int(bool(differ or orphans))
    for path in orphans:
        path.unlink()
    for path in differ:
        path.write_text(wanted[path], encoding="utf-8")
    print(f"{len(wanted)} configs: {len(differ)} written, {len(orphans)} removed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
