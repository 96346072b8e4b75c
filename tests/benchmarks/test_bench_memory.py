"""The memory benchmark: what it prints is what was allocated."""

import json

import bench_memory
import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bytes_per_token_do_not_grow(tmp_path):
    out = tmp_path / "memory"
    assert bench_memory.main(["--images", "160", "320", "--out", str(out)]) == 0
    small, large = json.loads(out.with_suffix(".json").read_text())["results"]
    assert (small["tokens"], small["pooled"], large["pooled"]) == (1600, 25, 100)
    assert large["all_pairs"] == 3 * 6400 * 100 * 4 == 16 * small["all_pairs"]
    for peak in ("forward", "forward_backward"):
        assert small["tokens"] * 72 * 4 < small[peak] < large[peak] < 1.1 * 4 * small[peak]
    assert "| 320 | 6400 | 100 |" in out.with_suffix(".md").read_text()
