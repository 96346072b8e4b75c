"""The benchmarks' GPU side, as far as it runs without one: cases, providers, floors, tables, goals."""

import dataclasses
import json
import time
from types import SimpleNamespace
from typing import ClassVar

import bench_device
import bench_models
import bench_ops
import gpu_report
import op_cases
import op_gate
import pytest
import torch
from gpu_report import BOTH, FORWARD, TRITON, GpuResult
from op_floors import Rates
from torch._subclasses.fake_tensor import FakeTensorMode

from visattn.ops.routed import region_routing

H200 = Rates()
CUDA = {p.name: p for p in op_cases.CUDA_CASES}
ON_A_GPU = tuple(f"SDPA {name}, x partitioned" for name in ("cuDNN", "flash", "efficient"))
NO_BACKWARD = "FlexAttention compiled", "natten flex-fna"  # on a CPU


class Pretend(bench_device.Cpu):
    """A CPU that is benchmarked like a GPU."""

    is_gpu = True
    name = "NVIDIA Pretend 1"

    def host_seconds(self, run):
        return 5e-6

    def rates(self):
        return H200


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.parametrize("case", op_cases.TINY, ids=lambda case: case.name)
@pytest.mark.parametrize("mode", [FORWARD, BOTH])
def test_every_provider_of_a_gpu_computes_the_same(case, mode):
    names = [name for name in bench_ops.providers(case, True) if name not in (TRITON, *ON_A_GPU)]
    for r in bench_ops.measure(case, mode, names, 0, Pretend()):
        if mode == BOTH and r.provider in NO_BACKWARD:
            continue
        assert r.median_ms or r.note, "what was not timed says why"
        assert "natten" in r.provider or ("failed" not in r.note and "wrong" not in r.note), r
        assert not r.median_ms or (r.error < 1e-5 and r.calls >= 5 and r.peak_mb > 0 and r.host_ms == 5e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")
@pytest.mark.parametrize("name", ["tiny_na2d_d2", "tiny_aggregated"])
def test_kernels_in_the_interpreter(name):
    arguments = ["--cases", name, "--providers", TRITON, "--modes", FORWARD, "--seconds", "0"]
    assert bench_ops.main(arguments) == 0
    case = next(case for case in op_cases.TINY if case.name == name)
    (result,) = bench_ops.measure(case, FORWARD, [TRITON], 0, gate_only=True)
    assert result.error < 1e-5
    assert not result.note


@pytest.mark.parametrize("case", op_cases.TINY, ids=lambda case: case.name)
def test_providers_in_bfloat16(case):
    case = dataclasses.replace(case, dtype=torch.bfloat16)
    names = [name for name in bench_ops.providers(case, True) if "natten" not in name and name != TRITON]
    for r in bench_ops.measure(case, BOTH, names, 0, Pretend()):
        assert r.provider in NO_BACKWARD or r.median_ms or (r.note and r.error is None), r


@pytest.mark.parametrize("case", op_cases.TINY, ids=lambda case: case.name)
def test_nothing_stays_on_the_cpu(case):
    """Tensors of a GPU that is not there; a provider that mixes them with tensors of the CPU fails."""
    providers = {**bench_ops.providers(case, True), "reference": bench_ops.backend("reference")}
    for name, (build, can_run) in providers.items():
        if "natten" in name or name in (TRITON, *ON_A_GPU) or (can_run and can_run(case, FORWARD)):
            continue
        with FakeTensorMode():
            inputs = case.fuse({n: torch.empty(shape, device="cuda") for n, shape in case.shapes().items()})
            (out,) = op_gate.runner(build(case), inputs, FORWARD)()
        assert out.device.type == "cuda"


@pytest.mark.parametrize("case", op_cases.CUDA_CASES, ids=lambda case: case.name)
def test_cases_are_what_the_layers_give(case):
    fused = dataclasses.replace(case, batch=1)
    small = {n: torch.empty(shape, device="meta") for n, shape in fused.shapes().items()}
    for names in case.projections:
        views = [fused.fuse(small)[name] for name in names]
        assert len({v.stride() for v in views}) == 1
        assert views[0].stride(-1) == 1
        assert views[0].stride(2) == len(names) * case.heads * case.dim
    assert case.dtype == torch.bfloat16
    assert case.work()[0] > 0


def test_routing_of_narrow_dtypes_is_clear():
    """Rounding to bfloat16 does not change which regions are best."""
    case = dataclasses.replace(CUDA["routed_14_topk16"], batch=2)
    inputs = case.inputs()
    q, k = inputs["q"], inputs["k"]
    exact, _ = region_routing(q.double(), k.double(), topk=case.topk, n_win=case.n_win)
    rounded, _ = region_routing(q, k, topk=case.topk, n_win=case.n_win)
    assert torch.equal(exact.sort(-1).values, rounded.sort(-1).values)
    assert len(exact.unique()) == 49


def a_case(case, mode, ours, **others):
    found = [GpuResult(case.name, mode, name.replace("_", " "), median_ms=ms) for name, ms in others.items()]
    return [*found, GpuResult(case.name, mode, TRITON, median_ms=ours)]


def test_ratios_and_row():
    results = a_case(CUDA["window_56"], FORWARD, 0.1, other=0.25)
    gpu_report.rate(results, CUDA["window_56"], FORWARD, H200)
    other, ours = results
    assert (other.times_triton, ours.times_triton) == (2.5, 1)
    assert ours.gb_per_s == pytest.approx(4 * 128 * 3136 * 64 * 2 / 1e-4 / 1e9)
    assert ours.times_floor == pytest.approx(100 / 48.5, rel=0.01)
    cells = dict(zip(gpu_report.COLUMNS, gpu_report.row(other), strict=True))
    assert (cells["us"], cells["x triton"], cells["note"]) == ("250.0", "2.50", "")
    refused = GpuResult("window_56", FORWARD, "natten", note="not installed")
    assert gpu_report.row(refused)[3:] == [""] * 8 + ["not installed"]


def test_goals():
    results = a_case(CUDA["na2d_56"], FORWARD, 0.1, FlexAttention_compiled=0.2)
    results.append(GpuResult("na2d_56", FORWARD, "natten cutlass-fna", note="not installed"))
    results += a_case(CUDA["na2d_56_bias"], FORWARD, 0.11)
    results += a_case(CUDA["halo_32"], BOTH, 0.1, timm_HaloAttn=0.5)
    results += a_case(CUDA["window_56"], FORWARD, 0.1)
    results.append(GpuResult("routed_56_topk1", BOTH, "all", note="failed: no memory"))
    gpu_report.rate(results[-2:-1], CUDA["window_56"], FORWARD, H200)
    lines = gpu_report.acceptance(results, H200).splitlines()

    def verdict(goal, case, mode):
        (line,) = [x for x in lines if goal in x and f"| {case} | {mode} |" in x]
        return [cell.strip() for cell in line.split("|")[5:7]]

    assert verdict("FlexAttention", "na2d_56", FORWARD) == ["0.50", "missed by 25%"]
    assert verdict("natten", "na2d_56", FORWARD) == ["", "not measured: natten cutlass-fna: not installed"]
    assert verdict("bias", "na2d_56", FORWARD) == ["1.10", "met"]
    assert verdict("HaloAttn", "halo_32", BOTH) == ["5.00", "met"]
    assert verdict("copy", "window_56", FORWARD) == ["0.48", "missed by 13%"]
    assert verdict("gather", "routed_56_topk1", BOTH) == ["", "not measured: visattn triton: failed: no memory"]
    assert "not in this run" in verdict("unfold", "aggregated_14", BOTH)[1]
    cases = {goal.cases for goal in gpu_report.all_goals(H200)}
    assert {name for names in cases for name in names} <= CUDA.keys()


def main_on(device, monkeypatch, *arguments):
    monkeypatch.setattr(bench_ops, "open_device", lambda name: device)
    return bench_ops.main(["--device", "cuda", *arguments])


@pytest.fixture
def tiny(monkeypatch):
    """Two cases for the GPU."""
    case = op_cases.TINY[0]
    cases = [dataclasses.replace(case, name=name) for name in ("na2d_56", "na2d_28")]
    monkeypatch.setattr(bench_ops, "CUDA_CASES", cases)
    return ["--modes", FORWARD, "--providers", "visattn eager", "--seconds", "0"]


def test_session_keeps_and_replaces_results(monkeypatch, tmp_path, tiny, capsys):
    out = tmp_path / "bench_ops"
    arguments = [*tiny, "--out", str(out)]
    assert main_on(Pretend(), monkeypatch, *arguments) == 0
    first = json.loads(out.with_suffix(".json").read_text())
    assert first["setting"]["copy"] == "4.30 TB/s"
    assert first["setting"]["GPU"] == Pretend.name
    assert [r["case"] for r in first["results"]] == ["na2d_56", "na2d_28"]
    text = out.with_suffix(".md").read_text()
    assert "| na2d_28 | forward | visattn eager |" in text
    assert "## Goals" in text
    assert "not measured: visattn triton: not in this run" in capsys.readouterr().out

    monkeypatch.setattr(bench_ops, "CUDA_CASES", bench_ops.CUDA_CASES[1:])
    main_on(Pretend(), monkeypatch, *arguments, "--update")
    second = json.loads(out.with_suffix(".json").read_text())["results"]
    assert second[0] == first["results"][0]
    assert second[1]["case"] == "na2d_28"
    assert second[1] != first["results"][1]
    main_on(Pretend(), monkeypatch, *arguments)
    assert len(json.loads(out.with_suffix(".json").read_text())["results"]) == 1


def test_failures_are_noted_and_do_not_end_the_session(monkeypatch, tmp_path, tiny):
    def build(case):
        if case.name == "na2d_56":
            raise RuntimeError("no such kernel\nmore")
        return lambda **inputs: torch.full_like(inputs["q"], float("nan"))

    monkeypatch.setitem(op_cases.neighborhood.Neighborhood.cuda_providers, "other", (build, None))
    arguments = [*tiny, "--out", str(tmp_path / "ops"), "--providers", "other", "visattn eager"]
    assert main_on(Pretend(), monkeypatch, *arguments) == 1
    results = json.loads((tmp_path / "ops.json").read_text())["results"]
    notes = {(r["case"], r["provider"]): r["note"] for r in results}
    assert notes["na2d_56", "other"] == "failed: RuntimeError: no such kernel"
    assert notes["na2d_28", "other"] == "wrong result: not timed"
    assert notes["na2d_56", "visattn eager"] == notes["na2d_28", "visattn eager"] == ""
    assert not [r for r in results if r["note"] and r["median_ms"]]


@pytest.mark.parametrize("broken", [1, -1])
def test_gate_sees_first_and_last_image(broken):
    """Forward and gradients of an image that is computed wrongly; tables get no gradient from other images."""
    case = dataclasses.replace(op_cases.TINY[0], batch=4)
    right = case.visattn("eager")

    def wrong(**inputs):
        out = right(**inputs)
        factor = torch.ones(case.batch, 1, 1, 1, 1)
        factor[broken] = 1.001
        return out * factor

    for mode in (FORWARD, BOTH):
        given = op_gate.Given(case, mode, torch.device("cpu"))
        assert given.images == [0, 3]
        for attend, expected in ((right, True), (wrong, broken == 1)):
            checked, _ = given.cotangents(attend)
            got = op_gate.runner(attend, given.inputs, mode, checked)()
            assert given.check(attend, got)[1] is expected
        got[0][2, 0, 0, 0, 0] = float("nan")
        assert not given.check(right, got)[1]


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for script in (bench_ops, bench_models):
        with pytest.raises(SystemExit) as exit_:
            script.main(["--device", "cuda"])
        assert exit_.value.code == 2
        assert "no CUDA device: not measured" in capsys.readouterr().err


class Clock:
    """Events of a GPU that takes 3 ms for what is launched between them."""

    log: ClassVar[list] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.log.append("record")

    def synchronize(self):
        self.log.append("synchronize")

    def elapsed_time(self, end):
        return 3.0


def test_time_between_events(monkeypatch):
    zeros, waits = torch.zeros, []
    properties = SimpleNamespace(name="GPU", multi_processor_count=1, L2_cache_size=8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *device: properties)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    device = bench_device.Cuda()
    timer = device._timer
    timer._other.fill_(1)
    monkeypatch.setattr(Clock, "log", [])
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "_sleep", waits.append)

    def run():
        Clock.log.append("run")
        time.sleep(0.01)

    assert device.seconds(run) == 0.003
    assert Clock.log == ["record", "run", "record", "synchronize"]
    assert timer._sum == 8, "other data went through the cache"
    assert 0.01 < device.host_seconds(run) < 0.1
    device.seconds(run)
    assert waits[0] == 1e-3 * timer.CLOCK
    assert waits[1] == timer.WAIT[1] * timer.CLOCK, "at most"
    assert device.host_seconds(lambda: None) is None
