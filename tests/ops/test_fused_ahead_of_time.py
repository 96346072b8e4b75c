"""The kernels compile for GPUs that are not here, to the instructions that they are written for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "benchmarks/kernel_report.py"
SPILLED = 128  # bytes of stack that a thread may have
PRODUCTS = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
# Between them every kernel and every option of one; each is compiled for one GPU by the fast tests, some for all.
EVERY = {90: None, 80: ("neighborhood, bias", "halo", "depthwise"), 100: ("neighborhood, bias", "aggregated", "linear")}


def compiled(folder, *argv):
    """What benchmarks/kernel_report.py writes. Apart from this process, whose kernels are for the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env.update(TRITON_CACHE_DIR=str(folder / "cache"), OMP_NUM_THREADS="1")
    command = [sys.executable, str(TOOL), *argv, "--out", str(folder / "kernels")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = sorted(folder.glob("kernels_sm*.json"))
    assert len(list(folder.glob("kernels_sm*.md"))) == len(files)
    return [result for file in files for result in json.loads(file.read_text())["results"]]


def check(results):
    assert results
    for result in results:
        name, constants = (result["case"], result["kernel"], result["dtype"]), result["constants"]
        assert result["cubin"] > 1000, name
        if result["dtype"] == "float32":
            assert not result["products"], f"{name}: rounded to tf32"
        elif result["kernel"] == "position_tiles":
            assert not result["products"], name
        elif "BLOCK_N" in constants and constants["BLOCK_M"] >= 64:
            assert set(result["products"]) == {PRODUCTS[result["capability"]]}, name
        elif result["case"] != "depthwise":
            assert result["products"], name
        if result["stack"] is not None:
            assert result["stack"] <= SPILLED, name


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bfloat16")
    found = []
    for capability, cases in EVERY.items():
        chosen = [] if cases is None else ["--cases", *cases]
        found = compiled(folder, "--dtypes", "bfloat16", "--capabilities", str(capability), *chosen)
    return found


def test_bfloat16(bfloat16):
    check(bfloat16)
    assert {result["capability"] for result in bfloat16} == set(EVERY)
    kernels = {"forward", "queries_backward", "keys_backward", "tiles_backward", "extra_backward"}
    kernels |= {"extra_bias_backward", "position_tiles", "depthwise", "depthwise_weights", "outer", "apply"}
    assert {result["kernel"] for result in bfloat16 if result["capability"] == 90} == kernels


def test_float16_and_float32(tmp_path):
    argv = ["--dtypes", "float16", "float32", "--capabilities", "90", "--cases"]
    check(compiled(tmp_path, *argv, "neighborhood, bias", "linear"))


def test_heads_of_24_channels_are_copied_16_bytes_at_once(bfloat16):
    found = {x["kernel"]: x for x in bfloat16 if x["capability"] == 90 and x["case"] == "aggregated"}
    assert found["queries_backward"]["constants"]["D"] == 24
    assert found["queries_backward"]["wide_copies"] > 0


def test_options_of_the_kernels_are_among_them(bfloat16):
    """So that no change of the cases leaves one out."""
    ran = [result["constants"] for result in bfloat16 if "BLOCK_M" in result["constants"]]
    for option in ("WIDE", "WEIGHTED", "SEGMENT", "EXTRA", "LANES", "CHECKED", "EYE", "SPLIT"):
        assert {option in constants for constants in ran} == {True, False}, option
    assert {constants.get("TILES", 1) > 1 for constants in ran} == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_launch(dtype, capability, tmp_path):
    check(compiled(tmp_path, "--dtypes", dtype, "--capabilities", str(capability)))


def test_interpreted_kernels_are_refused():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(TOOL)], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "try without TRITON_INTERPRET" in done.stdout
