"""The trainer's benchmark: both loops train the same model with the same updates."""

import json

import bench_train
import pytest
import torch
from bench_train import Case

pytestmark = pytest.mark.usefixtures("one_thread")


def test_both_loops_take_the_same_updates(tmp_path, monkeypatch):
    """On the same batches they come to the same weights and the same average."""
    options = ["--model", "test_vit", "--batch-size", "256", "--grad-clip", "0.1", "--output", str(tmp_path)]
    config = bench_train.parse([*bench_train.OPTIONS, *options])
    console = bench_train.metrics.make_console(enabled=False)
    run = bench_train.build(config, bench_train.distributed.start(config), console)

    class SameBatches:
        def __init__(self, dataset, **options):
            dataset.transform = run.engine.loaders.train.loader.dataset.transform

        def __len__(self):
            return run.updates

        def __iter__(self):
            return run.engine.loaders.begin(0, 0)

    tasks = [run.state.task]
    make_task = bench_train.make_task
    monkeypatch.setattr(bench_train, "create_loader", SameBatches)
    monkeypatch.setattr(bench_train, "make_task", lambda *args: tasks.append(make_task(*args)) or tasks[-1])
    loops = bench_train.our_loop(run), bench_train.timm_loop(run, run.config)
    before = {name: value.clone() for name, value in run.engine.model.state_dict().items()}
    assert [len(list(loop())) for loop in loops] == [5, 5]
    for ema in (False, True):
        ours, theirs = (task.get_eval_model(ema=ema).state_dict() for task in tasks)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    after = run.engine.model.state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_table_and_json(tmp_path, monkeypatch):
    """Of digits in this process, and of files in a worker."""
    cases = {"digits": Case("test_vit", 512, 32), "jpeg": Case("test_vit", 2, 32, files=4)}
    monkeypatch.setattr(bench_train, "CASES", cases)
    out = tmp_path / "results" / "train"
    for name, workers in (("digits", "0"), ("jpeg", "1")):
        assert bench_train.main(["--cases", name, "--workers", workers, "--rounds", "3", "--out", str(out)]) == 0
        (result,) = json.loads(out.with_suffix(".json").read_text())["results"]
        assert result["case"] == name
        assert result["workers"] == int(workers)
        assert result["ratio_quartiles"][0] <= result["ratio"] <= result["ratio_quartiles"][1]
        assert min(result["images_per_s"], result["timm_images_per_s"], result["cpu_ratio"]) > 0
        assert f"| {name} | test_vit | 32 | {cases[name].batch} | {workers} | 3 |" in out.with_suffix(".md").read_text()
