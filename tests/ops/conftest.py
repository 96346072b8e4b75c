"""Shared by the tests of routed attention."""

import pytest

from visattn.ops.routed import eager


@pytest.fixture(params=["masked", "listed"])
def form(request, monkeypatch):
    """Both forms of the eager backend, whatever the map's size."""
    monkeypatch.setattr(eager, "_DENSE", {"masked": 10**9, "listed": 0}[request.param])
