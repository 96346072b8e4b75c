"""Neighborhood mix against what OverLoCK's own code computed, and against neighborhood attention."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tolerances
from tests.ops.gradients import Recorder
from tests.tolerances import relative_error
from visattn.ops import neighborhood_attention, neighborhood_mix
from visattn.ops.neighborhood.split import neighborhood_scores

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("op_contmix_k*.npz"))
BACKENDS = ["eager", "reference", "triton"]
# 7 x 7 taps take the interpreter long.
RUNS = [(path, backend) for path in GOLDEN for backend in BACKENDS if backend != "triton" or "k5" in path.stem]


@pytest.mark.parametrize(("path", "backend"), RUNS, ids=lambda x: getattr(x, "stem", x))
def test_golden(path, backend, device, poisoned_empty):
    data = np.load(path)
    dtype = torch.float32 if backend == "triton" else torch.float64
    tensors = {n: torch.from_numpy(data[n]).to(device, dtype).requires_grad_() for n in ("logits", "v", "rpb")}
    logits, v, bias = tensors.values()
    out = neighborhood_mix(logits, v, data["kernel_size"], bias, backend=backend)
    out.backward(torch.from_numpy(data["grad_out"]).to(out))
    assert relative_error(out, torch.from_numpy(data["out"])) <= tolerances.OP_GOLDEN_FORWARD
    for name, tensor in tensors.items():
        expected = torch.from_numpy(data[f"grad_{name}"])
        assert relative_error(tensor.grad, expected) <= tolerances.OP_GOLDEN_GRADIENT, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [(3, 5), (4, 2), (9, 11)])
def test_of_scores_it_is_neighborhood_attention(kernel, backend, device):
    """Windows, the order of taps, and the table."""
    q, k, v = torch.randn(3, 2, 9, 11, 2, 4, device=device)
    bias = torch.randn(2, *(2 * n - 1 for n in kernel), device=device)
    expected = neighborhood_attention(q, k, v, kernel, bias=bias, scale=1.0, backend="reference")
    logits = neighborhood_scores(*(x.movedim(-2, 1) for x in (q, k)), kernel).movedim(1, -2)  # [B, H, W, N, M]
    found = neighborhood_mix(logits, v, kernel, bias, backend=backend)
    assert relative_error(found, expected) <= tolerances.OP[torch.float32]


def test_eager_makes_nothing_larger_than_the_logits():
    """Windows of values would be 16 times as large, weights spread over the unions of windows three times."""
    logits, v = torch.randn(1, 38, 50, 2, 11**2), torch.randn(1, 38, 50, 2, 16)
    with torch.no_grad(), Recorder() as recorder:
        neighborhood_mix(logits, v, 11)
    assert recorder.largest == logits.numel() * logits.element_size()  # of which views are made
