"""Render model_cards/<family>.md from model_cards/<family>.yaml, and check the data against the models.

    python scripts/make_cards.py                  # write every .md
    python scripts/make_cards.py --check          # CI: exit 1 and say what differs
    python scripts/make_cards.py --update nat     # recompute params and gmacs of one family, then write its .md

The check compares the rendering with the file on disk; parameters, GMACs, input size and classes with the models; the
listed names with timm's registry; tags, sizes, classes, addresses and licences of weights with `default_cfgs`. Models
are built on the meta device, so no weights are allocated. Published numbers are the authors': they are shown as given
and never computed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

CARDS = Path(__file__).resolve().parents[1] / "model_cards"
CONFIGS = CARDS.parent / "configs"
PACKAGE = "visattn"


class CardError(ValueError):
    """A card that is incomplete or contradicts itself."""


@dataclass
class Published:
    """What is reported of one variant or one of its weights; `gflops` of papers counts multiply-adds, our GMACs."""

    source: str
    top1: float | None = None
    params_m: float | None = None
    gflops: float | None = None


@dataclass
class Pretrained:
    """One pretrained tag, at `file` (below `weights.base`, or a full URL) or at the Hugging Face hub id `hub`.

    `size` and `classes` are the variant's, `licence_id` is that of the card's weights, unless given.
    """

    tag: str
    size: int
    classes: int
    licence_id: str
    file: str | None = None
    hub: str | None = None
    published: Published | None = None


@dataclass
class Variant:
    """One registered model. `params` and `gmacs` are ours, computed with `classes` outputs at `size` x `size`.

    Published numbers belong to the pretrained tags; a variant without weights has its own.
    """

    name: str
    size: int
    classes: int
    params: int | None
    gmacs: float | None
    pretrained: list[Pretrained] = field(default_factory=list)
    published: Published | None = None


@dataclass
class Results:
    """One table of published results; a row gives a variant, the columns' values and, if any has one, a file.

    A file is a path below `weights.base` or a full URL. `config` names the rows' files below configs/, where {model} is
    the variant and another field a column's value, both in lower case and with dashes.
    """

    title: str
    source: str
    columns: list[str]
    rows: list[list]
    note: str | None = None
    config: str | None = None


@dataclass
class Paper:
    title: str
    authors: str
    venue: str
    arxiv: str
    bibtex: str


@dataclass
class Code:
    url: str
    commit: str
    licence: str


@dataclass
class Weights:
    """The weights' terms, and where files with a relative path lie."""

    licence: str
    note: str
    licence_id: str = ""
    base: str = ""


@dataclass
class Card:
    """The contents of one yaml file."""

    family: str
    title: str
    modules: list[str]
    summary: str
    papers: list[Paper]
    weights: Weights
    sources: dict[str, str]
    usage: str
    input: list[str]
    limits: list[str]
    variants: list[Variant]
    code: Code | None = None
    results: list[Results] = field(default_factory=list)


NESTED = {"papers": [Paper], "code": Code, "weights": Weights, "variants": [Variant], "results": [Results]}


def build(cls, data, where: str):
    """Make a dataclass from a mapping; refuse missing and unknown keys by name."""
    if not isinstance(data, dict):
        raise CardError(f"expected a mapping at {where}, got {type(data).__name__}")
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            raise CardError(f"expected a known key at {where}, got {key!r}; try {close[0] if close else list(fields)}")
    required = [key for key, item in fields.items() if item.default is item.default_factory is dataclasses.MISSING]
    if missing := [key for key in required if key not in data]:
        raise CardError(f"expected {', '.join(missing)} at {where}, got {', '.join(map(str, data))}")
    return cls(**data)


def load(path: Path) -> Card:
    """Read and cross-check one yaml file."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise CardError(f"expected yaml in {path.name}, got: {error}") from error
    card = build(Card, data, path.name)
    for key, kind in NESTED.items():
        value = getattr(card, key)
        if isinstance(kind, list):
            value = [build(kind[0], item, f"{path.name}: {key}[{index}]") for index, item in enumerate(value)]
        elif value is not None:
            value = build(kind, value, f"{path.name}: {key}")
        setattr(card, key, value)
    for variant in card.variants:
        where = f"{path.name}: {variant.name}"
        variant.published = _published(variant.published, where)
        defaults = {"size": variant.size, "classes": variant.classes, "licence_id": card.weights.licence_id}
        variant.pretrained = [_pretrained(item, defaults, where) for item in variant.pretrained]
        if variant.pretrained and variant.published:
            raise CardError(f"expected published numbers below each tag, got them at {where}; try its first tag")

    names = [variant.name for variant in card.variants]
    if card.family != path.stem:
        raise CardError(f"expected family {path.stem!r} in {path.name}, got {card.family!r}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise CardError(f"expected each variant of {path.name} once, got {', '.join(repeated)} again")
    used = [table.source for table in card.results] + [published.source for published in _all_published(card)]
    if unknown := sorted(set(used) - set(card.sources)):
        raise CardError(f"expected sources named in {path.name}, got {', '.join(unknown)}; try {list(card.sources)}")
    for table in card.results:
        length = len(table.columns) + (2 if _has_files(table) else 1)
        for row in table.rows:
            if len(row) != length or row[0] not in names:
                raise CardError(
                    f"expected [variant, {', '.join(table.columns)}, file] in {table.title!r} of {path.name}, got {row}"
                )
    return card


def _published(data, where: str) -> Published | None:
    return None if data is None else build(Published, data, f"{where}.published")


def _pretrained(data, defaults: dict, where: str) -> Pretrained:
    where = f"{where}.pretrained"
    item = build(Pretrained, {**defaults, **data} if isinstance(data, dict) else data, where)
    if bool(item.file) == bool(item.hub):
        raise CardError(f"expected either file or hub at {where}, got {', '.join(data)}")
    item.published = _published(item.published, f"{where}[{item.tag}]")
    return item


def _all_published(card: Card) -> list[Published]:
    items = [item for variant in card.variants for item in (variant, *variant.pretrained)]
    return [item.published for item in items if item.published is not None]


def _has_files(table: Results) -> bool:
    return any(len(row) > len(table.columns) + 1 for row in table.rows)


def config_of(table: Results, row: list) -> str:
    """The config of a row, below configs/."""
    fields = {"model": row[0], **dict(zip(table.columns, row[1:], strict=False))}
    slugs = {key: re.sub("[_ ]", "-", str(value)).lower() for key, value in fields.items()}
    return f"{table.config.format_map(slugs)}.py"


def address(card: Card, file: str | None, hub: str | None = None) -> str:
    """The URL of a file or of a page of the Hugging Face hub."""
    if hub:
        return f"https://huggingface.co/{hub}"
    return file if "://" in file else card.weights.base + file


def registered(modules: Iterable[str]) -> list[str]:
    """visattn's models that timm lists under these registry modules."""
    import timm

    import visattn  # noqa: F401  registers the models

    names = timm.list_models(module=list(modules))
    return [name for name in names if timm.model_entrypoint(name).__module__.startswith(f"{PACKAGE}.")]


def measure(name: str, size: int) -> tuple[int, float, int]:
    """Parameters, GMACs (rounded to 3 decimals) and classes of a model at a square input, on the meta device."""
    import timm

    from visattn.flops import forward_flops

    model = timm.create_model(name, device="meta")
    params = sum(parameter.numel() for parameter in model.parameters())
    return params, round(forward_flops(model, model.in_chans, size, size) / 2e9, 3), model.num_classes


def check_models(card: Card, only: Iterable[str] | None = None) -> list[str]:
    """What differs between the card and the models; `only` limits the measured variants, not the list of names."""
    import timm

    problems = []
    found, listed = set(registered(card.modules)), {variant.name for variant in card.variants}
    for name in sorted(listed - found):
        problems.append(f"{name}: listed, but not registered by modules {', '.join(card.modules)}")
    for name in sorted(found - listed):
        problems.append(f"{name}: registered, but not listed")

    for variant in card.variants:
        if variant.name not in found or (only is not None and variant.name not in only):
            continue
        params, gmacs, classes = measure(variant.name, variant.size)
        configs = list(timm.models.get_arch_pretrained_cfgs(variant.name).values())
        tags = [config.tag for config in configs if config.has_weights]
        problems += _differences(
            variant.name,
            params=(variant.params, params),
            gmacs=(variant.gmacs, gmacs),
            classes=(variant.classes, classes),
            size=(variant.size, configs[0].input_size[-1] if configs else None),
            tags=([item.tag for item in variant.pretrained], tags),
        )
        for item in variant.pretrained:
            if item.tag in tags:
                config = next(config for config in configs if config.tag == item.tag)
                problems += _differences(
                    f"{variant.name}.{item.tag}",
                    size=(item.size, config.input_size[-1]),
                    classes=(item.classes, config.num_classes),
                    licence=(item.licence_id, config.license),
                    weights=(address(card, item.file, item.hub), address(card, config.url, config.hf_hub_id)),
                )
    return problems


def _differences(name: str, **values: tuple) -> list[str]:
    return [
        f"{name}: {key} is {ours} in the card, {theirs} in the model"
        for key, (ours, theirs) in values.items()
        if ours != theirs
    ]


def update(path: Path) -> None:
    """Rewrite params and gmacs in the yaml text, leaving everything else as it was typed."""
    card, text = load(path), path.read_text(encoding="utf-8")
    found = set(registered(card.modules))
    edits = []
    for node in _entry(yaml.compose(text), "variants").value:
        name = _entry(node, "name").value
        if name not in found:
            print(f"{path.name}: {name} is not registered, left as it is", file=sys.stderr)
            continue
        params, gmacs, _ = measure(name, int(_entry(node, "size").value))
        for key, value in {"params": params, "gmacs": gmacs}.items():
            mark = _entry(node, key)
            edits.append((mark.start_mark.index, mark.end_mark.index, str(value)))
    for start, end, value in sorted(edits, reverse=True):
        text = text[:start] + value + text[end:]
    path.write_text(text, encoding="utf-8")


def _entry(mapping: yaml.MappingNode, key: str) -> yaml.Node:
    return next(value for name, value in mapping.value if name.value == key)


def render(card: Card) -> str:
    """The markdown of a card."""
    parts = [f"<!-- Generated by scripts/make_cards.py from {card.family}.yaml: edit that file. -->", f"# {card.title}"]
    parts += [card.summary.strip(), "## Models", _variants(card), _variants_note(card)]
    parts += ["## How to use", f"```python\n{card.usage.strip()}\n```"]
    parts += ["## Input", _bullets(card.input), "## Limits", _bullets(card.limits)]
    if card.results:
        parts += ["## Published results", "Official numbers, not reproduced here; each table names its source."]
        if any(results.config for results in card.results):
            parts.append("`config` is the file of this repository with the settings behind a row.")
        for results in card.results:
            source = f"Source: {card.sources[results.source]}."
            parts += [f"### {results.title}", _results(card, results), f"{results.note or ''} {source}".strip()]
    parts += ["## Licence", _licence(card), "## Citation", _papers(card)]
    parts += [f"```bibtex\n{paper.bibtex.strip()}\n```" for paper in card.papers]
    return "\n\n".join(parts) + "\n"


def _variants(card: Card) -> str:
    rows = []
    for variant in card.variants:
        params = "–" if variant.params is None else f"{variant.params / 1e6:.2f}"
        gmacs = "–" if variant.gmacs is None else f"{variant.gmacs:.3f}"
        for item in variant.pretrained:
            # ours are counted at the variant's size and classes only
            counted = (item.size, item.classes) == (variant.size, variant.classes)
            counts = [params, gmacs] if counted else ["–", "–"]
            link = _link(card, item.file, item.hub)
            rows.append(_row(f"{variant.name}.{item.tag}", counts, item, link))
        if not variant.pretrained:
            rows.append(_row(variant.name, [params, gmacs], variant, "–"))
    head = ["name", "params (M)", "GMACs", "GFLOPs, published", "size", "classes", "top-1, published (%)", "weights"]
    return _table(head, rows, left=(0, 7))


def _row(name: str, counts: list[str], item: Variant | Pretrained, link: str) -> list[str]:
    published = item.published
    gflops = "–" if published is None or published.gflops is None else f"{published.gflops:g}"
    top1 = "–" if published is None else _cell(published.top1)
    return [f"`{name}`", *counts, gflops, f"{item.size}", f"{item.classes}", top1, link]


def _variants_note(card: Card) -> str:
    text = (
        "Parameters and GMACs (multiply-adds of matrix products, convolutions and attention, one image of the given "
        "size) are counted from the models in this repository. What papers call FLOPs are multiply-adds too."
    )
    if used := sorted({published.source for published in _all_published(card)}):
        text += f" Published numbers: {'; '.join(card.sources[key] for key in used)}."
    return f"{text}\n\n{card.weights.note.strip()}"


def _results(card: Card, results: Results) -> str:
    number, files = len(results.columns), _has_files(results)
    rows = [
        [
            f"`{row[0]}`",
            *map(_cell, row[1 : number + 1]),
            *([_config_link(results, row)] if results.config else []),
            *([_link(card, row[-1])] if files else []),
        ]
        for row in results.rows
    ]
    texts = {i for i, _ in enumerate(results.columns, 1) if any(isinstance(row[i], str) for row in results.rows)}
    titles = [name if i in texts else f"{name}, published" for i, name in enumerate(results.columns, 1)]
    head = ["backbone", *titles, *(["config"] if results.config else []), *(["checkpoint"] if files else [])]
    return _table(head, rows, left={0, *texts, number + 1, number + 2})


def _config_link(table: Results, row: list) -> str:
    config = config_of(table, row)
    return f"[{Path(config).stem}](../configs/{config})"


def _cell(value) -> str:
    return "–" if value is None else str(value)


def _link(card: Card, file: str | None, hub: str | None = None) -> str:
    return f"[{hub or file.rpartition('/')[2]}]({address(card, file, hub)})" if hub or file else "–"


def _licence(card: Card) -> str:
    code = "The algorithm follows the paper; the authors published no code."
    if card.code is not None:
        code = (
            f"The algorithm follows [{card.code.url.partition('://')[2]}]({card.code.url}) at commit "
            f"`{card.code.commit[:7]}` ({card.code.licence}); no code is copied."
        )
    return f"{code} This repository: Apache-2.0.\n\nWeights: {card.weights.licence.strip()}"


def _papers(card: Card) -> str:
    return _bullets(
        f"{paper.authors}: {paper.title}. {paper.venue}, [arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})."
        for paper in card.papers
    )


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {' '.join(line.split())}" for line in lines)


def _table(head: list[str], rows: list[list[str]], left: Iterable[int]) -> str:
    rule = ["---" if index in left else "---:" for index in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def check(path: Path, only: Iterable[str] | None = None) -> list[str]:
    """All problems of one card, empty when it is right."""
    card = load(path)
    target = path.with_suffix(".md")
    on_disk = target.read_text(encoding="utf-8") if target.is_file() else ""
    lines = difflib.unified_diff(
        on_disk.splitlines(),
        render(card).splitlines(),
        f"{target.name} on disk",
        f"{target.name} rendered",
        lineterm="",
    )
    configs = {config_of(table, row) for table in card.results if table.config for row in table.rows}
    absent = [
        f"configs/{config}: named, but not there" for config in sorted(configs) if not (CONFIGS / config).is_file()
    ]
    return [*lines, *absent, *check_models(card, only)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="file names without .yaml (default: every card)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="write nothing; exit 1 when anything differs")
    mode.add_argument("--update", action="store_true", help="recompute params and gmacs before rendering")
    parser.add_argument("--cards", type=Path, default=CARDS, help="folder of the cards")
    args = parser.parse_args(argv)

    known = {path.stem: path for path in sorted(args.cards.glob("*.yaml"))}
    unknown = sorted(set(args.families) - set(known))
    if unknown or not known:
        print(f"error: expected cards in {args.cards}, got no {', '.join(unknown) or '*.yaml'}", file=sys.stderr)
        return 1
    status = 0
    for family in args.families or known:
        path = known[family]
        try:
            if args.check:
                problems = check(path)
                print("\n".join([f"{path.name}: {len(problems) or 'no'} difference(s)", *problems]))
                status |= bool(problems)
                continue
            if args.update:
                update(path)
            path.with_suffix(".md").write_text(render(load(path)), encoding="utf-8")
        except CardError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
