"""Neighborhood attention: backends against the reference and the goldens of the official kernels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tolerances
from tests.ops.gradients import Recorder
from tests.tolerances import relative_error
from visattn.ops import neighborhood_attention

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("op_na*.npz"))
BACKENDS = ["eager", "reference"]  # Triton has tests of its own: no float64


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(path, backend, poisoned_empty):
    data = np.load(path)
    names = ["q", "k", "v"] + (["rpb"] if "rpb" in data.files else [])
    tensors = {n: torch.from_numpy(data[n]).double().requires_grad_() for n in names}
    window = [data[n].tolist() for n in ("kernel_size", "dilation", "stride", "is_causal")]
    args = (tensors["q"], tensors["k"], tensors["v"], *window, tensors.get("rpb"))
    out = neighborhood_attention(*args, scale=float(data["scale"]), backend=backend)
    out.backward(torch.from_numpy(data["grad_out"]).double())
    assert relative_error(out, torch.from_numpy(data["out"])) <= tolerances.OP_GOLDEN_FORWARD
    for name, tensor in tensors.items():
        expected = torch.from_numpy(data[f"grad_{name}"])
        assert relative_error(tensor.grad, expected) <= tolerances.OP_GOLDEN_GRADIENT, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_values_come_back(backend):
    q, k = torch.randn(2, 1, 11, 13, 2, 4)
    out = neighborhood_attention(q, k, torch.ones_like(q), (3, 5), (2, 1), backend=backend)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_one_query_attends_to_one_key_when_kernel_is_one():
    q, k, v = torch.randn(3, 1, 4, 5, 1, 3)
    torch.testing.assert_close(neighborhood_attention(q, k, v, 1), v)


def test_eager_makes_no_gathered_copy_of_all_neighborhoods():
    """The largest tensor grows with the tile, not with kernel_size ** 2 copies of the keys."""
    q, k, v = torch.randn(3, 1, 56, 56, 2, 32)
    with torch.no_grad(), Recorder() as recorder:
        neighborhood_attention(q, k, v, 7)
    assert recorder.largest <= 4 * k.numel() * k.element_size()  # gathering would take 49 times


@pytest.mark.parametrize("trains", [False, True])
def test_fused_attention_unless_the_bias_trains(trains):
    """A mask that requires a gradient makes SDPA four times slower on a CPU, even where no gradient is taken."""
    q, k, v = torch.randn(3, 1, 14, 14, 2, 32)
    bias = torch.nn.Parameter(torch.randn(2, 13, 13))
    with torch.set_grad_enabled(trains), Recorder() as recorder:
        neighborhood_attention(q, k, v, 7, bias=bias)
    assert ("_scaled_dot_product_flash_attention_for_cpu" in recorder.names) == (not trains)
    assert not {n for n in recorder.names if "math" in n}
    assert ("_softmax" in recorder.names) == trains
