"""The growth benchmark, and what it is for: bytes per token do not grow."""

import json

import bench_growth
import pytest

from visattn.layers import TOKEN_MIXERS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bytes_per_token_do_not_grow(tmp_path):
    """From 28 x 28 to 224 x 224, in every layer and mode."""
    out = tmp_path / "growth"
    linear = [name for name in TOKEN_MIXERS if name != "softmax"]
    assert bench_growth.main(["--attention", *linear, "--sizes", "28", "224", "--seconds", "0", "--out", str(out)]) == 0
    results = json.loads(out.with_suffix(".json").read_text())["results"]
    assert {(r["attention"], r["mode"]) for r in results} == {(n, m) for n in linear for m in bench_growth.MODES}
    for small, large in zip(results[::2], results[1::2], strict=True):
        assert (small["tokens"], large["tokens"]) == (784, 50176)
        assert small["tokens"] * bench_growth.DIM * 4 < small["peak_bytes"]
        assert large["peak_bytes"] == pytest.approx(small["peak_bytes"] * 64 * large["bytes_times_linear"])
        assert large["bytes_times_linear"] <= 1.1, (large["attention"], large["mode"])
        assert large["median_ms"] > small["median_ms"] > 0
    assert "| 224 x 224 | 50176 |" in out.with_suffix(".md").read_text()


def test_explicit_softmax_would_be_seen(monkeypatch):
    """A mixer that makes the matrix of all pairs is not linear."""

    def attend(self, q, k, v, size, kv_size):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2)

    monkeypatch.setattr(TOKEN_MIXERS["softmax"], "_attend", attend)
    small, large = bench_growth.measure("softmax", "forward", [14, 28], 0)
    assert small.bytes_times_linear == 1
    assert large.bytes_times_linear > 2
