"""Neighborhood mix against what OverLoCK's own code computed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tolerances
from tests.tolerances import relative_error
from visattn.ops import neighborhood_mix

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("op_contmix_k*.npz"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_golden(path, backend, poisoned_empty):
    data = np.load(path)
    tensors = {n: torch.from_numpy(data[n]).double().requires_grad_() for n in ("logits", "v", "rpb")}
    logits, v, bias = tensors.values()
    out = neighborhood_mix(logits, v, data["kernel_size"], bias, backend=backend)
    out.backward(torch.from_numpy(data["grad_out"]).double())
    assert relative_error(out, torch.from_numpy(data["out"])) <= tolerances.OP_GOLDEN_FORWARD
    for name, tensor in tensors.items():
        expected = torch.from_numpy(data[f"grad_{name}"])
        assert relative_error(tensor.grad, expected) <= tolerances.OP_GOLDEN_GRADIENT, name
