"""Choosing among backends that can and cannot run."""

import logging

import pytest

from visattn.ops.dispatch import Backend, BackendError, Dispatcher, always, explain, use_backend

FAST = Backend("fast", lambda n: None if n % 8 == 0 else f"fast: {n} is not a multiple of 8", lambda n: ("fast", n))
SLOW = Backend("slow", always, lambda n: ("slow", n))


def test_auto_takes_the_first_that_can_and_logs_the_reason_once(caplog):
    op = Dispatcher("op", (FAST, SLOW))
    assert op("auto", 8) == ("fast", 8)
    with caplog.at_level(logging.DEBUG, logger="visattn"), explain() as decisions:
        assert op("auto", 9) == ("slow", 9)
        assert op("auto", 9) == ("slow", 9)
    assert caplog.text.count("9 is not a multiple of 8") == 1
    assert [(d.backend, d.refusals) for d in decisions] == [("slow", {"fast": "fast: 9 is not a multiple of 8"})] * 2


def test_an_explicit_backend_raises_its_reason():
    op = Dispatcher("op", (FAST, SLOW))
    with pytest.raises(BackendError, match=r"op: .*9 is not a multiple of 8.*try backend='auto'"):
        op("fast", 9)
    with use_backend("fast"), pytest.raises(BackendError, match="multiple of 8"):
        op("auto", 9)
    assert op("slow", 8) == ("slow", 8)


def test_no_backend_left():
    with pytest.raises(BackendError, match="no requested backend can run"):
        Dispatcher("op", (FAST,))("auto", 9)


def test_auto_passes_over_what_only_runs_on_request():
    shy = Backend("shy", always, lambda n: ("shy", n), lambda n: None if n == 1 else "only on request")
    op = Dispatcher("op", (shy, SLOW))
    assert op("auto", 1) == ("shy", 1)
    with explain() as decisions:
        assert op("auto", 2) == ("slow", 2)
    assert decisions[0].refusals == {"shy": "only on request"}
    assert op("shy", 2) == ("shy", 2)
