"""What the kernels of published layers execute, counted in machine code that is compiled without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "benchmarks/kernel_model.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Per case and pass the launches of benchmarks/kernel_model.py. This process's kernels are for the interpreter."""
    folder = tmp_path_factory.mktemp("counts")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env.update(TRITON_CACHE_DIR=str(folder / "cache"), OMP_NUM_THREADS="1")
    command = [sys.executable, str(TOOL), "--cases", "na2d_56", "window_56", "--out", str(folder / "model")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for place in json.loads((folder / "model.json").read_text())["results"]:
        found.setdefault((place["case"], place["mode"]), []).append(place["after"])
    return found


def test_a_step_of_64_keys(rows):
    (row,) = rows["na2d_56", "forward"]
    assert (row["config"], row["trips"]) == ("64x64 w4 s3", [4])
    ((instructions, exponentials),) = row["loops"]
    assert instructions <= 370
    assert exponentials == 34  # a thread has 32 of the 64 x 64 weights, and 2 rows to rescale


def test_copies_fly_while_a_step_computes(rows):
    """Of keys, values and what hides pairs of the next step; keys that hold have no room for copies in flight."""
    for mode in ("forward", "backward"):
        waits = [int(event.split()[1]) for event in rows["na2d_56", mode][0]["order"][0] if event.startswith("wait")]
        assert min(waits) >= 2


def test_no_position_tile_is_read_without_a_bias(rows):
    for mode in ("forward", "backward"):
        assert not any(row["has_tiles"] for row in rows["na2d_56", mode])
        assert any(row["has_tiles"] for row in rows["window_56", mode])


def test_windows_have_one_softmax(rows):
    (row,) = rows["window_56", "forward"]
    assert [exponentials for _, exponentials in row["loops"]] == [34]


def test_a_step_of_32_queries_for_dk_and_dv(rows):
    for case in ("na2d_56", "window_56"):
        row = next(row for row in rows[case, "backward"] if row["kernel"] == "keys_backward")
        assert row["config"].startswith("64x32 ")
        ((instructions, exponentials),) = row["loops"]
        assert instructions <= (280 if case == "na2d_56" else 300)
        assert exponentials == 16


def test_nothing_is_spilled(rows):
    assert all(row["stack"] == 0 for found in rows.values() for row in found)


@pytest.mark.parametrize(("case", "most"), [("na2d_56", 3.3), ("window_56", 2.1)])
def test_predicted_forward_pass(rows, case, most):
    """How many times longer than the floor; a model's number, not a measured one."""
    assert rows[case, "forward"][-1]["ratio"] <= most
