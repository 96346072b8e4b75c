"""The benchmark's gate: wrong results are not timed."""

import json

import bench_ops
import op_cases
import pytest
import torch

ARGS = ["--cases", "na2d_14_bias", "--seconds", "0"]


pytestmark = pytest.mark.usefixtures("one_thread")


def test_table_and_json(tmp_path):
    out = tmp_path / "results" / "ops"
    assert bench_ops.main([*ARGS, "--out", str(out)]) == 0
    results = json.loads(out.with_suffix(".json").read_text())["results"]
    timed = [r for r in results if r["median_ms"]]
    assert {r["mode"] for r in timed} == set(bench_ops.MODES)
    assert {"gather", "dense SDPA", "unfold", "visattn eager"} <= {r["provider"] for r in timed}
    assert all(r["error"] < bench_ops.TOLERANCE and r["peak_mb"] > 0 and r["calls"] >= 5 for r in timed)
    assert all(r["note"] for r in results if not r["median_ms"]), "what was not timed says why"
    assert "| na2d_14_bias | forward | visattn eager |" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize("name", ["window_56", "grid_56", "halo_64_4heads"])
def test_providers_of_the_other_ops(name):
    case = next(p for p in op_cases.CASES if p.name == name)
    for mode in bench_ops.MODES:
        results = bench_ops.measure(case, mode, None, 0)
        assert len(results) == 2
        assert all(r.median_ms and r.error < bench_ops.TOLERANCE and not r.note for r in results)
        assert results[0].times_faster == 1
        assert all((r.saved_mb is None) == (mode == "forward") for r in results)


def test_a_wrong_provider_is_not_timed(monkeypatch, tmp_path):
    def wrong(case):
        right = case.visattn("eager")
        return lambda q, k, v, bias: right(q, k, v, bias.flip(-1))

    monkeypatch.setitem(op_cases.neighborhood.Neighborhood.providers, "wrong", (wrong, None))
    out = tmp_path / "ops"
    assert bench_ops.main([*ARGS, "--providers", "wrong", "gather", "--modes", "forward", "--out", str(out)]) == 1
    results = {r["provider"]: r for r in json.loads(out.with_suffix(".json").read_text())["results"]}
    assert results["wrong"]["median_ms"] is None
    assert results["gather"]["median_ms"] > 0


def test_peak_memory_counts_what_a_call_allocates():
    peak = bench_ops.peak_bytes(lambda: torch.empty(1 << 20).add(1))
    assert 2 * 4 * (1 << 20) <= peak < 2 * 4 * (1 << 20) + 1000  # the scalar is a few bytes
