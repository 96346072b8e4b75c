"""Shared by the tests of several ops, of routed attention and of tuning."""

import pytest
import torch

from tests.ops.cases import ROUTED_FORMS, settled
from tests.ops.launches import Kernel
from visattn.ops.fused import tuning, tuning_cache, tuning_search


@pytest.fixture
def device(backend):
    """Where a backend runs: without a GPU the kernels are interpreted."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture(params=ROUTED_FORMS)
def form(request):
    """Both forms of the eager backend, whatever the map's size."""
    with settled(ROUTED_FORMS[request.param]):
        yield


@pytest.fixture
def tuning_file(tmp_path, monkeypatch):
    """Searches, on a clock of their own; the file in which this test keeps what they find."""
    monkeypatch.setenv("VISATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("VISATTN_TUNE", "search")
    monkeypatch.setattr(tuning_cache, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuning_search, "_clock", lambda: Kernel.now)
    tuning.forget()
    yield tmp_path / "tuning" / "cpu.json"
    tuning.forget()
