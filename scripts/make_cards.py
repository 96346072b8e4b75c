"""Render model_cards/<family>.md from model_cards/<family>.yaml and the code, and of all families together the table in
README.md and visattn/models/numbers.csv, which `visattn list` shows.

    python scripts/make_cards.py             # write every .md, and the table
    python scripts/make_cards.py nat         # write one .md
    python scripts/make_cards.py --check     # CI: exit 1 and show where something differs

The yaml holds what the code does not know: text, and the authors' numbers with their sources. Names, parameters, GMACs
and weights (tag, address, input size, crop, classes, licence) are read from the registered models, which are built on
the meta device. The dataclasses below are the yaml's keys; those without a default are required.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlsplit

import timm
import yaml
from timm.models import PretrainedCfg

import visattn
from visattn.flops import forward_flops
from visattn.models import FAMILIES

CARDS = Path(__file__).resolve().parents[1] / "model_cards"
CONFIGS = CARDS.parent / "configs"
PAPERS = "_papers.yaml"  # cited by several cards
TABLE = re.compile(r"(?<=<!-- families: scripts/make_cards.py -->\n).*?(?=<!-- end -->)", re.DOTALL)


class CardError(ValueError):
    """A card that is incomplete, or contradicts itself or the code."""


@dataclass
class Published:
    """What is reported of a model or of one of its tags; `gflops` of papers counts multiply-adds, our GMACs."""

    source: str
    top1: float | None = None
    params_m: float | None = None
    gflops: float | None = None


@dataclass
class Results:
    """One table of published results; a row gives a model, the columns' values and, if any has one, a file.

    A file is a path below the card's `base` or a full URL. `config` names the rows' files below configs/, where {model}
    is the model and another field a column's value, both in lower case and with dashes.
    """

    title: str
    source: str
    columns: list[str]
    rows: list[list]
    note: str = ""
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
    """The official code."""

    url: str
    commit: str
    licence: str


@dataclass
class Weights:
    """The terms of the weights, what to know of them, and what is loaded from a file only: {pattern of names: how}."""

    licence: str = ""
    note: str = ""
    file_only: dict[str, str] = field(default_factory=dict)


@dataclass
class Card:
    """The contents of one yaml file. A paper is given or named in _papers.yaml; `published` is keyed by model or
    model.tag, where the model alone is its default tag; `families` are files of visattn/models, by default the card's
    name.
    """

    title: str
    summary: str
    papers: list[Paper]
    usage: str
    families: list[str] = field(default_factory=list)
    weights: Weights = field(default_factory=Weights)
    input: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    published: dict[str, Published] = field(default_factory=dict)
    results: list[Results] = field(default_factory=list)
    code: Code | None = None
    base: str = ""


def build(cls, data, where: str):
    """Make a dataclass from a mapping; refuse missing and unknown keys by name."""
    if not isinstance(data, dict):
        raise CardError(f"expected a mapping at {where}, got {type(data).__name__}")
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise CardError(f"expected a known key at {where}, got {key!r}; try {_close(key, fields)}")
    required = [key for key, item in fields.items() if item.default is item.default_factory is dataclasses.MISSING]
    if missing := [key for key in required if key not in data]:
        raise CardError(f"expected {', '.join(missing)} at {where}, got {', '.join(map(str, data))}")
    return cls(**data)


def _close(word, known: Iterable[str]) -> str:
    return " or ".join(difflib.get_close_matches(str(word), known, n=1)) or ", ".join(known)


def _read(path: Path):
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise CardError(f"expected yaml in {path.name}, got: {error}") from error


def load(path: Path) -> Card:
    """Read one yaml file and check it against itself and the registered models."""
    name = path.name
    card = build(Card, _read(path), name)
    card.families = card.families or [path.stem]
    if unknown := sorted(set(card.families) - set(FAMILIES)):
        raise CardError(f"expected families of {', '.join(FAMILIES)} in {name}, got {', '.join(unknown)}")
    shared = _read(CARDS / PAPERS)
    if unknown := [paper for paper in card.papers if isinstance(paper, str) and paper not in shared]:
        raise CardError(f"expected papers of {PAPERS} in {name}, got {', '.join(unknown)}; try {', '.join(shared)}")
    papers = [shared[paper] if isinstance(paper, str) else paper for paper in card.papers]
    card.papers = [build(Paper, paper, f"{name}: papers[{index}]") for index, paper in enumerate(papers)]
    if card.code is not None:
        card.code = build(Code, card.code, f"{name}: code")
    if not isinstance(card.weights, Weights):
        card.weights = build(Weights, card.weights, f"{name}: weights")
    card.results = [build(Results, table, f"{name}: results[{index}]") for index, table in enumerate(card.results)]
    card.published = {key: build(Published, data, f"{name}: {key}") for key, data in card.published.items()}

    used = [item.source for item in (*card.results, *card.published.values())]
    if unknown := sorted(set(used) - set(card.sources)):
        raise CardError(f"expected sources named in {name}, got {', '.join(unknown)}; try {', '.join(card.sources)}")
    weights = {model: weights_of(model) for model in models(card)}
    known = [*weights, *(f"{model}.{cfg.tag}" for model, cfgs in weights.items() for cfg in cfgs)]
    for key in card.published:
        if key not in known:
            raise CardError(
                f"expected a model of its families in {name}: published, got {key!r}; try {_close(key, known)}"
            )
    for pattern in card.weights.file_only:
        matched = [model for model in weights if fnmatch(model, pattern)]
        if not matched or any(cfg.has_weights for model in matched for cfg in weights[model]):
            got = f"{pattern!r}, which is {', '.join(matched) or 'none'}"
            raise CardError(f"expected models without an address at file_only of {name}, got {got}")
    for table in card.results:
        length = len(table.columns) + (2 if _has_files(table) else 1)
        for row in table.rows:
            if len(row) != length or row[0] not in weights:
                expected = f"[model, {', '.join(table.columns)}{', file' * _has_files(table)}]"
                raise CardError(f"expected {expected} in {table.title!r} of {name}, got {row}")
            if table.config and not (CONFIGS / config_of(table, row)).is_file():
                raise CardError(f"expected the config of {row} of {name}, got no configs/{config_of(table, row)}")
    return card


def models(card: Card) -> list[str]:
    """The card's models: those with published numbers in their order, the others by name, test models last."""
    order = list(dict.fromkeys(key.partition(".")[0] for key in card.published))
    names = [name for family in card.families for name in visattn.list_models(family=family)]
    return sorted(names, key=lambda n: (n.startswith("test_"), order.index(n) if n in order else len(order)))


def weights_of(model: str) -> list[PretrainedCfg]:
    """The default configurations of a model that name weights, else its first one."""
    cfgs = list(timm.models.get_arch_pretrained_cfgs(model).values())
    return [cfg for cfg in cfgs if cfg.has_weights] or cfgs[:1]


def addresses(cfg: PretrainedCfg) -> dict[str, str]:
    """Where weights are, in the order in which they are looked for, by what to call it."""
    hub = {cfg.hf_hub_id: f"https://huggingface.co/{cfg.hf_hub_id}"} if cfg.hf_hub_id else {}
    return {**hub, **({cfg.url.rpartition("/")[2]: cfg.url} if cfg.url else {})}


@functools.cache
def measure(model: str, tag: str) -> tuple[int, float]:
    """Parameters and GMACs of a model at the input size and classes of a tag."""
    network = timm.create_model(f"{model}.{tag}", device="meta")
    params = sum(parameter.numel() for parameter in network.parameters())
    return params, forward_flops(network, *network.pretrained_cfg["input_size"]) / 2e9


def render(card: Card) -> str:
    """The markdown of a card."""
    parts = ["<!-- Generated by scripts/make_cards.py from the .yaml beside it and the code: edit those. -->"]
    parts += [f"# {card.title}", card.summary.strip(), "## Weights", _weights(card), card.weights.note.strip()]
    parts += ["## Models", _models(card), _models_note(card)]
    parts += ["## How to use", f"```python\n{card.usage.strip()}\n```"]
    parts += ["## Input", _bullets(card.input)] if card.input else []
    parts += ["## Limits", _bullets(card.limits)] if card.limits else []
    if card.results:
        parts += ["## Published results", "Official numbers, not reproduced here; each table names its source."]
        if any(table.config for table in card.results):
            parts.append("`config` is the file of this repository with the settings behind a row.")
        for table in card.results:
            note = f"{table.note} Source: {card.sources[table.source]}."
            parts += [f"### {table.title}", _results(card, table), note.strip()]
    parts += ["## Licence", _licence(card), "## Citation", _papers(card)]
    parts += [f"```bibtex\n{paper.bibtex.strip()}\n```" for paper in card.papers]
    return "\n\n".join(part for part in parts if part) + "\n"


def families(cards: dict[str, Card]) -> str:
    """One table of all families: name of the card's file to card."""
    rows = []
    for stem, card in cards.items():
        names = [name for name in models(card) if not name.startswith("test_")]
        fetched = [name for name in names if any(cfg.has_weights for cfg in weights_of(name))]
        by_file = [name for name in names if any(fnmatch(name, pattern) for pattern in card.weights.file_only)]
        params = [measure(name, weights_of(name)[0].tag)[0] / 1e6 for name in names]
        kinds = {"fetched": len(fetched), "from a file": len(by_file)}
        rows.append([
            _link(card.title, f"{CARDS.name}/{stem}.md"), f"`{names[0]}`", f"{len(names)}", _span(params, ".0f"),
            _span([item.top1 for item in card.published.values() if item.top1 is not None], ".1f"),
            _best(card, "COCO", "box AP"), _best(card, "ADE20K", "mIoU"),
            ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count) or "–",
        ])  # fmt: skip
    head = ["family", "for example", "models", "params (M)", "ImageNet top-1 (%)"]
    return _table([*head, "COCO box AP", "ADE20K mIoU", "weights"], rows, left=(0, 1, 7))


def _span(values: list[float], form: str) -> str:
    return " to ".join(dict.fromkeys(format(value, form) for value in (min(values), max(values)))) if values else "–"


def _best(card: Card, data: str, column: str) -> str:
    """The highest number in this column of the card's tables on this data; of two trainings, the later is meant."""
    tables = [table for table in card.results if table.title.startswith(data) and column in table.columns]
    cells = [row[1 + table.columns.index(column)] for table in tables for row in table.rows]
    found = [float(str(cell).rpartition("/")[2]) for cell in cells if cell is not None]
    return f"{max(found):.1f}" if found else "–"


def _weights(card: Card) -> str:
    """Which models have weights, and where from."""
    kinds: dict[str, list[str]] = {}
    names = models(card)
    for name in names:
        by_hand = [how for pattern, how in card.weights.file_only.items() if fnmatch(name, pattern)]
        if by_hand:
            found = [f"file only: {by_hand[0].strip()}"]
        else:
            found = [f"fetchable (`pretrained=True`) from {_host(cfg)}" for cfg in weights_of(name) if cfg.has_weights]
        for kind in dict.fromkeys(found or ["none: random initialisation only"]):
            kinds.setdefault(kind, []).append(name)
    kinds = dict(sorted(kinds.items(), key=lambda item: item[0].split()[0]))  # fetchable, file only, none
    rows = [[", ".join(_patterns(members, names)), kind] for kind, members in kinds.items()]
    return _table(["models", "weights"], rows, left=(0, 1))


def _host(cfg: PretrainedCfg) -> str:
    hub = [f"the Hugging Face hub ({cfg.hf_hub_id.partition('/')[0]})"] if cfg.hf_hub_id else []
    return " or ".join([*hub, *([f"{urlsplit(cfg.url).hostname}"] if cfg.url else [])])


def _patterns(members: list[str], names: list[str]) -> list[str]:
    """Members as the shortest patterns `prefix*` that match no other name."""
    found = []
    for name in members:
        parts = name.split("_")
        for length in range(1, len(parts)):
            prefix = "_".join(parts[:length])
            matched = [other for other in names if other.startswith(prefix)]
            if len(matched) > 1 and set(matched) <= set(members):
                name = f"{prefix}*"
                break
        found.append(f"`{name}`")
    return list(dict.fromkeys(found))


def _models(card: Card) -> str:
    rows = []
    for name in models(card):
        for index, cfg in enumerate(weights_of(name)):
            params, gmacs = measure(name, cfg.tag)
            key = f"{name}.{cfg.tag}"
            published = card.published.get(key) or (None if index else card.published.get(name))
            crop = f"{cfg.crop_pct}" if cfg.crop_mode == "center" else f"{cfg.crop_pct} {cfg.crop_mode}"
            links = " or ".join(_link(text, target) for text, target in addresses(cfg).items())
            rows.append([
                f"`{key if cfg.has_weights else name}`", f"{params / 1e6:.2f}", f"{gmacs:.3f}", f"{cfg.input_size[-1]}",
                crop, f"{cfg.num_classes}", links or "–",
                _cell(cfg.license if cfg.has_weights else None),
                *(_cell(published and getattr(published, key)) for key in ("top1", "gflops", "params_m", "source")),
            ])  # fmt: skip
    head = ["name", "params (M)", "GMACs", "size", "crop", "classes", "weights", "licence"]
    head += ["top-1, published (%)", "GFLOPs, published", "params, published (M)", "source"]
    return _table(head, rows, left=(0, 6, 7, 11))


def numbers(cards: Iterable[Card]) -> str:
    """The text of numbers.csv: parameters (M), GMACs, pixels and published top-1 of each default configuration."""
    rows = []
    for card in cards:
        for name in models(card):
            cfg = weights_of(name)[0]
            params, gmacs = measure(name, cfg.tag)
            published = card.published.get(f"{name}.{cfg.tag}") or card.published.get(name)
            top1 = published.top1 if published and cfg.num_classes == 1000 else None
            row = (
                name,
                f"{params / 1e6:.2f}",
                f"{gmacs:.3f}",
                f"{cfg.input_size[-1]}",
                "" if top1 is None else f"{top1}",
            )
            rows.append(",".join(row))
    return "\n".join(["model,params,gmacs,size,top1", *sorted(rows), ""])


def _models_note(card: Card) -> str:
    text = (
        "Parameters and GMACs (multiply-adds of matrix products, convolutions and attention, one image of the given "
        "size) are counted from the models in this repository. What papers call FLOPs are multiply-adds too. A licence "
        "of – with weights: their authors state none."
    )
    used = dict.fromkeys(item.source for item in card.published.values())
    return f"{text}\n\nSources:\n\n{_bullets(f'{key}: {card.sources[key]}.' for key in used)}" if used else text


def _results(card: Card, table: Results) -> str:
    number, files = len(table.columns), _has_files(table)
    rows = []
    for row in table.rows:
        cells = [f"`{row[0]}`", *map(_cell, row[1 : number + 1])]
        if table.config:
            config = config_of(table, row)
            cells.append(_link(Path(config).stem, f"../configs/{config}"))
        if files:
            file = row[-1] or ""
            cells.append(_link(file.rpartition("/")[2], file if "://" in file else card.base + file))
        rows.append(cells)
    texts = {i for i, _ in enumerate(table.columns, 1) if any(isinstance(row[i], str) for row in table.rows)}
    titles = [name if i in texts else f"{name}, published" for i, name in enumerate(table.columns, 1)]
    head = ["backbone", *titles, *(["config"] if table.config else []), *(["checkpoint"] if files else [])]
    return _table(head, rows, left={0, *texts, number + 1, number + 2})


def config_of(table: Results, row: list) -> str:
    """The config of a row, below configs/."""
    fields = {"model": row[0], **dict(zip(table.columns, row[1:], strict=False))}
    slugs = {key: re.sub("[_ ]", "-", str(value)).lower() for key, value in fields.items()}
    return f"{table.config.format_map(slugs)}.py"


def _has_files(table: Results) -> bool:
    return any(len(row) > len(table.columns) + 1 for row in table.rows)


def _cell(value) -> str:
    return "–" if value is None else str(value)


def _link(text: str, target: str) -> str:
    return f"[{text}]({target})" if text else "–"


def _licence(card: Card) -> str:
    text = "The algorithm follows the paper; the authors published no code."
    if code := card.code:
        link = _link(code.url.partition("://")[2], code.url)
        text = f"The algorithm follows {link} at commit `{code.commit[:7]}` ({code.licence}); no code is copied."
    licence = card.weights.licence.strip()
    return f"{text} This repository: Apache-2.0." + (f"\n\nWeights: {licence}" if licence else "")


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="file names without .yaml (default: every card)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when anything differs")
    parser.add_argument("--cards", type=Path, default=CARDS, help="folder of the cards")
    args = parser.parse_args(argv)

    known = {path.stem: path for path in sorted(args.cards.glob("[!_]*.yaml"))}
    unknown = sorted(set(args.families) - set(known))
    if unknown or not known:
        print(f"error: expected cards in {args.cards}, got no {', '.join(unknown) or '*.yaml'}", file=sys.stderr)
        return 1
    status, cards = 0, {}
    for family in args.families or known:
        try:
            cards[family] = load(known[family])
            text = render(cards[family])
        except CardError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
            continue
        status |= put(known[family].with_suffix(".md"), text, args.check)
    readme = args.cards.parent / "README.md"
    table = args.cards.parent / "visattn" / "models" / "numbers.csv"
    if cards.keys() == known.keys() and readme.is_file():
        text = readme.read_text(encoding="utf-8")
        status |= put(readme, TABLE.sub(f"{families(cards)}\n", text), args.check)
    if cards.keys() == known.keys() and table.is_file():
        status |= put(table, numbers(cards.values()), args.check)
    return status


def put(target: Path, text: str, check: bool) -> int:
    """Write a file, or only say where it differs; returns whether it does."""
    if not check:
        target.write_text(text, encoding="utf-8")
        return 0
    on_disk = target.read_text(encoding="utf-8") if target.is_file() else ""
    if on_disk == text:
        return 0
    lines = [on_disk.splitlines(), text.splitlines()]
    diff = difflib.unified_diff(*lines, f"{target.name} on disk", f"{target.name} rendered", lineterm="")
    print(f"{target.name} is out of date: run python scripts/make_cards.py", *diff, sep="\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
