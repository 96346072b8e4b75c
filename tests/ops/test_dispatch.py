"""Choosing among backends that can and cannot run."""

import logging
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from visattn import ops
from visattn.ops import BackendError, explain, use_backend
from visattn.ops.dispatch import Backends, Problem


@dataclass(frozen=True, eq=False)
class Scaling(Problem):
    x: Tensor
    n: int

    def empty(self):
        return self.x.new_empty(self.x.shape)

    def flops(self):
        return self.x.numel()


X = torch.ones(2)
BACKENDS = Backends(
    "test_only_op",
    Scaling,
    triton=lambda problem: problem.x * problem.n,
    eager=lambda problem: problem.x * -problem.n,
    reference=lambda problem: problem.x * 0,
    can_run=lambda problem: None if problem.n % 8 == 0 else f"triton: {problem.n} is not a multiple of 8",
    automatic=lambda problem: "only on request" if problem.n == 16 else None,
)


def op(backend, n):
    problem = Scaling(X, n)
    return BACKENDS.choose(problem, backend)(problem)[0].item()


def test_auto_takes_the_first_that_can_and_logs_the_reason_once(caplog):
    assert op("auto", 8) == 8
    with caplog.at_level(logging.DEBUG, logger="visattn"), explain() as decisions:
        assert op("auto", 9) == -9
        assert op("auto", 9) == -9
    assert caplog.text.count("9 is not a multiple of 8") == 1
    expected = ("test_only_op", "eager", {"triton": "triton: 9 is not a multiple of 8"})
    assert [(d.op, d.backend, d.reasons) for d in decisions] == [expected] * 2


def test_an_explicit_backend_raises_its_reason():
    with pytest.raises(BackendError, match=r"test_only_op: .*9 is not a multiple of 8.*try backend='auto'"):
        op("triton", 9)
    with use_backend("triton"), pytest.raises(BackendError, match="multiple of 8"):
        op("auto", 9)
    assert op("reference", 9) == 0


def test_auto_passes_over_what_only_runs_on_request():
    with explain() as decisions:
        assert op("auto", 16) == -16
    assert decisions[0].reasons == {"triton": "only on request"}
    assert op("triton", 16) == 16


def test_what_requests_a_backend_and_in_which_order(monkeypatch):
    q, k, v = torch.randn(3, 1, 4, 4, 1, 4)
    with explain() as decisions:
        ops.neighborhood_attention(q, k, v, 3)
        with use_backend("reference"):
            ops.neighborhood_attention(q, k, v, 3)
            ops.neighborhood_attention(q, k, v, 3, backend="eager")
        monkeypatch.setenv("VISATTN_BACKEND", "reference")
        ops.neighborhood_attention(q, k, v, 3)
        with use_backend("eager"):
            ops.neighborhood_attention(q, k, v, 3)
    assert [d.backend for d in decisions] == ["eager", "reference", "eager", "reference", "eager"]
    ops.neighborhood_attention(q, k, v, 3)
    assert len(decisions) == 5, "the context has ended"


def test_threads_do_not_inherit_a_request():
    """As its docstring says; each enters the context itself."""
    found = []

    def plain():
        found.append(op("auto", 8))

    def entered():
        with use_backend("reference"):
            plain()

    with use_backend("eager"):
        for target in (plain, entered):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        plain()
    assert found == [8, 0, -8]
    assert "threads" in use_backend.__doc__
