"""The tuning command, on an op whose Triton backend is a stand-in."""

import json
from dataclasses import replace

import pytest
import torch
import tune_ops

from visattn.ops import BackendError
from visattn.ops.fused import tuning, tuning_search
from visattn.ops.fused.tuning import Config, run_tuned

ARGS = ["--device", "cpu", "--cases", "tiny_na2d_bias", "tiny_na2d_d2", "--dtypes", "float32"]
DEFAULT, FAST = CONFIGS = [Config(64, 32, 4, 2), Config(128, 64, 8, 3)]


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("VISATTN_CACHE_DIR", str(tmp_path))
    tuning.forget()
    yield
    tuning.forget()


@pytest.fixture
def stand_in(monkeypatch):
    """A case with a kernel of known times, and one that has none."""
    now = 0.0

    def run(config, out):
        nonlocal now
        now += {DEFAULT: 2e-3, FAST: 1e-3}[config]
        return (out.clone(),)

    def run_case(case, device):
        if case.name != "tiny_na2d_bias":
            raise BackendError("no such backend here")
        q = case.inputs(device)["q"]
        shape_class = (*q.shape[1:], str(q.dtype).removeprefix("torch."))
        run_tuned("na_forward", shape_class, q.device, CONFIGS, lambda config: run(config, q))

    monkeypatch.setattr(tune_ops, "run_case", run_case)
    monkeypatch.setattr(tuning_search, "_clock", lambda: now)
    monkeypatch.setenv("COLUMNS", "240")


def test_report_and_file(stand_in, capsys, tmp_path):
    for source, again in (("search", []), ("cache", []), ("search", ["--again"])):
        tuning.forget()
        assert tune_ops.main([*ARGS, *again]) == 0
        printed = capsys.readouterr().out
        cells = [cell.strip() for cell in next(x for x in printed.splitlines() if "na_forward" in x).split("│")]
        chosen = ["na_forward", "14 13 2 16 float32", "64x32 w4 s2", "128x64 w8 s3", source, "2.0000", "1.0000", "2.00"]
        assert cells[3:-2] == chosen
        assert "no such backend here" in printed
        path = tmp_path / "tuning" / "cpu.json"
        assert f"Kept in {path}\n" in printed
        assert [e["kernel"] for e in json.loads(path.read_text())["entries"]] == ["na_forward"]


def test_where_no_kernel_can_run(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune_ops.main(["--device", "cuda"]) == 1
    assert "no CUDA device is available here" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert tune_ops.main(ARGS) == 1
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


def test_a_case_runs_forward_and_backward_with_the_triton_backend(monkeypatch):
    case = next(p for p in tune_ops.TINY if p.name == "tiny_na2d_bias")
    requested, grads = [], {}

    def visattn(self, backend):
        def attend(q, k, v, bias):
            requested.append((backend, q.dtype))
            return (q * k + v) * bias.mean()

        return attend

    monkeypatch.setattr(type(case), "visattn", visattn)
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, grad=torch.autograd.grad: grads.update(all=grad(*args)))
    tune_ops.run_case(replace(case, dtype=torch.float16), "cpu")
    assert requested == [("triton", torch.float16)]
    assert [bool(g.norm() > 0) for g in grads["all"]] == [True] * 4


def test_unknown_cases(capsys):
    with pytest.raises(SystemExit):
        tune_ops.main(["--device", "cpu", "--cases", "na2d_56"])
    assert "tiny_na2d_bias" in capsys.readouterr().err
