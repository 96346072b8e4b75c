"""The models' benchmark: timm's weights load into our model, and a model that computes something else is not timed."""

import json

import bench_models
import pytest
import torch

ARGS = ["--models", "halonet26t_va", "--repeats", "1", "--batch", "2"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _size(monkeypatch):
    monkeypatch.setattr(bench_models, "PAIRS", [bench_models.Pair("halonet26t_va", "halonet26t", 256)])


def test_table_and_json(tmp_path):
    out = tmp_path / "results" / "models"
    assert bench_models.main([*ARGS, "--out", str(out)]) == 0
    results = json.loads(out.with_suffix(".json").read_text())["results"]
    assert [r["mode"] for r in results] == list(bench_models.MODES)
    assert all(r["times_faster"] > 0 and r["error"] <= bench_models.TOLERANCE and not r["note"] for r in results)
    assert "| halonet26t_va | halonet26t | forward |" in out.with_suffix(".md").read_text()


def test_a_wrong_model_is_not_timed(monkeypatch):
    build = bench_models.build

    def wrong(pair):
        ours, theirs = build(pair)
        torch.nn.init.zeros_(ours.stages[3].blocks[0].mixer.rel_h)
        return ours, theirs

    monkeypatch.setattr(bench_models, "build", wrong)
    assert bench_models.main([*ARGS, "--modes", "forward"]) == 1
