"""Which implementation of an op runs: chosen from shapes, dtypes and device, never from data.

Precedence of a request: the call's `backend=` argument, then `use_backend(...)`, then the environment variable
`VISATTN_BACKEND`, then "auto". "auto" takes the first backend that can run; any other name takes that one or raises
the reason why it cannot. The choice is made while an op is traced, so `torch.compile` and `torch.export` bake it in.

Whether Triton can run a problem, and "auto" should take it, says `fused/support.py`.

A public function of `visattn.ops` makes one `Problem` of its arguments and gives it to the backend that
`Backends.choose` names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import os
import typing
from collections.abc import Callable, Generator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from visattn.ops.fused import support
from visattn.ops.geometry import plain
from visattn.ops.registration import (
    flops_are_counted,
    is_compiling,
    is_plain,
    known_sizes,
    register,
)

_logger = logging.getLogger("visattn")
_requested: ContextVar[str | None] = ContextVar("visattn_backend", default=None)
_decisions: ContextVar[list[Decision] | None] = ContextVar("visattn_decisions", default=None)


class BackendError(RuntimeError):
    """The requested backend does not exist for this op or cannot run this call; the message says why."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One checked call of an op, frozen: its tensors, sizes and flags. Every backend is `attend(problem)`.

    Fields are what a custom op takes: `Tensor`, `Tensor | None`, `int`, `float`, `bool`, `str`, and sequences of ints
    and bools. What does not fit is refused by `__post_init__`, with a typed error.
    """

    def tensors(self) -> list[Tensor]:
        """Those that are given."""
        return [x for x in vars(self).values() if isinstance(x, Tensor)]

    def trains(self) -> bool:
        """Whether a gradient may be asked for."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.tensors())

    def empty(self) -> Tensor | tuple[Tensor, ...]:
        """Tensors of the results' shapes and dtypes."""
        raise NotImplementedError

    def flops(self) -> int:
        """FLOPs of the op's definition, two per multiply-add, whatever a backend computes."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class AttentionProblem(Problem):
    """A problem whose result is [B, *spatial, N, Dv] for queries [B, *spatial, N, D] and values [..., Dv]."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def size(self) -> list[int]:
        """The spatial sizes of the queries."""
        return plain(self.q.shape[1:-2])

    @property
    def dtype(self) -> torch.dtype:
        """In which logits and weights are made: float32 at least."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def empty(self) -> Tensor | tuple[Tensor, ...]:
        """The result, and the log-sum-exps where a problem has `return_lse` and asks for them."""
        out = self.v.new_empty((*self.q.shape[:-1], self.v.shape[-1]))
        lse = self.q.new_empty(self.q.shape[:-1], dtype=self.dtype)
        return (out, lse) if getattr(self, "return_lse", False) else out


P = TypeVar("P", bound=Problem)


@dataclass(frozen=True)
class Backend(Generic[P]):
    """One implementation of an op.

    Attributes:
        name: What users write in `backend=`.
        attend: From a problem to the op's result.
        can_run: None, or the reason why this backend cannot run the problem.
        automatic: None, or the reason why "auto" should pass this backend over although it can run the problem when
            asked for by name.
    """

    name: str
    attend: Callable[[P], Any]
    can_run: Callable[[P], str | None] = lambda problem: None
    automatic: Callable[[P], str | None] = lambda problem: None


@contextlib.contextmanager
def use_backend(name: str) -> Generator[None]:
    """Request backend `name` for every op called in this context that does not name one itself.

    The context is that of `contextvars`: threads that start inside it do not inherit it; enter it in each of them, or
    set the environment variable.

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
    reasons: dict[str, str]


@contextlib.contextmanager
def explain() -> Generator[list[Decision]]:
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


class Backends(Generic[P]):
    """The backends of one op; "auto" prefers Triton, then eager.

    Args:
        name: Of the op, also as a custom op.
        problem: Type of its problems.
        triton: `attend` on the fused core.
        eager: `attend` in fast, portable PyTorch.
        reference: `attend` by the definition.
        can_run: Whether the Triton kernels can run a problem; default: they take its tensors.
        automatic: Whether "auto" should take them; default: on a GPU.
        whole_on_cpu: `torch.compile` for a CPU keeps the op whole: its eager form is the faster one there. Programs of
            `torch.export` see into it nevertheless.
        decomposition: `attend` for sizes that are not known; default: `eager` with symbols for sizes.
    """

    def __init__(
        self,
        name: str,
        problem: type[P],
        triton: Callable[[P], Any],
        eager: Callable[[P], Any],
        reference: Callable[[P], Any],
        *,
        can_run: Callable[[P], str | None] = support.can_run,
        automatic: Callable[[P], str | None] = support.automatic,
        whole_on_cpu: bool = False,
        decomposition: Callable[[P], Any] | None = None,
    ) -> None:
        self.name = name
        self.backends: tuple[Backend[P], ...] = (
            Backend("triton", triton, can_run, automatic),
            Backend("eager", eager),
            Backend("reference", reference),
        )
        self.whole_on_cpu = whole_on_cpu

        def run(*args: Any) -> Any:
            given = problem(*args[:-1])
            return self._select(given, args[-1]).attend(given)

        hints, kind = typing.get_type_hints(problem), inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = [*(field.name for field in dataclasses.fields(problem)), "backend"]
        arguments = [inspect.Parameter(n, kind, annotation=hints.get(n, str)) for n in names]
        # pyrefly: ignore[missing-attribute]: what inspect reads is not declared for functions
        run.__signature__ = inspect.Signature(arguments)
        self._whole = register(
            name,
            run,
            fake=lambda *args: problem(*args[:-1]).empty(),
            flops=lambda *args: problem(*args[:-1]).flops(),
            decomposition=lambda *args: (decomposition or eager)(problem(*args[:-1])),
        )

    def choose(self, problem: P, requested: str) -> Callable[[P], Any]:
        """What to call with the problem: the `attend` of a backend, or the custom op where a graph must hold it whole.

        Raises:
            BackendError: An explicitly requested backend is unknown or cannot run the problem, or none can.
        """
        values = list(vars(problem).values())  # fields, in their order
        if is_plain(values):
            return self._select(problem, requested).attend
        whole = self.whole_on_cpu and values[0].device.type == "cpu" and is_compiling()
        if whole or not known_sizes(*values) or flops_are_counted():
            return lambda problem: self._whole(*values, requested)
        return self._select(problem, requested).attend

    def _select(self, problem: P, requested: str) -> Backend[P]:
        if requested == "auto":
            requested = _requested.get() or os.environ.get("VISATTN_BACKEND") or "auto"
        reasons = {}
        for backend in self.backends:
            if requested not in ("auto", backend.name):
                continue
            reason = backend.can_run(problem)
            if reason is None and requested == "auto":
                reason = backend.automatic(problem)
            if reason is None:
                if (decisions := _decisions.get()) is not None:
                    decisions.append(Decision(self.name, backend.name, reasons))
                return backend
            reasons[backend.name] = reason
            _log_once(self.name, backend.name, reason)
        if not reasons:
            names = ", ".join(repr(b.name) for b in self.backends)
            raise BackendError(f"{self.name}: expected backend 'auto', {names}; got {requested!r}")
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        message = f"no requested backend can run this call ({why}); try backend='auto'"
        raise BackendError(f"{self.name}: {message}")
