"""The files that keep what searches found: JSON, one per GPU, one line per kernel and shape class."""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

FORMAT = 1
SHIPPED = Path(__file__).parent / "configs"

# Kernel and shape class.
Key = tuple[str, tuple[int | str, ...]]


@dataclass(frozen=True)
class Entry:
    """A config by its fields, and the median milliseconds of a call with it and with the default."""

    config: dict[str, int]
    median_ms: float | None
    default_ms: float | None


# What this process found, by GPU: written again with every save, in case another process wrote meanwhile.
_found: dict[str, dict[Key, Entry]] = {}


def directory() -> Path:
    """Where the user's files are."""
    try:
        if given := os.environ.get("VISATTN_CACHE_DIR"):
            return Path(given).expanduser() / "tuning"
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # a user without a home, as in some containers
        cache = Path(tempfile.gettempdir())
    return cache / "visattn" / "tuning"


def file_name(gpu: str) -> str:
    """ "NVIDIA H200" -> "nvidia_h200.json"."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def find(gpu: str, key: Key) -> Iterator[tuple[str, Entry]]:
    """What is known: first from this user's searches ("cache"), then what came with the package ("shipped")."""
    name = file_name(gpu)
    user = {**_read_once(directory() / name, gpu), **_found.get(gpu, {})}
    for source, entries in (("cache", user), ("shipped", _read_once(SHIPPED / name, gpu))):
        if key in entries:
            yield source, entries[key]


def forget() -> None:
    """Let the files be read again."""
    _found.clear()
    _read_once.cache_clear()
    _warn_once.cache_clear()


def add(gpu: str, key: Key, entry: Entry) -> None:
    """Keep an entry in the user's file, beside those that others wrote there; one that cannot be written is kept in
    memory. Of two processes that write at the same moment one may lose its entries, until it writes again."""
    _found.setdefault(gpu, {})[key] = entry
    path = directory() / file_name(gpu)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    text = _render(gpu, {**_parse(path, gpu), **_found[gpu]})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)  # readers see the old file or the new one
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        _warn_once(
            f"cannot write tuning results to {path}: {error}; try another directory in VISATTN_CACHE_DIR"
        )


def _render(gpu: str, entries: Mapping[Key, Entry]) -> str:
    body = ",\n".join(
        json.dumps({"kernel": kernel, "shape_class": shape_class, **vars(entry)})
        for (kernel, shape_class), entry in sorted(entries.items(), key=lambda item: str(item[0]))
    )
    return f'{{\n"format": {FORMAT},\n"gpu": {json.dumps(gpu)},\n"entries": [\n{body}\n]\n}}\n'


def _parse(path: Path, gpu: str) -> dict[Key, Entry]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["gpu"] != gpu:
            raise ValueError(
                f"expected format {FORMAT} for {gpu}, got format {data['format']} for {data['gpu']}"
            )
        found = {}
        for e in data["entries"]:
            entry = Entry(dict(e["config"]), e.get("median_ms"), e.get("default_ms"))
            found[e["kernel"], tuple(e["shape_class"])] = entry
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _warn_once(
            f"tuning results in {path} are ignored: {error!r}; remove the file, or search anew"
        )
        return {}


_read_once = functools.cache(_parse)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
