"""Published weights: from the caches of torch.hub and the Hugging Face hub, or fetched into them.

Files in a cache are taken without a look at the network. Otherwise the hosts are asked first, with the clients that
download, so that proxies, certificates and mirrors are theirs: left to themselves, these retry for up to a minute.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from queue import Empty, Queue
from threading import Thread
from typing import Protocol, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import huggingface_hub
import timm
import torch
from huggingface_hub.utils import EntryNotFoundError, get_session
from timm.models import PretrainedCfg, _builder
from timm.models._hub import download_cached_file, hf_split

from visattn.weights import WeightsError, first_line

T = TypeVar("T")

ASK_SECONDS = 10.0  # for a host to answer
WARN_SECONDS = 4.0  # until the user is told what is waited for
GIVE_UP_SECONDS = 15.0  # a resolver without a network takes its time, whatever it is told


class Source(Protocol):
    """One address of a model's weights."""

    @property
    def address(self) -> str:
        """What to open in a browser."""

    @property
    def place(self) -> str:
        """Where a file brought from elsewhere is found, and what that place is called."""

    def cached(self) -> Path | None:
        """The file, if it is there."""

    def ask(self) -> None:
        """Return if the host answers, whatever it says; any error is a reason why not."""

    def download(self) -> Path:
        """Fetch the file into the cache."""


@dataclass(frozen=True)
class Web:
    """A URL, kept in the cache of torch.hub under `name`."""

    url: str
    name: str
    cache_dir: str | Path | None

    @property
    def address(self) -> str:
        return self.url

    @property
    def _file(self) -> Path:
        return Path(self.cache_dir or os.path.join(torch.hub.get_dir(), "checkpoints"), self.name)

    @property
    def place(self) -> str:
        return f"{self._file} (below TORCH_HOME)"

    def cached(self) -> Path | None:
        return self._file if self._file.is_file() else None

    def ask(self) -> None:
        with suppress(HTTPError):  # some refuse to be asked and serve the file
            urlopen(Request(self.url, method="HEAD"), timeout=ASK_SECONDS).close()

    def download(self) -> Path:
        progress = _builder._DOWNLOAD_PROGRESS  # of timm.models.set_pretrained_download_progress
        address: tuple[str, str] = (self.url, self.name)
        return Path(download_cached_file(address, progress=progress, cache_dir=self.cache_dir))


@dataclass(frozen=True)
class Hub:
    """A repository of the Hugging Face hub, in which the first of `names` that there is counts."""

    repository: str
    revision: str | None
    names: Sequence[str]
    cache_dir: str | Path | None

    @property
    def address(self) -> str:
        return f"{huggingface_hub.constants.ENDPOINT}/{self.repository} ({' or '.join(self.names)})"

    @property
    def place(self) -> str:
        folder = f"models--{self.repository.replace('/', '--')}"
        where = Path(self.cache_dir or huggingface_hub.constants.HF_HUB_CACHE, folder)
        return f"{where} (below HF_HUB_CACHE, as `hf download {self.repository}` makes it)"

    def cached(self) -> Path | None:
        for name in self.names:
            found = huggingface_hub.try_to_load_from_cache(
                self.repository, name, cache_dir=self.cache_dir, revision=self.revision
            )
            if isinstance(found, str):
                return Path(found)
        return None

    def ask(self) -> None:
        url = huggingface_hub.hf_hub_url(self.repository, self.names[0], revision=self.revision)
        get_session().head(url, timeout=ASK_SECONDS)

    def download(self) -> Path:
        for name in self.names[:-1]:
            try:
                return self._download(name)
            except EntryNotFoundError:
                continue
        return self._download(self.names[-1])

    def _download(self, name: str) -> Path:
        return Path(
            huggingface_hub.hf_hub_download(self.repository, name, revision=self.revision, cache_dir=self.cache_dir)
        )


def is_known(name: str) -> bool:
    """True for a registered model, without a tag or with one of its own."""
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:  # of a tag that the model does not have
        return False
    return timm.is_model(name)


def find_sources(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> list[Source]:
    """The addresses in a configuration, in the order in which timm prefers them."""
    sources: list[Source] = []
    if cfg.hf_hub_id:
        repository, revision = hf_split(cfg.hf_hub_id)
        names = "model.safetensors", "pytorch_model.bin"
        if cfg.hf_hub_filename:
            safe = str(PurePosixPath(cfg.hf_hub_filename).with_suffix(".safetensors"))
            names = tuple(dict.fromkeys((safe, cfg.hf_hub_filename)))
        sources.append(Hub(repository, revision, names, cache_dir))
    if cfg.url:
        url, name = cfg.url if isinstance(cfg.url, tuple) else (cfg.url, PurePosixPath(urlsplit(cfg.url).path).name)
        if "." not in name and cfg.architecture:  # the address of a share, which ends in its id
            name = f"{_name(cfg)}.pth"
        sources.append(Web(url, name, cache_dir))
    return sources


def fetch(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Path:
    """The file of a configuration's weights: from a cache, or from the first of its addresses that has it.

    Args:
        cfg: What timm knows of the weights.
        cache_dir: In place of both caches.

    Raises:
        WeightsError: No address, or none that the file can be had from; the message says where to put it.
    """
    return _first(cfg, cache_dir, lambda source: source.cached() or source.download())


def check_published(model_name: str) -> None:
    """Refuse a model of this package or of timm whose weights cannot be fetched, before anything is.

    Raises:
        WeightsError: None are published under an address, or no host answers.
    """
    cfg = timm.get_pretrained_cfg(model_name, allow_unregistered=True) or PretrainedCfg(architecture=model_name)
    _first(cfg, None, lambda source: None)


def _first(cfg: PretrainedCfg, cache_dir: str | Path | None, get: Callable[[Source], T]) -> T:
    """What `get` gives of the source whose file is in its cache, else of the first that answers and has it."""
    sources = find_sources(cfg, cache_dir)
    if not sources:
        raise WeightsError(
            f"expected the published weights of {cfg.architecture}, got no address of any; try pretrained=False, "
            "pretrained_cfg_overlay=dict(file=...), or a model of visattn.list_models(pretrained=True)"
        )
    for source in sources:
        if source.cached():
            return get(source)
    reasons: list[str] = []
    for source in sources:
        try:
            wait_for(source, lambda reason: _sentence(cfg, sources, [*reasons, reason]))
            return get(source)
        except Exception as error:  # of urllib, requests or httpx, whichever a client uses
            reasons.append(first_line(error))
    raise WeightsError(_sentence(cfg, sources, reasons))


def wait_for(source: Source, describe: Callable[[str], str]) -> None:
    """Return when the host answers, and raise what it cannot be asked for; warn if that takes long."""
    answers: Queue[Exception | None] = Queue()

    def ask() -> None:
        try:
            source.ask()
            answers.put(None)
        except Exception as error:  # it is raised below
            answers.put(error)

    Thread(target=ask, daemon=True).start()
    for start, end in pairwise((0.0, WARN_SECONDS, GIVE_UP_SECONDS)):
        try:
            error = answers.get(timeout=end - start)
        except Empty:
            late = f"no answer in {end:g} s"
            if end == GIVE_UP_SECONDS:
                raise TimeoutError(late) from None
            warnings.warn(f"{describe(late)} (still waiting)", stacklevel=2)
        else:
            if error is not None:
                raise error
            return


def _name(cfg: PretrainedCfg) -> str:
    return ".".join(part for part in (cfg.architecture, cfg.tag) if part) or "a model"


def _sentence(cfg: PretrainedCfg, sources: Sequence[Source], reasons: Sequence[str]) -> str:
    """Say why each of the first sources has not given the file; all of them are places to put it."""
    got = " nor ".join(f"from {source.address}: {reason}" for source, reason in zip(sources, reasons, strict=False))
    places = " or ".join(source.place for source in sources)
    return (
        f"expected weights of {_name(cfg)}, got none {got}; try again with a network, or a copy at {places}, or "
        "anywhere with pretrained_cfg_overlay=dict(file=...)"
    )
