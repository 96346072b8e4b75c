"""Agent attention and its position bias: against their definitions; precision and memory."""

import pytest
import torch
import torch.nn.functional as F

from tests import tolerances
from tests.ops.cases import agent_shapes
from tests.ops.gradients import Recorder, leaves
from tests.tolerances import relative_error
from visattn.ops import agent_attention, agent_position_bias

BACKENDS = ["eager", "reference"]  # Triton has tests of its own: no float64
TOLERANCE = tolerances.OP[torch.float64]
FUSED = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_two_attentions(backend, scale, biases):
    """Written once more, head by head and image by image."""
    tensors = leaves(agent_shapes((3, 5), (4, 2), 2, 6, 5, 4, biases), 0)
    out = agent_attention(**tensors, scale=scale, backend=backend)
    assert out.shape == (2, 3, 5, 2, 5)
    scale = 6**-0.5 if scale is None else scale
    q, k, v = (tensors[n].flatten(1, 2) for n in "qkv")
    none = torch.zeros(2, dtype=torch.float64)
    for b in range(2):
        for n in range(2):
            agents = tensors["agents"][b, :, n]
            logits = scale * agents @ k[b, :, n].T + tensors.get("agent_bias", none)[n]
            gathered = logits.softmax(1) @ v[b, :, n]
            logits = scale * q[b, :, n] @ agents.T + tensors.get("query_bias", none)[n]
            torch.testing.assert_close(out[b, :, :, n].flatten(0, 1), logits.softmax(1) @ gathered)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("agents", [9, 49])
def test_large_logits_are_safe_in_half_precision(agents, trains):
    tensors = leaves(agent_shapes((9, 8), (9, 8), 2, 32, 32, agents), 0, torch.float16)
    tensors = {n: (t * 30 if n in ("q", "k", "agents") else t).requires_grad_(trains) for n, t in tensors.items()}
    out = agent_attention(**tensors)
    assert out.isfinite().all()
    if trains:
        out.float().square().sum().backward()
        assert all(t.grad.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("agents", [9, 49])
def test_logits_are_float32_where_biases_train(agents):
    """What is common to all keys cancels, but in half precision would swallow the rest."""
    tensors = leaves(agent_shapes((9, 8), (9, 8), 2, 32, 32, agents), 0, torch.float32)
    half = {n: t if n.endswith("bias") else t.bfloat16() for n, t in tensors.items()}
    moved = {n: (t + 1000 if n.endswith("bias") else t).requires_grad_() for n, t in half.items()}
    expected = agent_attention(**{n: t.double() for n, t in half.items()})
    assert relative_error(agent_attention(**moved), expected) <= tolerances.OP[torch.bfloat16]


@pytest.mark.parametrize("agents", [9, 49])
def test_inference_is_fused(agents):
    """Also with biases that train elsewhere; what makes logits of all pairs does so without a batch of biases."""
    tensors = {
        n: t.float().requires_grad_() for n, t in leaves(agent_shapes((28, 28), (28, 28), 2, 32, 32, agents), 0).items()
    }
    with torch.no_grad(), Recorder() as recorder:
        agent_attention(**tensors)
    assert FUSED in recorder.names
    assert ("_softmax" in recorder.names) == (agents == 9)
    assert "repeat" not in recorder.names
    assert recorder.largest <= 4 * 2 * 28 * 28 * 2 * 32


def official_bias(table, rows, columns, size, agent_size):
    """Each term over the map, the sum over the grid of agents."""
    heads, agents = table.shape[:2]
    h, w = size
    bias = F.interpolate(table, size, mode="bilinear")
    bias = bias + F.interpolate(rows[..., None], (h, 1), mode="bilinear")
    bias = bias + F.interpolate(columns[..., None, :], (1, w), mode="bilinear")
    side = round(agents**0.5)
    bias = bias.reshape(heads, side, side, h * w).permute(0, 3, 1, 2)
    return F.interpolate(bias, agent_size, mode="bilinear").permute(0, 2, 3, 1).reshape(heads, -1, h * w)


TABLES = {"table": (2, 9, 7, 7), "rows": (2, 9, 8), "columns": (2, 9, 10)}


@pytest.mark.parametrize("agent_size", [(3, 3), (5, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("size", [(8, 10), (7, 7), (5, 23), (1, 1), (10, 8)], ids=str)
def test_position_bias(size, agent_size):
    tensors = [t.requires_grad_() for t in leaves(TABLES, 0).values()]
    results = []
    for bias in (agent_position_bias, official_bias):
        out = bias(*tensors, size, agent_size)
        results.append([out, *torch.autograd.grad(out.sin().sum(), tensors)])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= TOLERANCE


def test_position_bias_of_tables_that_fit_is_their_sum():
    table, rows, columns = torch.randn(1, 4, 7, 7), torch.randn(1, 4, 7), torch.randn(1, 4, 7)
    expected = (table + rows[..., None] + columns[..., None, :]).flatten(2)
    assert torch.equal(agent_position_bias(table, rows, columns, (7, 7), (2, 2)), expected)


def test_position_bias_is_made_in_float32():
    tensors = [t.bfloat16() for t in leaves(TABLES, 0).values()]
    expected = agent_position_bias(*(t.float() for t in tensors), (9, 5), (4, 4))
    assert torch.equal(agent_position_bias(*tensors, (9, 5), (4, 4)), expected.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(agent_position_bias(*(t.float() for t in tensors), (9, 5), (4, 4)), expected)
