"""Whole models on a GPU, as far as that runs without one."""

import json

import bench_device
import bench_models
import gpu_models
import pytest
import timm
import torch
from gpu_models import EAGER, TIMM, TRITON
from torch import nn

import visattn  # noqa: F401
from visattn.layers.window import WindowAttention
from visattn.ops import explain, use_backend


class Pretend(bench_device.Cpu):
    is_gpu = True
    name = "NVIDIA Pretend 1"


def providers(wrong=False):
    torch.manual_seed(0)
    ours = timm.create_model("test_halonet_va")
    theirs = timm.create_model("test_halonet_va")
    theirs.load_state_dict(ours.state_dict())
    if wrong:
        nn.init.zeros_(next(theirs.parameters()))
    return {TRITON: ours, EAGER: ours, TIMM: theirs}, 64


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch):
    monkeypatch.setattr(gpu_models, "isolated_compile", lambda model: model)


def test_table_and_json(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_models, "open_device", lambda name: Pretend())
    monkeypatch.setattr(bench_models, "build_providers", lambda name: providers())
    out = tmp_path / "models"
    arguments = ["--device", "cuda", "--models", "halonet26t_va", "--batch", "4", "--seconds", "0", "--out", str(out)]
    assert bench_models.main(arguments) == 0
    results = json.loads(out.with_suffix(".json").read_text())["results"]
    keys = [(r["mode"], r["compiled"], r["provider"]) for r in results]
    every = [(m, c, p) for m in bench_models.MODES for c in (False, True) for p in (TRITON, EAGER, TIMM)]
    assert keys == every
    assert all(r["images_per_s"] > 0 and r["peak_mb"] > 0 and r["error"] < gpu_models.TOLERANCE for r in results)
    assert all(r["times_ours"] == 1 for r in results if r["provider"] == TRITON)
    assert all("calls" in r["note"] for r in results if r["provider"] == TRITON), "which backends ran"
    assert "| halonet26t_va | forward | timm | yes | 4 |" in out.with_suffix(".md").read_text()

    bench_models.main([*arguments, "--update", "--modes", "forward", "--compiled", "no"])
    updated = json.loads(out.with_suffix(".json").read_text())["results"]
    assert sorted((r["mode"], r["compiled"], r["provider"]) for r in updated) == sorted(every)
    assert [r for r in results if r["mode"] == "train step"] == [r for r in updated if r["mode"] == "train step"]


def test_wrong_models_and_failures_are_not_timed(monkeypatch):
    models, size = providers(wrong=True)
    results = gpu_models.measure("m", models, "forward", 2, size, Pretend(), (False,), 0)
    assert {r.provider: r.note for r in results if not r.images_per_s} == {TIMM: "wrong result: not timed"}

    def fail(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_models, "train_step", fail)
    models, size = providers()
    results = gpu_models.measure("m", models, "train step", 2, size, Pretend(), (False,), 0)
    assert {r.note for r in results} == {"failed: RuntimeError: out of memory"}


def test_a_train_step_trains():
    models, size = providers()
    model = models[EAGER].train()
    run = gpu_models.train_step(model, model, torch.randn(4, 3, size, size), "eager")
    before = [p.detach().clone() for p in model.parameters()]
    losses = [run().item() for _ in range(2)]
    assert losses[0] != losses[1]
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_compiled_models_do_not_share_graphs(monkeypatch):
    """Two compilations of one module trace two backends."""
    monkeypatch.undo()
    import torch._inductor.compile_fx

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", lambda graph, inputs: graph)
    layer, x = WindowAttention(8, 2, 4), torch.randn(1, 8, 8, 8)
    for backend in ("eager", "reference"):
        compiled = gpu_models.isolated_compile(layer)
        with explain() as decisions, use_backend(backend), torch.no_grad():
            compiled(x)
            assert {d.backend for d in decisions} == {backend}


def test_models_exist():
    assert set(gpu_models.CUDA_MODELS) <= set(timm.list_models())
    assert sum(pair.model in gpu_models.CUDA_MODELS for pair in bench_models.GPU_PAIRS) == 5
    assert {pair.timm_model for pair in bench_models.GPU_PAIRS} <= set(timm.list_models())
