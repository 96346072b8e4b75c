"""Aggregated attention: backends against the reference; the position bias; memory; mistakes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tolerances
from tests.ops.gradients import Recorder, check, leaves
from tests.tolerances import relative_error
from visattn.ops import BackendError, aggregated_attention, aggregated_weights, explain
from visattn.ops.aggregated import cpb, eager
from visattn.ops.geometry import Pooled, interpolated

BACKENDS = ["eager", "reference"]  # Triton has tests of its own: no float64
MAPS = ("q", "pool_k", "pool_v", "k", "v")


def shapes_of(
    batch, size, pool, heads, dim, hidden=16, width=None, kernel=None, local=("bias", "tokens", "token_bias")
):
    """Shapes of all tensors; without a kernel size, no neighbours."""
    width = dim if width is None else width
    shapes = {"q": (batch, *size, heads, dim), "pool_k": (batch, *pool, heads, dim)}
    shapes |= {"pool_v": (batch, *pool, heads, width), "temperature": (heads,), "query_embedding": (heads, dim)}
    shapes |= {
        "cpb_weight1": (hidden, 2),
        "cpb_bias1": (hidden,),
        "cpb_weight2": (heads, hidden),
        "cpb_bias2": (heads,),
    }
    if kernel is not None:
        shapes |= {"k": (batch, *size, heads, dim), "v": (batch, *size, heads, width)}
        slots = kernel**2
        given = {"bias": (heads, slots), "tokens": (heads, dim, slots), "token_bias": (heads, slots)}
        shapes |= {"local_bias" if n == "bias" else n: given[n] for n in local}
    return shapes


@st.composite
def problems(draw):
    """Any call the op accepts: pools that do not divide, maps smaller than the window, all optional parts on or off."""
    size = [draw(st.integers(1, 11)) for _ in range(2)]
    pool = [draw(st.integers(1, n)) for n in size]
    call = {"pretrain_size": [draw(st.integers(1, 12)) for _ in range(2)]}
    if draw(st.booleans()):
        base = [draw(st.integers(1, 9)) for _ in range(2)]
        call["bias_size"] = [*base, *(draw(st.integers(1, n)) for n in base)]
    kernel = draw(st.sampled_from([None, 1, 3, 3, 5]))
    if kernel is not None:
        call["kernel_size"] = kernel
    dim = draw(st.sampled_from([2, 4, 24]))  # with 1, gradients of what is normalised are zero but for rounding
    local = [n for n in ("bias", "tokens", "token_bias") if draw(st.booleans())]
    args = (draw(st.integers(1, 2)), size, pool, draw(st.integers(1, 3)), dim, draw(st.sampled_from([1, 7])))
    shapes = shapes_of(*args, draw(st.sampled_from([dim, 3])), kernel, local)
    return shapes, call, kernel is not None and draw(st.booleans()), draw(st.integers(0, 2**31))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=problems(), chunk=st.sampled_from([1, 500, 1 << 18]))
def test_matches_reference(problem, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpb, "_CHUNK", chunk)
        patch.setattr(eager, "CHUNKS", 1000)
        check(aggregated_attention, problem, "eager")


@pytest.mark.slow
@settings(max_examples=4000, deadline=None)
@given(problem=problems())
def test_matches_reference_long(problem):
    check(aggregated_attention, problem, "eager")


PLAIN = (shapes_of(2, (12, 9), (3, 2), 2, 24, kernel=3), {"pretrain_size": [7, 7]}, True, 0)
BASE = {"bias_size": [8, 8, 2, 2]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [{}, BASE], ids=["extrapolated", "interpolated"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend, change, dtype, poisoned_empty):
    shapes, call, strided, seed = PLAIN
    check(aggregated_attention, (shapes, {**call, **change}, strided, seed), backend, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing_inside(backend, dtype):
    """Parameters stay in float32, and so do logits, forward and backward."""
    shapes, call, _, seed = PLAIN
    tensors = leaves(shapes, seed, torch.float32)
    tensors = {n: (t.to(dtype) if n in MAPS else t).requires_grad_() for n, t in tensors.items()}
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            out = aggregated_attention(**tensors, **call, backend=backend)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), list(tensors.values()))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert [g.dtype for g in results[0][1:]] == [t.dtype for t in tensors.values()]


@pytest.mark.parametrize("kernel", [None, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, kernel):
    shapes = shapes_of(1, (2, 3), (1, 2), 1, 2, hidden=2, width=1, kernel=kernel)
    tensors = [t.requires_grad_() for t in leaves(shapes, 0).values()]

    def op(*given):
        tensors = dict(zip(shapes, given, strict=True))
        return aggregated_attention(**tensors, pretrain_size=4, bias_size=[3, 3, 2, 2], backend=backend)

    assert torch.autograd.gradcheck(op, tensors)
    assert torch.autograd.gradgradcheck(op, tensors)


@pytest.mark.parametrize("change", [{}, BASE], ids=["extrapolated", "interpolated"])
def test_gradients_that_are_differentiated_are_the_same(change):
    shapes, call, _, seed = PLAIN
    tensors = {n: t.requires_grad_() for n, t in leaves(shapes, seed).items()}
    out = aggregated_attention(**tensors, **call, **change).square().sum()
    plain = torch.autograd.grad(out, list(tensors.values()), retain_graph=True)
    for a, b in zip(torch.autograd.grad(out, list(tensors.values()), create_graph=True), plain, strict=True):
        assert relative_error(a, b) <= tolerances.OP[torch.float64]


@pytest.mark.parametrize("chunk", [1, 1000, 3000])
@pytest.mark.parametrize("kernel", [None, 3])
def test_chunks_do_not_change_the_result(monkeypatch, chunk, kernel):
    monkeypatch.setattr(cpb, "_CHUNK", chunk)
    monkeypatch.setattr(eager, "CHUNKS", 1000)
    _, call, _, seed = PLAIN
    shapes = shapes_of(2, (12, 9), (3, 2), 2, 24, kernel=kernel)
    check(aggregated_attention, (shapes, call, kernel is not None, seed), "eager")


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_tokens_are_zero_after_normalisation(backend):
    """As F.normalize: no NaN, and the gradient of zero is finite."""
    tensors = leaves(PLAIN[0], 0)
    for name in ("q", "k", "pool_k"):
        tensors[name][:, 0, 1] = 0
    tensors = {n: t.requires_grad_() for n, t in tensors.items()}
    out = aggregated_attention(**tensors, pretrain_size=7, backend=backend)
    for t in (out, *torch.autograd.grad(out.square().sum(), list(tensors.values()))):
        assert t.isfinite().all()


def test_trains_in_deterministic_mode():
    """Operations without a deterministic form would raise."""
    shapes, call, _, seed = PLAIN
    tensors = {n: t.requires_grad_() for n, t in leaves(shapes, seed, torch.float32).items()}
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            out = aggregated_attention(**tensors, **call, **BASE)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(tensors.values()))])
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_pooled_keys_lie_where_pooling_puts_them():
    for length in range(1, 40):
        for pooled in range(1, length + 1):
            axis = Pooled(length, pooled)
            tokens = torch.arange(length, dtype=torch.float64)
            keys = F.adaptive_avg_pool1d(tokens[None], pooled)[0]
            assert torch.equal(torch.tensor(axis.keys) / 2, keys)
            distances = torch.tensor(list(axis.distances)) / 2
            assert torch.equal(distances[axis.index()], tokens[:, None] - keys)
            assert len(distances) <= 4 * length
    assert len(Pooled(56, 7).distances) == 104
    assert len(Pooled(7, 7).distances) == 13


@pytest.mark.parametrize("sizes", [(8, 3, 13, 5), (9, 4, 5, 2), (5, 5, 11, 11), (1, 1, 4, 2), (6, 2, 6, 3)])
def test_interpolation_is_that_of_pytorch(sizes):
    length, pooled, new_length, new_pooled = sizes
    axis = Pooled(length, pooled)
    values = torch.randn(len(axis.distances), dtype=torch.float64)
    index, weights = interpolated(axis, new_length, new_pooled)
    expected = F.interpolate(values[axis.index()][None, None], (new_length, new_pooled), mode="bilinear")[0, 0]
    assert relative_error((values[index] * weights).sum(-1), expected) <= tolerances.OP[torch.float64]
    assert interpolated(axis, length, pooled)[1] is None


def test_weights_are_those_of_the_softmax():
    shapes, call, _, seed = PLAIN
    tensors = leaves(shapes, seed)
    values = {n: tensors.pop(n) for n in ("v", "pool_v", "tokens", "token_bias")}
    local, pooled = aggregated_weights(**tensors, **call)
    assert local.shape == (2, 12, 9, 2, 9)
    assert pooled.shape == (2, 12, 9, 2, 3, 2)
    assert relative_error(local.sum(-1) + pooled.sum((-1, -2)), torch.ones(2, 12, 9, 2)) <= tolerances.OP[torch.float64]
    assert (local[:, 0, :, :, :3] == 0).all()
    out = torch.einsum("bhwnpq,bpqnd->bhwnd", pooled, values["pool_v"])
    v = F.pad(values["v"], (0, 0, 0, 0, 1, 1, 1, 1))
    for j in range(9):
        out = out + local[..., j, None] * v[:, j // 3 : j // 3 + 12, j % 3 : j % 3 + 9]
    expected = aggregated_attention(**tensors, **call, v=values["v"], pool_v=values["pool_v"])
    assert relative_error(out, expected) <= tolerances.OP[torch.float64]
    for name in ("k", "local_bias"):
        del tensors[name]
    local, pooled = aggregated_weights(**tensors, **call)
    assert local is None
    assert relative_error(pooled.sum((-1, -2)), torch.ones(2, 12, 9, 2)) <= tolerances.OP[torch.float64]


def measure(size):
    """Bytes per token: the largest tensor that forward and backward make, and what is kept between them."""
    shapes = shapes_of(1, (size, size), (size // 8, size // 8), 2, 24, hidden=64, kernel=3)
    tensors = {n: t.requires_grad_() for n, t in leaves(shapes, 0, torch.float32).items()}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with Recorder() as recorder:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = aggregated_attention(**tensors, pretrain_size=7)
        torch.autograd.grad(out, list(tensors.values()), torch.ones_like(out))
    return np.array([recorder.largest, sum(kept.values())]) / size**2, recorder.names


def test_memory_is_linear_in_tokens(monkeypatch):
    """Four times the tokens see four times the pooled keys: a dense bias would need four times as much per token."""
    monkeypatch.setattr(cpb, "_CHUNK", 1)
    (small, _), (large, names) = measure(64), measure(128)
    assert (large <= 1.05 * small).all()
    assert large[0] < 2 * 16**2 * 4  # of a dense bias
    assert not [n for n in names if "scatter" in n or "index_put" in n]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(8, 4)}, ValueError, r"expected q \[B, H, W, N, D\]"),
        ({"pool_k": torch.zeros(1, 3, 3, 2, 5)}, ValueError, r"expected pool_k \(1, 3, 3, 2, 4\)"),
        ({"pool_v": torch.zeros(1, 3, 2, 2, 4)}, ValueError, r"expected pool_v \(1, 3, 3, 2, 4\)"),
        ({"temperature": torch.zeros(2, 1)}, ValueError, r"expected temperature \(2,\)"),
        ({"cpb_weight2": torch.zeros(2, 7)}, ValueError, r"expected cpb_weight2 \(2, 16\)"),
        ({"pretrain_size": 0}, ValueError, "pretrain_size of 2 ints >= 1"),
        ({"pretrain_size": (7, 7, 7)}, ValueError, "expected pretrain_size of one int or 2"),
        ({"bias_size": [8, 8]}, ValueError, "bias_size of no or 4 ints"),
        ({"bias_size": [8, 8, 9, 1]}, ValueError, "at most as many pooled keys"),
        ({**dict.fromkeys("qkv", torch.zeros(1, 2, 9, 2, 4)), **BASE}, ValueError, "at most as many pooled keys"),
        ({"v": None}, ValueError, "expected k and v together"),
        ({"k": None, "v": None}, ValueError, "expected k and v together"),
        ({"kernel_size": 4}, ValueError, "odd kernel_size"),
        ({"kernel_size": 5}, ValueError, r"expected local_bias \(2, 25\)"),
        ({"tokens": torch.zeros(2, 9, 4)}, ValueError, r"expected tokens \(2, 4, 9\)"),
        ({"k": torch.zeros(1, 8, 8, 2, 4)}, ValueError, r"expected k \(1, 8, 9, 2, 4\)"),
        ({"v": torch.zeros(1, 8, 9, 2, 4).double()}, TypeError, "one floating dtype"),
        ({"backend": "cuda"}, BackendError, "expected backend 'auto', 'triton', 'eager', 'reference'; got 'cuda'"),
    ],
)
def test_mistakes_are_named(change, error, message):
    tensors = {n: torch.zeros(s) for n, s in shapes_of(1, (8, 9), (3, 3), 2, 4, kernel=3).items()}
    with pytest.raises(error, match=message):
        aggregated_attention(**{**tensors, "pretrain_size": 7, **change})


def test_backend_is_explained():
    tensors = {n: torch.zeros(s) for n, s in PLAIN[0].items()}
    with explain() as decisions:
        aggregated_attention(**tensors, pretrain_size=7)
    assert [(d.op, d.backend) for d in decisions] == [("aggregated_attention", "eager")]


@pytest.mark.parametrize("name", ["q", "pool_k", "pool_v", "temperature", "cpb_weight1", "cpb_bias2"])
def test_none_is_no_tensor(name):
    tensors = {n: torch.zeros(s) for n, s in PLAIN[0].items()}
    with pytest.raises(TypeError, match=f"expected {name} to be a tensor, got NoneType"):
        aggregated_attention(**{**tensors, name: None}, pretrain_size=7)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["temperature", "query_embedding", "cpb_bias1", "local_bias", "tokens", "token_bias"])
def test_parameters_are_floating_point(name, dtype):
    tensors = {n: torch.zeros(s) for n, s in PLAIN[0].items()}
    with pytest.raises(TypeError, match=f"expected {name} of a floating dtype, got {dtype}"):
        aggregated_attention(**{**tensors, name: tensors[name].to(dtype)}, pretrain_size=7)


def test_sizes_may_be_those_of_numpy():
    tensors = leaves(PLAIN[0], 0)
    expected = aggregated_attention(**tensors, pretrain_size=7, kernel_size=3, **BASE)
    sizes = {"pretrain_size": np.int64(7), "kernel_size": np.int64(3), "bias_size": np.array(BASE["bias_size"])}
    assert torch.equal(aggregated_attention(**tensors, **sizes), expected)


@pytest.mark.parametrize(
    "change", [{"kernel_size": 3.0}, {"bias_size": [8.0, 8, 2, 2]}, {"pretrain_size": 7.0}], ids=str
)
def test_sizes_are_ints(change):
    tensors = leaves(PLAIN[0], 0)
    with pytest.raises(ValueError, match=f"expected {next(iter(change))} of one int or"):
        aggregated_attention(**tensors, **{"pretrain_size": 7, **change})


@pytest.mark.parametrize("kernel", [None, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, kernel):
    shapes = shapes_of(0, (5, 4), (2, 2), 2, 4, width=3, kernel=kernel)
    tensors = {n: torch.zeros(s, requires_grad=True) for n, s in shapes.items()}
    out = aggregated_attention(**tensors, pretrain_size=7, backend=backend)
    assert out.shape == (0, 5, 4, 2, 3)
    out.sum().backward()
    assert all(t.grad.shape == t.shape and (t.grad == 0).all() for t in tensors.values())


@pytest.mark.parametrize("given", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_what_is_multiplied(backend, given):
    """Result and gradients are those of maps cast by hand; float64 stays."""
    tensors = leaves(PLAIN[0], 0, torch.float32)
    tensors = {n: (t.to(given) if n in MAPS else t).requires_grad_() for n, t in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = aggregated_attention(**tensors, pretrain_size=7, backend=backend)
    cast = {n: t.bfloat16() if n in MAPS else t for n, t in tensors.items()}
    expected = aggregated_attention(**cast, pretrain_size=7, backend=backend)
    assert out.dtype == torch.bfloat16
    grads = [torch.autograd.grad(x.float().square().sum(), list(tensors.values())) for x in (out, expected)]
    for a, b in zip((out, *grads[0]), (expected, *grads[1]), strict=True):
        assert torch.equal(a, b)
    double = {n: t.double() for n, t in tensors.items()}
    weights = {n: t for n, t in tensors.items() if n not in ("v", "pool_v", "tokens", "token_bias")}
    with torch.autocast("cpu", torch.bfloat16):
        assert aggregated_attention(**double, pretrain_size=7, backend=backend).dtype == torch.float64
        found = aggregated_weights(**weights, pretrain_size=7)
    for a, b in zip(found, aggregated_weights(**{n: cast[n] for n in weights}, pretrain_size=7), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("chunk", [1, 1 << 18])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_key_stays_in_its_image_and_head(monkeypatch, backend, chunk):
    """That of a neighbour stays in its window too."""
    monkeypatch.setattr(cpb, "_CHUNK", chunk)
    clean = leaves(PLAIN[0], 0)
    for name, rows, columns in (("k", slice(4, 7), slice(1, 4)), ("pool_k", slice(None), slice(None))):
        tensors = {n: t.clone() for n, t in clean.items()}
        tensors[name][1, (5, 2)[name == "pool_k"], (2, 1)[name == "pool_k"], 0] = float("nan")
        expected = aggregated_attention(**clean, pretrain_size=7, backend=backend)
        out = aggregated_attention(**tensors, pretrain_size=7, backend=backend)
        assert out[1, rows, columns, 0].isnan().all()
        out[1, rows, columns, 0] = expected[1, rows, columns, 0] = 0
        torch.testing.assert_close(out, expected)
