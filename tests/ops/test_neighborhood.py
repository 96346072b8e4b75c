"""Neighborhood attention: backends against the reference and the goldens of the official kernels."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tolerances
from tests.ops.gradients import Recorder, check, leaves
from tests.tolerances import relative_error
from visattn.ops import BackendError, explain, neighborhood_attention, use_backend

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


def make(
    window, shape, value_dim=24, bias=True, extra=3, extra_bias="query", scale=None, lse=False, strided=True, seed=0
):
    """A problem for `gradients.check`; window is (kernel_size, dilation, stride, is_causal)."""
    batch, *size, heads, dim = shape
    shapes = {"q": shape, "k": shape, "v": (*shape[:-1], value_dim)}
    if bias:
        shapes["bias"] = (heads, *(2 * k - 1 for k in window[0]))
    if extra:
        shapes["extra_k"], shapes["extra_v"] = (batch, extra, heads, dim), (batch, extra, heads, value_dim)
        biases = {"query": (*size, 1, extra), "head": (heads, extra), "image": (batch, *size, heads, extra)}
        if extra_bias:
            shapes["extra_bias"] = biases[extra_bias]
    names = ("kernel_size", "dilation", "stride", "is_causal")
    return shapes, {**dict(zip(names, window, strict=True)), "scale": scale, "return_lse": lse}, strided, seed


@st.composite
def problems(draw):
    """Any call the op accepts: 1-3 axes, odd sizes, ragged dilation groups, extra keys, non-contiguous views."""
    number = draw(st.integers(1, 3))
    most = {1: 40, 2: 9, 3: 3}[number]
    kernel, dilation, stride, causal, size = [], [], [], [], []
    for _ in range(number):
        kernel.append(draw(st.integers(1, min(7, most))))
        dilation.append(draw(st.integers(1, 3)))
        size.append(kernel[-1] * dilation[-1] + draw(st.integers(0, most)))
        stride.append(draw(st.integers(1, kernel[-1])))
        causal.append(draw(st.booleans()))
    with_bias = draw(st.booleans())
    if with_bias:
        stride, causal = [1] * number, [False] * number
    heads, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 24]))
    return make(
        (kernel, dilation, stride, causal),
        (draw(st.integers(1, 2)), *size, heads, dim),
        value_dim=dim if draw(st.booleans()) else draw(st.integers(1, 5)),
        bias=with_bias,
        extra=draw(st.sampled_from([0, 0, 1, 3])),
        extra_bias=draw(st.sampled_from([None, "query", "head", "image"])),
        scale=draw(st.sampled_from([None, 0.7])),
        lse=draw(st.booleans()),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@settings(max_examples=400, deadline=None, derandomize=True)
@given(problem=problems())
def test_matches_reference(backend, problem):
    check(neighborhood_attention, problem, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@settings(max_examples=5000, deadline=None)
@given(problem=problems())
def test_matches_reference_long(backend, problem):
    check(neighborhood_attention, problem, backend)


CASES = {
    "tiles": make(([7, 7], [1, 1], [1, 1], [False, False]), (2, 29, 18, 2, 24)),
    "dilated": make(([3, 5], [4, 2], [1, 1], [False, False]), (2, 13, 21, 1, 24)),
    "lse": make(([5, 3], [2, 2], [1, 1], [False, False]), (1, 24, 17, 3, 24), lse=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend, case, dtype, poisoned_empty):
    """Against the float64 reference on the same (rounded) inputs."""
    check(neighborhood_attention, CASES[case], backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    window = ([3, 2], [1, 2], [1, 1], [False, False])
    shapes, *_ = make(window, (1, 4, 5, 2, 3), value_dim=2)
    tensors = [t.requires_grad_() for t in leaves(shapes, 0).values()]

    def op(q, k, v, *rest):
        return neighborhood_attention(q, k, v, *window, *rest, return_lse=True, backend=backend)

    assert torch.autograd.gradcheck(op, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_window_of_the_whole_map_is_attention(backend):
    q, k, v = torch.randn(3, 2, 5, 6, 2, 8, dtype=torch.float64)
    out = neighborhood_attention(q, k, v, (5, 6), backend=backend)
    flat = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*flat).transpose(1, 2).reshape(q.shape)
    assert relative_error(out, expected) <= tolerances.OP[torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_values_come_back(backend):
    q, k = torch.randn(2, 1, 11, 13, 2, 4)
    out = neighborhood_attention(q, k, torch.ones_like(q), (3, 5), (2, 1), backend=backend)
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    q, k, v = torch.randn(3, 0, 8, 9, 2, 4)
    assert neighborhood_attention(q, k, v, 3, backend=backend).shape == (0, 8, 9, 2, 4)


def test_one_query_attends_to_one_key_when_kernel_is_one():
    q, k, v = torch.randn(3, 1, 4, 5, 1, 3)
    torch.testing.assert_close(neighborhood_attention(q, k, v, 1), v)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernel_size": 9}, ValueError, r"kernel_size \* dilation <= size.*\[9, 9\].*\(8, 9\)"),
        ({"dilation": 3}, ValueError, r"kernel_size \* dilation <= size"),
        ({"stride": 4}, ValueError, "stride <= kernel_size"),
        ({"kernel_size": 0}, ValueError, "kernel_size >= 1"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "expected kernel_size of one int or 2"),
        ({"dilation": 1.5}, (ValueError, TypeError), "dilation|iterable"),
        ({"k": torch.zeros(1, 8, 8, 2, 4)}, ValueError, "expected k like q"),
        ({"v": torch.zeros(1, 8, 9, 2, 4, dtype=torch.float64)}, TypeError, "one floating dtype"),
        ({"q": torch.zeros(8, 4)}, ValueError, "1 to 3 spatial axes"),
        ({"bias": torch.zeros(2, 5, 6)}, ValueError, r"expected bias \(2, 5, 5\)"),
        ({"bias": torch.zeros(2, 5, 5), "stride": 2}, ValueError, "stride 1 and no causal axis"),
        ({"bias": torch.zeros(2, 5, 5), "is_causal": True}, ValueError, "stride 1 and no causal axis"),
        ({"extra_k": torch.zeros(1, 3, 2, 4)}, ValueError, "extra_k and extra_v together"),
        ({"extra_k": torch.zeros(3, 2, 4), "extra_v": torch.zeros(3, 2, 4)}, ValueError, "expected extra_k"),
        ({"extra_bias": torch.zeros(3)}, ValueError, "got extra_bias alone"),
        (
            {"extra_k": torch.zeros(1, 3, 2, 4), "extra_v": torch.zeros(1, 3, 2, 4), "extra_bias": torch.zeros(4)},
            ValueError,
            "broadcastable",
        ),
        ({"backend": "cuda"}, BackendError, "expected backend 'auto', 'triton', 'eager', 'reference'; got 'cuda'"),
    ],
)
def test_mistakes_are_named(change, error, message):
    q, k, v = torch.zeros(3, 1, 8, 9, 2, 4)
    with pytest.raises(error, match=message):
        neighborhood_attention(**{"q": q, "k": k, "v": v, "kernel_size": 3, **change})


def test_backend_requests(monkeypatch):
    q, k, v = torch.randn(3, 1, 4, 4, 1, 4)
    with explain() as decisions:
        neighborhood_attention(q, k, v, 3)
        with use_backend("reference"):
            neighborhood_attention(q, k, v, 3)
            neighborhood_attention(q, k, v, 3, backend="eager")
        monkeypatch.setenv("VISATTN_BACKEND", "reference")
        neighborhood_attention(q, k, v, 3)
        with use_backend("eager"):
            neighborhood_attention(q, k, v, 3)
    assert [d.backend for d in decisions] == ["eager", "reference", "eager", "reference", "eager"]
    neighborhood_attention(q, k, v, 3)
    assert len(decisions) == 5, "the context has ended"


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
