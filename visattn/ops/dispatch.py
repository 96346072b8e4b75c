"""Which implementation of an op runs: chosen from shapes, dtypes and device, never from data.

Precedence of a request: the call's `backend=` argument, then `use_backend(...)`, then the environment variable
`VISATTN_BACKEND`, then "auto". "auto" takes the first backend that can run; any other name takes that one or raises
the reason why it cannot. The choice is made while an op is traced, so `torch.compile` and `torch.export` bake it in.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_logger = logging.getLogger("visattn")
_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("visattn_backend", default=None)
_decisions: contextvars.ContextVar[list[Decision] | None] = contextvars.ContextVar("visattn_decisions", default=None)


class BackendError(RuntimeError):
    """The requested backend does not exist for this op or cannot run this call; the message says why."""


def always(*args: Any, **kwargs: Any) -> None:
    """The `refusal` of a backend that runs everything."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: What users write in `backend=`.
        refusal: Called with the op's checked arguments; returns why this backend cannot run them, or None if it can.
        run: Called with the same arguments; returns the op's result.
        automatic: Called with the same arguments; returns why "auto" should pass this backend over although it can run
            them when asked for by name, or None.
    """

    name: str
    refusal: Callable[..., str | None]
    run: Callable[..., Any]
    automatic: Callable[..., str | None] = always


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Request backend `name` for every op called in this context that does not name one itself.

    `torch.compile` keeps the backends that it traced a module with, in its caches on disk too: to compile the same
    module with others, call `torch.compiler.reset()` between, and turn those caches off.
    """
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


@dataclass(frozen=True)
class Decision:
    """What ran one call of an op, and why the backends preferred to it did not."""

    op: str
    backend: str
    refusals: dict[str, str]


@contextlib.contextmanager
def explain() -> Iterator[list[Decision]]:
    """Collect the choice made by every op called in this context, in order, e.g. for a forward pass of a model."""
    decisions: list[Decision] = []
    token = _decisions.set(decisions)
    try:
        yield decisions
    finally:
        _decisions.reset(token)


@functools.lru_cache(maxsize=256)
def _log_once(op: str, backend: str, reason: str) -> None:
    _logger.debug("%s: backend %r passed over: %s", op, backend, reason)


class Dispatcher:
    """The ordered backends of one op; "auto" prefers the earlier ones."""

    def __init__(self, op: str, backends: tuple[Backend, ...]) -> None:
        self.op = op
        self.backends = backends

    def select(self, requested: str, *args: Any, **kwargs: Any) -> Backend:
        """The backend for these arguments.

        Raises:
            BackendError: An explicitly requested backend is unknown or refuses, or none can run.
        """
        if requested == "auto":
            requested = _requested.get() or os.environ.get("VISATTN_BACKEND") or "auto"
        refusals = {}
        for backend in self.backends:
            if requested not in ("auto", backend.name):
                continue
            reason = backend.refusal(*args, **kwargs)
            if reason is None and requested == "auto":
                reason = backend.automatic(*args, **kwargs)
            if reason is None:
                if (decisions := _decisions.get()) is not None:
                    decisions.append(Decision(self.op, backend.name, refusals))
                return backend
            refusals[backend.name] = reason
            _log_once(self.op, backend.name, reason)
        if not refusals:
            names = ", ".join(repr(b.name) for b in self.backends)
            raise BackendError(f"{self.op}: expected backend 'auto', {names}; got {requested!r}")
        why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        raise BackendError(f"{self.op}: no requested backend can run this call ({why}); try backend='auto'")

    def __call__(self, requested: str, *args: Any, **kwargs: Any) -> Any:
        return self.select(requested, *args, **kwargs).run(*args, **kwargs)
