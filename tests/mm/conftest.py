"""Without the detection stack the tests here are skipped, and say how to get it."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MISSING = [name for name in ("mmengine", "mmcv", "mmdet", "mmseg") if find_spec(name) is None]


class SkippedModule(pytest.Module):
    def collect(self):
        pytest.skip(f"no {', '.join(MISSING)}: run tools/install_mm.sh", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return SkippedModule.from_parent(parent, path=module_path) if MISSING else None


@pytest.fixture(autouse=True)
def _scopes():
    """mmengine's default scope is global: leave none behind."""
    from mmengine.registry import DefaultScope

    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture(scope="session")
def nuclei(tmp_path_factory):
    """A folder with the set of nuclei."""
    out = tmp_path_factory.mktemp("data")
    command = [sys.executable, ROOT / "tools" / "make_small_sets.py", "--sets", "nuclei", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    return out
