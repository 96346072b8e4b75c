"""ShiftViT's benchmark: the official form has the same weights and results, and what has others is not timed."""

import json

import bench_shiftvit
import pytest
import torch

ARGS = ["--models", "test_shiftvit", "--size", "64", "--repeats", "1", "--forms", "eager"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_table_and_json(tmp_path):
    out = tmp_path / "shiftvit"
    assert bench_shiftvit.main([*ARGS, "--out", str(out)]) == 0
    results = json.loads(out.with_suffix(".json").read_text())["results"]
    assert [r["mode"] for r in results] == list(bench_shiftvit.MODES)
    assert all(r["times_faster"] > 0 and r["error"] <= bench_shiftvit.TOLERANCE and not r["note"] for r in results)
    text = out.with_suffix(".md").read_text()
    assert "| test_shiftvit | forward | eager | 1 | 64 |" in text
    assert bench_shiftvit.cpu_name() in text


def test_a_wrong_model_is_not_timed(monkeypatch):
    build = bench_shiftvit.build

    def wrong(name):
        ours, official = build(name)
        torch.nn.init.zeros_(ours.stages[3].blocks[0].mlp.fc2.weight)
        return ours, official

    monkeypatch.setattr(bench_shiftvit, "build", wrong)
    assert bench_shiftvit.main([*ARGS, "--modes", "forward"]) == 1
