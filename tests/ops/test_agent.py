"""Agent attention and its position bias: against the reference, tracing, precision, cost, errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests import tolerances
from tests.ops.gradients import Recorder, check, leaves
from tests.tolerances import relative_error
from visattn.ops import BackendError, agent_attention, agent_position_bias, explain
from visattn.ops.registration import decompose

BACKENDS = ["eager", "reference"]  # Triton has tests of its own: no float64
TOLERANCE = tolerances.OP[torch.float64]
FUSED = "_scaled_dot_product_flash_attention_for_cpu"


def shapes_of(size, other, heads, dim, value_dim, agents, biases=(True, True), batch=2):
    maps = ((batch, *size), (batch, *other))
    shapes = {"q": (*maps[0], heads, dim), "k": (*maps[1], heads, dim), "v": (*maps[1], heads, value_dim)}
    shapes["agents"] = (batch, agents, heads, dim)
    number = [torch.Size(s).numel() for s in (size, other)]
    if biases[0]:
        shapes["agent_bias"] = (heads, agents, number[1])
    if biases[1]:
        shapes["query_bias"] = (heads, number[0], agents)
    return shapes


@st.composite
def problems(draw):
    """Any call the op accepts: maps of keys unlike those of queries, few and many agents, non-contiguous views."""

    def spatial():
        axes = draw(st.integers(1, 3))
        return tuple(draw(st.integers(1, {1: 40, 2: 8, 3: 4}[axes])) for _ in range(axes))

    size = spatial()
    other = size if draw(st.booleans()) else spatial()
    dim, agents = draw(st.sampled_from([1, 4, 24])), draw(st.sampled_from([1, 4, 9, 15, 16, 25]))
    biases = draw(st.booleans()), draw(st.booleans())
    value_dim, batch = draw(st.sampled_from([dim, 3])), draw(st.integers(1, 2))
    shapes = shapes_of(size, other, draw(st.integers(1, 3)), dim, value_dim, agents, biases, batch)
    return shapes, {"scale": draw(st.sampled_from([None, 0.7]))}, draw(st.booleans()), draw(st.integers(0, 2**31))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=problems())
def test_matches_reference(backend, problem):
    check(agent_attention, problem, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@settings(max_examples=4000, deadline=None)
@given(problem=problems())
def test_matches_reference_long(backend, problem):
    check(agent_attention, problem, backend)


@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_two_attentions(backend, scale, biases):
    """Written once more, head by head and image by image."""
    tensors = leaves(shapes_of((3, 5), (4, 2), 2, 6, 5, 4, biases), 0)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("agents", [9, 49])
@pytest.mark.parametrize("biases", [(False, False), (True, True)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend, biases, agents, dtype, poisoned_empty):
    check(agent_attention, (shapes_of((13, 11), (7, 5), 2, 24, 24, agents, biases), {}, True, 0), backend, dtype)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("agents", [9, 49])
def test_large_logits_are_safe_in_half_precision(agents, trains):
    tensors = leaves(shapes_of((9, 8), (9, 8), 2, 32, 32, agents), 0, torch.float16)
    tensors = {n: (t * 30 if n in ("q", "k", "agents") else t).requires_grad_(trains) for n, t in tensors.items()}
    out = agent_attention(**tensors)
    assert out.isfinite().all()
    if trains:
        out.float().square().sum().backward()
        assert all(t.grad.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("agents", [9, 49])
def test_logits_are_float32_where_biases_train(agents):
    """What is common to all keys cancels, but in half precision would swallow the rest."""
    tensors = leaves(shapes_of((9, 8), (9, 8), 2, 32, 32, agents), 0, torch.float32)
    half = {n: t if n.endswith("bias") else t.bfloat16() for n, t in tensors.items()}
    moved = {n: (t + 1000 if n.endswith("bias") else t).requires_grad_() for n, t in half.items()}
    expected = agent_attention(**{n: t.double() for n, t in half.items()})
    assert relative_error(agent_attention(**moved), expected) <= tolerances.OP[torch.bfloat16]


@pytest.mark.parametrize("agents", [4, 17])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, agents):
    tensors = leaves(shapes_of((2, 2), (3,), 1, 2, 1, agents, batch=1), 0)
    names, tensors = list(tensors), [t.requires_grad_() for t in tensors.values()]

    def op(*tensors):
        return agent_attention(**dict(zip(names, tensors, strict=True)), backend=backend)

    assert torch.autograd.gradcheck(op, tensors)
    assert torch.autograd.gradgradcheck(op, tensors)


@pytest.mark.parametrize("agents", [9, 49])
def test_inference_is_fused(agents):
    """Also with biases that train elsewhere; what makes logits of all pairs does so without a batch of biases."""
    tensors = {
        n: t.float().requires_grad_() for n, t in leaves(shapes_of((28, 28), (28, 28), 2, 32, 32, agents), 0).items()
    }
    with torch.no_grad(), Recorder() as recorder:
        agent_attention(**tensors)
    assert FUSED in recorder.names
    assert ("_softmax" in recorder.names) == (agents == 9)
    assert "repeat" not in recorder.names
    assert recorder.largest <= 4 * 2 * 28 * 28 * 2 * 32


@pytest.mark.parametrize("given", [4, 5, 6])
@pytest.mark.parametrize("agents", [9, 16])
def test_custom_op(given, agents):
    """opcheck, and the same result and gradients as the public function, whichever tensors train."""
    shapes = list(shapes_of((3, 5), (7,), 2, 4, 3, agents).values())[:given]
    tensors = [torch.randn(s, dtype=torch.float64) for s in shapes]
    args = [None] * (6 - given) + [0.5, "auto"]
    op = torch.ops.visattn.agent_attention.default
    torch.library.opcheck(op, (*(t.clone().requires_grad_() for t in tensors), *args))
    for trained in (range(given), [given - 1], [0, given - 1]):
        results = []
        for run in (lambda *given: op(*given)[0], agent_attention):
            inputs = [t.clone().requires_grad_(i in trained) for i, t in enumerate(tensors)]
            out = run(*inputs, *args)
            results.append([out, *torch.autograd.grad(out.square().sum(), [inputs[i] for i in trained])])
        for a, b in zip(*results, strict=True):
            assert relative_error(a, b) <= TOLERANCE


def test_flops():
    tensors = {n: torch.empty(s, device="meta") for n, s in shapes_of((14, 14), (7, 7), 3, 8, 5, 9).items()}
    with FlopCounterMode(display=False) as counter:
        agent_attention(**tensors)
    assert counter.get_total_flops() == 2 * 2 * 3 * 9 * (14 * 14 + 7 * 7) * (8 + 5)


CALL = shapes_of((2, 3), (4,), 2, 4, 3, 9)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 4, 4)}, ValueError, "1 to 3 spatial axes"),
        ({"k": torch.zeros(2, 4, 2, 5)}, ValueError, r"expected q \[B, \*spatial, N, D\], k .* k \(2, 4, 2, 5\)"),
        ({"k": torch.zeros(1, 4, 2, 4), "v": torch.zeros(1, 4, 2, 3)}, ValueError, "expected q"),
        ({"v": torch.zeros(2, 5, 2, 3)}, ValueError, "expected q"),
        ({"agents": torch.zeros(2, 3, 3, 2, 4)}, ValueError, r"agents \[B, A, N, D\]"),
        ({"agents": torch.zeros(1, 9, 2, 4)}, ValueError, "expected q"),
        ({"agent_bias": torch.zeros(2, 9, 6)}, ValueError, r"expected agent_bias \(2, 9, 4\) without .* \(2, 9, 6\)"),
        ({"query_bias": torch.zeros(1, 6, 9)}, ValueError, r"expected query_bias \(2, 6, 9\)"),
        ({"agents": torch.zeros(2, 9, 2, 4).double()}, TypeError, "one floating dtype"),
        ({"backend": "cuda"}, BackendError, "expected backend 'auto', 'triton', 'eager', 'reference'; got 'cuda'"),
    ],
)
def test_mistakes_are_named(change, error, message):
    with pytest.raises(error, match=message):
        agent_attention(**{**{n: torch.zeros(s) for n, s in CALL.items()}, **change})


def test_backend_is_explained():
    with explain() as decisions:
        agent_attention(**{n: torch.zeros(s) for n, s in CALL.items()})
    assert [(d.op, d.backend) for d in decisions] == [("agent_attention", "eager")]


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


@pytest.mark.parametrize("size", [[8, 10], [5, 23]])
def test_custom_op_of_the_position_bias(size):
    tensors = [t.requires_grad_() for t in leaves(TABLES, 0).values()]
    op = torch.ops.visattn.agent_position_bias.default
    torch.library.opcheck(op, (*tensors, size, [4, 3]))
    assert torch.equal(op(*tensors, size, [4, 3])[0], agent_position_bias(*tensors, size, [4, 3]))


def test_position_bias_is_made_in_float32():
    tensors = [t.bfloat16() for t in leaves(TABLES, 0).values()]
    expected = agent_position_bias(*(t.float() for t in tensors), (9, 5), (4, 4))
    assert torch.equal(agent_position_bias(*tensors, (9, 5), (4, 4)), expected.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(agent_position_bias(*(t.float() for t in tensors), (9, 5), (4, 4)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(2, 9, 7)}, r"expected table \[N, A, h, w\]"),
        ({"rows": torch.zeros(1, 9, 8)}, r"rows \[N, A, H\].* \(1, 9, 8\)"),
        ({"size": (8, 10, 1)}, "expected size and agent_size of 2 ints"),
        ({"agent_size": (0, 3)}, r"ints >= 1, got \[8, 10\] and \[0, 3\]"),
        (
            {"table": torch.zeros(2, 8, 7, 7), "rows": torch.zeros(2, 8, 8), "columns": torch.zeros(2, 8, 10)},
            "expected a square number of agents, got 8; try 4",
        ),
    ],
)
def test_mistakes_of_position_bias_are_named(change, message):
    call = {n: torch.zeros(s) for n, s in TABLES.items()}
    with pytest.raises(ValueError, match=message):
        agent_position_bias(**{**call, "size": (8, 10), "agent_size": (3, 3), **change})


@pytest.mark.parametrize("name", ["q", "k", "v", "agents"])
def test_none_is_no_tensor(name):
    tensors = {n: torch.zeros(s) for n, s in CALL.items()}
    with pytest.raises(TypeError, match=f"expected {name} to be a tensor, got NoneType"):
        agent_attention(**{**tensors, name: None})


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["agent_bias", "query_bias"])
def test_biases_are_floating_point(name, dtype):
    tensors = {n: torch.zeros(s) for n, s in CALL.items()}
    with pytest.raises(TypeError, match=f"expected {name} of a floating dtype, got {dtype}"):
        agent_attention(**{**tensors, name: tensors[name].to(dtype)})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": None}, TypeError, "expected rows to be a tensor, got NoneType"),
        ({"table": torch.zeros(2, 9, 7, 7, dtype=torch.int64)}, TypeError, "expected table of a floating dtype"),
        ({"columns": torch.zeros(2, 9, 10, dtype=torch.complex64)}, TypeError, "expected columns of a floating dtype"),
        ({"size": (8.0, 10)}, ValueError, r"expected size of one int or 2 .*, got \(8.0, 10\)"),
    ],
)
def test_tables_of_the_position_bias_are_floating_point(change, error, message):
    call = {n: torch.zeros(s) for n, s in TABLES.items()}
    with pytest.raises(error, match=message):
        agent_position_bias(**{**call, "size": (8, 10), "agent_size": (3, 3), **change})


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("agents", [9, 49])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, agents, trains):
    tensors = {n: torch.zeros(s) for n, s in shapes_of((3, 5), (7,), 2, 4, 3, agents, batch=0).items()}
    tensors = {n: t.requires_grad_(trains) for n, t in tensors.items()}
    out = agent_attention(**tensors, backend=backend)
    assert out.shape == (0, 3, 5, 2, 3)
    if trains:
        out.sum().backward()
        assert all(t.grad.shape == t.shape for t in tensors.values())


@pytest.mark.parametrize("given", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("agents", [9, 49])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_what_is_multiplied_and_nothing_inside(backend, agents, given):
    """Result and gradients are those of tensors cast by hand; biases stay in float32, forward and backward."""
    tensors = leaves(shapes_of((5, 4), (7,), 2, 8, 8, agents), 0, torch.float32)
    tensors = {n: (t if n.endswith("bias") else t.to(given)).requires_grad_() for n, t in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = agent_attention(**tensors, backend=backend)
    cast = {n: t if n.endswith("bias") else t.bfloat16() for n, t in tensors.items()}
    expected = agent_attention(**cast, backend=backend)
    assert out.dtype == torch.bfloat16
    grads = [torch.autograd.grad(x.float().square().sum(), list(tensors.values())) for x in (out, expected)]
    for a, b in zip((out, *grads[0]), (expected, *grads[1]), strict=True):
        assert torch.equal(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert agent_attention(**{n: t.double() for n, t in tensors.items()}, backend=backend).dtype == torch.float64


@pytest.mark.parametrize("agents", [9, 49])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_key_stays_in_its_image_and_head(backend, agents):
    tensors = leaves(shapes_of((5, 4), (7,), 2, 8, 8, agents), 0)
    expected = agent_attention(**tensors, backend=backend)
    tensors["k"][1, 3, 0] = float("nan")
    out = agent_attention(**tensors, backend=backend)
    assert out[1, :, :, 0].isnan().all()
    expected[1, :, :, 0] = out[1, :, :, 0] = 0
    torch.testing.assert_close(out, expected)


class DynamicAgents(torch.nn.Module):
    """Biases of the map at hand, as the layer makes them."""

    def forward(self, q, k, v, agents, table, rows, columns):
        size = list(q.shape[1:3])
        bias = agent_position_bias(table, rows, columns, size, [2, 2])
        return agent_attention(q, k, v, agents, bias, bias.mT).flatten(3)


def test_decomposition_is_right_for_every_size():
    """Exported with symbolic batch, height and width; plain PyTorch; also one image, and a map of one column."""

    def inputs(batch, h, w):
        shapes = shapes_of((h, w), (h, w), 2, 4, 3, 4, (False, False), batch)
        shapes |= {"table": (2, 4, 7, 7), "rows": (2, 4, 8), "columns": (2, 4, 10)}
        return tuple(leaves(shapes, 0).values())

    b, h, w = (torch.export.Dim(name, min=1, max=64) for name in "bhw")
    maps = ({0: b, 1: h, 2: w},) * 3
    program = torch.export.export(DynamicAgents(), inputs(3, 9, 5), dynamic_shapes=(*maps, {0: b}, None, None, None))
    program = decompose(program)
    assert not [node for node in program.graph.nodes if "visattn" in str(node.target)]
    for size in ((3, 9, 5), (1, 8, 10), (2, 33, 47), (1, 7, 1), (5, 4, 4)):
        assert relative_error(program.module()(*inputs(*size)), DynamicAgents()(*inputs(*size))) <= TOLERANCE
