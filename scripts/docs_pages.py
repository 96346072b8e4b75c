"""mkdocs' hook: pages of docs/ that are files of other folders, and links that work on GitHub and on the site alike.

README.md is the first page; an op's README with the docstrings of its functions, a model card and a benchmark's results
are pages too, so each text stands in one place. A link to a file that is a page leads to the page, one to any other
file of the repository to GitHub. Pages found by a pattern are added to their section of mkdocs.yml's `nav`.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from posixpath import dirname, relpath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OPS = ROOT / "visattn" / "ops"
FILES = {  # page: file
    "index.md": "README.md",
    "training.md": "train/README.md",
    "detection.md": "visattn/mm/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
SECTIONS = {  # of the nav: files
    "Ops": "visattn/ops/*/README.md",
    "Models": "model_cards/*.md",
    "Benchmarks": "benchmarks/results/**/*.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")


def pages() -> dict[str, Path]:
    """Every page that is a file outside docs/."""
    found = {page: ROOT / file for page, file in FILES.items()}
    for section in SECTIONS:
        found |= pages_of(section)
    return found


def pages_of(section: str) -> dict[str, Path]:
    """The pages of a section, by name: an op's has that of its folder."""
    folder = ROOT / SECTIONS[section].partition("*")[0]
    files = sorted(ROOT.glob(SECTIONS[section]))
    names = [file.parent if file.name == "README.md" else file.with_suffix("") for file in files]
    uris = [f"{section.lower()}/{name.relative_to(folder).as_posix().replace('/', '_')}.md" for name in names]
    return dict(zip(uris, files, strict=True))


def functions(op: str) -> list[str]:
    """What `visattn.ops` has of an op."""
    tree = ast.parse((OPS / "__init__.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [alias.name for node in imports if node.module == f"visattn.ops.{op}" for alias in node.names]


def on_config(config: Any) -> Any:
    """Add the pages of the sections to the nav."""
    for entry in config.nav:
        for section, listed in entry.items():
            if section in SECTIONS:
                listed.extend(pages_of(section))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    for page, file in pages().items():
        files.append(File.generated(config, page, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Add an op's docstrings to its page, and lead links where they belong."""
    uri, source = page.file.src_uri, Path(page.file.abs_src_path)
    if source.parent.parent == OPS:
        listed = [f"::: visattn.ops.{name}\n" for name in functions(source.parent.name)]
        markdown = "\n".join([markdown, *(["## Functions\n"] if listed else []), *listed])
    targets = {file: name for name, file in pages().items()}

    def lead(match: re.Match[str]) -> str:
        path, anchor = match.groups(default="")
        file = Path(os.path.normpath(source.parent / path))
        if not file.exists():
            return match[0]  # no link, or a dead one, which mkdocs says
        if file.is_relative_to(ROOT / "docs"):
            target = file.relative_to(ROOT / "docs").as_posix()
        elif file in targets:
            target = targets[file]
        else:
            kind = "tree" if file.is_dir() else "blob"
            return f"{config.repo_url}/{kind}/main/{file.relative_to(ROOT).as_posix()}{anchor}"
        return relpath(target, dirname(uri) or ".") + anchor

    return LINK.sub(lead, markdown)
