"""The least time of an attention on a GPU, against the table of the kernels' design."""

import dataclasses

import op_cases
import op_floors
import pytest
from op_floors import Rates

FORWARD, BOTH = "forward", "forward+backward"
H200 = Rates()
CUDA = {p.name: p for p in op_cases.CUDA_CASES}

# The floors of specs/kernels.md, section 4: microseconds at batch 128 in bfloat16, forward and backward.
FLOORS = {
    "na2d_56": (48.5, 146),
    "na2d_28": (24.3, 73),
    "na2d_14": (12.1, 37),
    "na2d_56_d8_bias": (48.5, 146),
    "na2d_28_d4_bias": (24.3, 73),
    "na2d_14_d2_bias": (12.1, 37),
    "window_56": (48.5, 146),
    "grid_28": (24.3, 73),
    "window_14": (12.1, 37),
    "grid_7": (6.1, 18),
    "routed_56_topk1": (48.5, 146),
    "routed_28_topk4": (24.3, 73),
    "routed_14_topk16": (13.9, 42),
    "halo_32": (31.7, 96),
    "halo_16": (15.9, 48),
    "aggregated_56": (57, 172),
    "aggregated_28": (29, 86),
    "aggregated_14": (14, 43),
}
# Products and exponentials of the forward pass.
PARTS = {
    "na2d_56": (24.7, 41.2),
    "na2d_28": (12.9, 21.5),
    "na2d_14": (5.1, 8.5),
    "window_56": (10.9, 18),
    "grid_14": (2.7, 4.5),
    "routed_14_topk16": (8.3, 13.9),
    "halo_32": (17.7, 29.4),
    "aggregated_56": (34, 57),
}


@pytest.mark.parametrize("name", FLOORS)
def test_floors_are_those_of_the_design(name):
    forward = op_floors.floor(CUDA[name], FORWARD, H200) * 1e6
    backward = op_floors.floor(CUDA[name], BOTH, H200) * 1e6 - forward
    assert forward == pytest.approx(FLOORS[name][0], rel=0.01, abs=0.5)  # the design's are rounded
    assert backward == pytest.approx(FLOORS[name][1], rel=0.01, abs=0.5)


@pytest.mark.parametrize("name", PARTS)
def test_products_and_exponentials_are_those_of_the_design(name):
    flops, exps = CUDA[name].work()
    # The design counts keys of neighborhoods in steps of 32, here of 16
    rel = 0.08 if "na2d" in name else 0.02
    assert flops / H200.flops_per_s * 1e6 == pytest.approx(PARTS[name][0], rel=rel)
    assert exps / H200.exps_per_s * 1e6 == pytest.approx(PARTS[name][1], rel=rel)


def test_floor_is_the_longest_of_three_and_follows_the_measured_rates():
    case = CUDA["na2d_56"]
    bytes_moved = 4 * 128 * 3136 * 64 * 2
    assert op_floors.useful_bytes(case, FORWARD) == bytes_moved
    assert op_floors.useful_bytes(case, BOTH) == 3 * bytes_moved
    slow = dataclasses.replace(H200, bytes_per_s=H200.bytes_per_s / 2)
    assert op_floors.floor(case, BOTH, slow) == pytest.approx(2 * op_floors.floor(case, BOTH, H200))
    slow = dataclasses.replace(H200, flops_per_s=1e12)
    assert op_floors.floor(case, FORWARD, slow) == case.work()[0] / 1e12
