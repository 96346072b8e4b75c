"""Gated positional attention against the official code, projections included, and what its weights are."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import tolerances
from tests.ops.cases import gated_shapes
from tests.ops.gradients import Recorder, leaves
from tests.tolerances import relative_error
from visattn.ops import gated_positional_attention, gated_positional_weights

FOLDER = Path(__file__).parents[1] / "golden"
BACKENDS = ["eager", "reference"]  # Triton has tests of its own: no float64


@pytest.mark.parametrize("name", ["op_gpsa_6x6", "op_gpsa_5x7"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend, name):
    file = np.load(FOLDER / f"{name}.npz")
    size, heads = file["grid"].tolist(), int(file["num_heads"])
    arrays = {n: torch.from_numpy(file[n]).double() for n in file.files if file[n].dtype == np.float32}
    p = {n.removeprefix("param_"): t.requires_grad_() for n, t in arrays.items() if n.startswith("param_")}
    x = arrays["x"].requires_grad_()
    qk, v = (F.linear(x, p[f"{n}.weight"]).unflatten(1, size) for n in ("qk", "v"))
    (q, k), v = qk.unflatten(-1, (2, heads, -1)).unbind(3), v.unflatten(-1, (heads, -1))
    position = (p["pos_proj.weight"], p["pos_proj.bias"])
    out = gated_positional_attention(q, k, v, p["gating_param"], *position, backend=backend)
    out = F.linear(out.flatten(3).flatten(1, 2), p["proj.weight"], p["proj.bias"])
    assert relative_error(out, arrays["out"]) <= tolerances.OP_GOLDEN_FORWARD
    out.backward(arrays["grad_out"])
    assert relative_error(x.grad, arrays["grad_x"]) <= tolerances.OP_GOLDEN_GRADIENT
    assert p.pop("pos_proj.bias").grad.norm() <= 1e-12
    for n, t in p.items():
        assert relative_error(t.grad, arrays[f"grad_{n}"]) <= tolerances.OP_GOLDEN_GRADIENT, n

    content, positional = (w.flatten(-2).flatten(-4, -3) for w in gated_positional_weights(q, k, *position))
    gate = p["gating_param"].sigmoid()[:, None]
    first = ((1 - gate) * content + gate * positional)[:, 0]  # [B, N, S]
    assert relative_error(first, arrays["attention_first_query"]) <= tolerances.OP_GOLDEN_FORWARD
    assert relative_error(gate[:, 0], arrays["gate"]) <= tolerances.OP_GOLDEN_FORWARD


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(4, 5), (1, 7), (6, 1)], ids=str)
def test_is_what_its_weights_make_of_the_values(backend, size):
    tensors = leaves(gated_shapes((2, *size, 3, 4), 5), 0)
    q, k, v, gate, weight, bias = tensors.values()
    content, positional = gated_positional_weights(q, k, weight, bias, scale=0.7)
    assert content.shape == (2, *size, 3, *size)
    assert positional.shape == (*size, 3, *size)
    gate = gate.sigmoid()[:, None, None]
    expected = torch.einsum("byxnij,bijnd->byxnd", (1 - gate) * content + gate * positional, v)
    found = gated_positional_attention(**tensors, scale=0.7, backend=backend)
    assert relative_error(found, expected) <= tolerances.OP[torch.float64]


def test_no_weights_of_pairs_are_made():
    tensors = {n: t.float() for n, t in leaves(gated_shapes((1, 32, 32, 2, 8)), 0).items()}
    with torch.no_grad(), Recorder() as recorder:
        gated_positional_attention(**tensors)
    assert recorder.largest <= 4 * 32 * 32 * 2 * 8
