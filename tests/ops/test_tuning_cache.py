"""Keeping what searches found: files of users and of the package."""

import os
import subprocess
import sys

import pytest

from tests.ops.launches import CONFIGS, CPU, DEFAULT, FAST, FASTEST, SHAPE, Kernel, chosen, entries, write
from visattn.ops.fused import tuning, tuning_cache
from visattn.ops.fused.tuning import Config, run_tuned

pytestmark = pytest.mark.usefixtures("tuning_file")


def test_results_last_over_processes(tuning_file):
    code = (
        "import torch; from visattn.ops.fused.tuning import *\n"
        f"cs = {CONFIGS}\n"
        f"run_tuned('kernel', {SHAPE}, torch.device('cpu'), cs, lambda c: print(cs.index(c)) or ())"
    )
    assert chosen(Kernel()) == FASTEST
    environment = {**os.environ, "VISATTN_TUNE": "cached"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"]


def test_the_file_can_be_read_and_compared(tuning_file):
    chosen(Kernel(), "b")
    chosen(Kernel(), "a")
    lines = tuning_file.read_text().splitlines()
    assert lines[:4] == ["{", '"format": 1,', '"gpu": "cpu",', '"entries": [']
    assert ['"kernel": "a"' in lines[4], '"kernel": "b"' in lines[5]] == [True, True]
    assert entries(tuning_file)["a"] == {
        "kernel": "a",
        "shape_class": list(SHAPE),
        "config": vars(FASTEST),
        "median_ms": 1.0,
        "default_ms": 3.0,
    }
    assert list(tuning_file.parent.iterdir()) == [tuning_file]


def test_shipped_results_lie_below_the_users(tuning_file):
    write(tuning_cache.SHIPPED / "cpu.json", FAST)
    kernel = Kernel()
    assert chosen(kernel) == FAST
    assert len(kernel.launched) == 1
    write(tuning_file, FASTEST)
    tuning.forget()
    assert chosen(kernel) == FASTEST
    assert len(kernel.launched) == 2


def test_an_entry_that_is_no_candidate_is_a_miss(tuning_file, monkeypatch):
    write(tuning_file, Config(16, 16, 1, 1))
    monkeypatch.setenv("VISATTN_TUNE", "cached")
    assert chosen(Kernel()) == DEFAULT
    monkeypatch.setenv("VISATTN_TUNE", "search")
    assert chosen(Kernel()) == FASTEST
    assert entries(tuning_file)["kernel"]["config"] == vars(FASTEST)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": 2, "gpu": "cpu", "entries": []}',
        '{"format": 1, "gpu": "cpu", "entries": [{"kernel": 1}]}',
    ],
    ids=["cut", "other", "newer", "entry"],
)
def test_a_corrupt_file_is_ignored_with_one_warning(tuning_file, text):
    tuning_file.parent.mkdir()
    tuning_file.write_text(text)
    with pytest.warns(RuntimeWarning, match="cpu.json are ignored") as caught:  # noqa: PT031
        assert chosen(Kernel(), "a") == FASTEST
        assert chosen(Kernel(), "b") == FASTEST
    assert len(caught) == 1
    assert set(entries(tuning_file)) == {"a", "b"}


def test_the_file_of_another_gpu_is_ignored(tuning_file):
    write(tuning_file, FAST, gpu="NVIDIA H200")
    with pytest.warns(RuntimeWarning, match="for cpu, got format 1 for NVIDIA H200"):
        assert chosen(Kernel()) == FASTEST


def test_what_another_process_wrote_meanwhile_stays(tuning_file):
    kernel = Kernel()

    def run(config):
        if not kernel.launched:
            write(tuning_file, FAST, kernel="theirs")
        return kernel(config)

    run_tuned("ours", SHAPE, CPU, CONFIGS, run)
    assert {name: e["config"] for name, e in entries(tuning_file).items()} == {
        "ours": vars(FASTEST),
        "theirs": vars(FAST),
    }


def test_a_lost_entry_is_written_again(tuning_file):
    chosen(Kernel(), "first")
    tuning_file.unlink()
    chosen(Kernel(), "second")
    assert set(entries(tuning_file)) == {"first", "second"}


def test_a_file_that_cannot_be_replaced(tuning_file, monkeypatch):
    chosen(Kernel(), "first")
    before = tuning_file.read_text()

    def replace(source, target):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.warns(RuntimeWarning, match="cannot write tuning results .* VISATTN_CACHE_DIR"):
        assert chosen(Kernel(), "second") == FASTEST
    assert tuning_file.read_text() == before
    assert list(tuning_file.parent.iterdir()) == [tuning_file], "nothing half-written is left"


def test_directories(monkeypatch, tmp_path):
    monkeypatch.delenv("VISATTN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning_cache.directory() == tmp_path / "xdg" / "visattn" / "tuning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning_cache.directory() == tmp_path / ".cache" / "visattn" / "tuning"
    assert tuning_cache.file_name("NVIDIA GeForce RTX 4090") == "nvidia_geforce_rtx_4090.json"
