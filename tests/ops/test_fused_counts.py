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
    folder, found = tmp_path_factory.mktemp("counts"), {}
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env.update(TRITON_CACHE_DIR=str(folder / "cache"), OMP_NUM_THREADS="1")
    for mode, *argv in (
        ("forward", "na2d_56", "na2d_56_bias", "window_56"),
        ("backward", "na2d_56", "na2d_56_bias", "window_56"),
        ("alone", "na2d_56_bias", "--alone", "--modes", "forward"),
    ):
        out = folder / mode
        command = [sys.executable, str(TOOL), "--out", str(out), "--cases", *argv]
        command += [] if mode == "alone" else ["--modes", mode]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for place in json.loads(out.with_suffix(".json").read_text())["results"]:
            found.setdefault((place["case"], mode), []).append(place["after"])
    return found


def test_queries_of_small_windows_see_few_keys_too_many(rows):
    """7 x 7 keys of a query lie among the 10 x 10 of its tile of 4 x 4; without such tiles these were 256 and more."""
    (row,) = rows["na2d_56", "forward"]
    assert row["instructions_per_query"] <= 2764
    assert row["mufu_per_query"] <= 140


def test_a_step_of_128_keys(rows):
    """With a position tile, which is added in a product, and copies that fly while the step computes."""
    (row,) = rows["na2d_56_bias", "alone"]
    assert row["config"] == "64x128 w4 s3"
    ((instructions, exponentials),) = row["loops"]
    assert instructions <= 2 * 370
    assert exponentials == 66  # a thread has 64 of the 64 x 128 weights, and 2 rows to rescale
    assert min(int(event.split()[1]) for event in row["order"][0] if event.startswith("wait")) >= 2


def test_no_position_tile_is_read_without_a_bias(rows):
    for mode in ("forward", "backward"):
        assert not any(row["has_tiles"] for row in rows["na2d_56", mode])
        assert any(row["has_tiles"] for row in rows["window_56", mode])


def test_windows_have_one_softmax(rows):
    (row,) = rows["window_56", "forward"]
    assert row["mufu_per_query"] <= 100  # 64 weights of a padded row, times 64 / 49


def test_a_step_of_32_queries_for_dk_and_dv(rows):
    row = next(row for row in rows["window_56", "backward"] if row["kernel"] == "keys_backward")
    assert row["config"].startswith("64x32 ")
    ((instructions, exponentials),) = row["loops"]
    assert instructions <= 280
    assert exponentials == 16


def test_what_a_bias_costs(rows):
    """In the whole pass, by the model; its gradient goes over tiles of 4 x 4 queries too, without which this is 1.5."""

    def predicted(case):
        return sum(row["predicted"] for mode in ("forward", "backward") for row in rows[case, mode])

    assert predicted("na2d_56_bias") <= 1.4 * predicted("na2d_56")


def test_nothing_is_spilled(rows):
    assert all(row["stack"] == 0 for found in rows.values() for row in found)


@pytest.mark.parametrize(("case", "most"), [("na2d_56", 2.5), ("window_56", 1.8)])
def test_predicted_forward_pass(rows, case, most):
    """How many times longer than the floor; a model's number, not a measured one."""
    assert rows[case, "forward"][-1]["ratio"] <= most
