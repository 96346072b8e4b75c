"""Attentions of linear cost, and the convolution with kernels per sample: against their definitions."""

import contextlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests import tolerances
from tests.ops.gradients import Recorder, check, leaves, results_and_gradients
from tests.tolerances import relative_error
from visattn import ops
from visattn.ops import BackendError, dynamic_depthwise_conv, efficient_attention, explain, inline_attention
from visattn.ops.linear import eager
from visattn.ops.registration import decompose

NAMES = ("efficient_attention", "inline_attention", "focused_linear_attention")
ATTENTIONS = {name: getattr(ops, name) for name in NAMES}
BACKENDS = ["eager", "reference"]
ATTEND = pytest.mark.parametrize("name", ATTENTIONS)


@contextlib.contextmanager
def either_form(chunks):
    """The eager backend's two ways to do without gradients, whatever the map's size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "_STREAMED", 0 if chunks else 10**9)
        patch.setattr(eager, "_CHUNK", 100)
        yield


@pytest.fixture(params=["whole", "chunks"])
def form(request):
    with either_form(request.param == "chunks"):
        yield


def shapes_of(name, q, k=None, dv=None):
    """The tensors of a call for q [B, *spatial, N, D], another k, and values of dv channels."""
    k = q if k is None else k
    shapes = {"q": q, "k": k, "v": (*k[:-1], dv or k[-1])}
    return {**shapes, "focus_scale": q[-2:]} if name == "focused_linear_attention" else shapes


@st.composite
def problems(draw, name):
    """Any call: 1-3 axes, other maps of keys, strided views, more tokens than channels and fewer."""
    batch, heads, dim = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 24]))

    def shape():
        number = draw(st.integers(1, 3))
        most = {1: 120, 2: 11, 3: 5}[number]
        return (batch, *(draw(st.integers(1, most)) for _ in range(number)), heads, dim)

    q = shape()
    shapes = shapes_of(name, q, shape() if draw(st.booleans()) else q, draw(st.sampled_from([dim, 3])))
    call = {
        "efficient_attention": {},
        "inline_attention": {"scale": draw(st.sampled_from([None, 0.7]))},
        "focused_linear_attention": {"factor": draw(st.sampled_from([3.0, 1.0, 4.5]))},
    }[name]
    return shapes, call, draw(st.booleans()), draw(st.integers(0, 2**31))


@ATTEND
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_matches_reference(name, data):
    with either_form(data.draw(st.booleans())):
        check(ATTENTIONS[name], data.draw(problems(name)), "eager")


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("shape", "kernel"), [((2, 5, 8, 6), 3), ((1, 1, 3, 4), 5), ((3, 4, 1, 1), 1)])
def test_convolution_matches_reference(shape, kernel, strided):
    def op(backend):
        def run(x, kernels):
            return dynamic_depthwise_conv(x.transpose(1, 2) if strided else x, kernels, backend)

        return run

    tensors = leaves({"x": shape, "kernels": (shape[0], shape[-1], kernel**2)}, 0)
    got, expected = results_and_gradients(op("eager"), tensors), results_and_gradients(op("reference"), tensors)
    for part, value in expected.items():
        assert relative_error(got[part], value) <= tolerances.OP[torch.float64], part


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@ATTEND
def test_low_precision(name, dtype, form, poisoned_empty):
    for backend in BACKENDS:
        check(ATTENTIONS[name], (shapes_of(name, (2, 9, 13, 2, 24)), {}, True, 0), backend, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@ATTEND
def test_many_positions_in_low_precision(name, dtype, form):
    """Also far from zero on average, where sums over 4096 positions of key times value leave the range of float16."""
    op = ATTENTIONS[name]
    for offset in (0, 6):
        tensors = leaves(shapes_of(name, (1, 64, 64, 1, 8)), 0)
        tensors = {n: (t + offset * (n in ("k", "v"))).to(dtype) for n, t in tensors.items()}
        expected = results_and_gradients(op, {n: t.double() for n, t in tensors.items()})
        got = results_and_gradients(op, tensors)
        with torch.no_grad():
            assert relative_error(op(**tensors), expected["result 0"]) <= tolerances.OP[dtype]
        for part, value in got.items():
            assert value.isfinite().all()
            # Gradients consist of differences between values, of which rounding leaves little if those are alike.
            if not offset or "result" in part:
                assert relative_error(value, expected[part]) <= tolerances.OP[dtype], part


@ATTEND
@pytest.mark.parametrize("tokens", [2, 5], ids=["quadratic", "linear"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, tokens, name):
    tensors = [t.requires_grad_() for t in leaves(shapes_of(name, (1, tokens, 1, 3)), 0).values()]
    if name == "focused_linear_attention":
        tensors = [(t.detach().abs() + 0.1).requires_grad_() for t in tensors]  # not at the kink
    op = ATTENTIONS[name]
    assert torch.autograd.gradcheck(lambda *t: op(*t, backend=backend), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: op(*t, backend=backend), tensors)


@ATTEND
@pytest.mark.parametrize("trains", [False, True])
def test_no_tensor_is_larger_than_needed(name, trains, form):
    """Tokens by tokens only where there are few of them, and then no context of channels by channels."""
    for tokens, dim, most in ((1024, 8, 1024 * 8), (4, 64, 4 * 64)):
        tensors = {n: t.requires_grad_(trains) for n, t in leaves(shapes_of(name, (1, tokens, 2, dim)), 0).items()}
        with Recorder() as recorder:
            ATTENTIONS[name](**tensors)
        assert recorder.largest <= 2 * most * 8


@pytest.mark.parametrize("backend", BACKENDS)
@ATTEND
def test_is_an_average_with_weights_of_pairs(name, backend):
    """softmax times softmax; (s q.k + 1 - mean over keys) / M; f(q).f(k) over its sum."""
    tensors = leaves(shapes_of(name, (2, 30, 3, 4), (2, 20, 3, 4), 5), 0)
    q, k, v, *scale = tensors.values()
    pairs = partial(torch.einsum, "blnd,bmnd->blnm")
    if name == "efficient_attention":
        weights = pairs(q.softmax(-1), k.softmax(1))
    elif name == "inline_attention":
        weights = (pairs(q, k) / 2 + 1 - pairs(q, k).mean(-1, keepdim=True) / 2) / 20
    else:
        q, k = ((x.relu() + 1e-6) / F.softplus(scale[0]) for x in (q, k))
        q, k = (F.normalize((x**3).flatten(2), dim=-1) * x.flatten(2).norm(dim=-1, keepdim=True) for x in (q, k))
        weights = pairs(q.unflatten(-1, (3, 4)), k.unflatten(-1, (3, 4))) / 20
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    expected = torch.einsum("blnm,bmne->blne", weights, v)
    assert relative_error(ATTENTIONS[name](**tensors, backend=backend), expected) <= tolerances.OP[torch.float64]


@pytest.mark.parametrize("factor", [3, 6])
def test_focused_bears_large_scales(factor):
    """A power of tokens that are negative throughout underflows if taken as it is."""
    tensors = leaves(shapes_of("focused_linear_attention", (1, 40, 2, 8)), 0, torch.float32)
    tensors["q"][:, :20] = -1
    tensors["focus_scale"] += 40
    results = results_and_gradients(lambda **t: ops.focused_linear_attention(**t, factor=factor), tensors)
    assert all(t.isfinite().all() for t in results.values())


def masked_problem(garbage):
    """Maps of 6 x 5, 3 x 4 and no tokens in the corner of 6 x 5, and those by themselves."""
    sizes = [(6, 5), (3, 4), (0, 0)]
    mask = torch.zeros(3, 6, 5, dtype=torch.bool)
    tensors = leaves(shapes_of("efficient_attention", (3, 6, 5, 2, 4), dv=3), 0)
    for i, (h, w) in enumerate(sizes):
        mask[i, :h, :w] = True
    tensors = {n: t.masked_fill(~mask[..., None, None], garbage) for n, t in tensors.items()}
    return tensors, mask, sizes[:2]


@pytest.mark.parametrize("garbage", [0.0, 1e4, float("nan")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_takes_no_part(backend, garbage, form):
    tensors, mask, sizes = masked_problem(garbage)
    results = results_and_gradients(lambda **t: efficient_attention(**t, mask=mask, backend=backend), tensors)
    with torch.no_grad():
        results["inference"] = efficient_attention(**tensors, mask=mask, backend=backend)
    assert all((t[~mask] == 0).all() for t in results.values())
    cotangent = leaves({"result 0": tensors["v"].shape}, 1)["result 0"]
    for i, (h, w) in enumerate(sizes):
        alone = {n: t[i : i + 1, :h, :w].clone().requires_grad_() for n, t in tensors.items()}
        out = efficient_attention(**alone, backend="reference")
        grads = torch.autograd.grad(out, list(alone.values()), cotangent[i : i + 1, :h, :w])
        expected = {"result 0": out, "inference": out}
        expected.update({f"grad {n}": g for n, g in zip(alone, grads, strict=True)})
        for part, value in expected.items():
            got = results[part][i : i + 1, :h, :w]
            assert relative_error(got, value) <= tolerances.OP[torch.float64], part


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_of_other_keys(backend):
    """Queries of another map are all answered."""
    tensors, mask, _ = masked_problem(float("nan"))
    q = torch.randn(3, 7, 2, 4, dtype=torch.float64, requires_grad=True)
    k, v = tensors["k"].requires_grad_(), tensors["v"].requires_grad_()
    out = efficient_attention(q, k, v, mask, backend)
    alone = efficient_attention(q[1:2], k[1:2, :3, :4], v[1:2, :3, :4])
    assert relative_error(out[1:2], alone) <= tolerances.OP[torch.float64]
    assert (out[2] == 0).all()
    grads = torch.autograd.grad(out.sum(), [q, k, v])
    assert all(t.isfinite().all() for t in grads)
    assert all((t[2] == 0).all() for t in grads)


ARGS = {
    "efficient_attention": (torch.ones(2, 7, dtype=torch.bool), "auto"),
    "inline_attention": (0.3, "auto"),
    "focused_linear_attention": (torch.randn(2, 4, dtype=torch.float64, requires_grad=True), 3.0, "auto"),
}


@ATTEND
def test_custom_op_equals_plain_pytorch(name, form):
    shapes = shapes_of("efficient_attention", (2, 5, 6, 2, 4), (2, 7, 2, 4), 3)
    inputs = [t.requires_grad_() for t in leaves(shapes, 0).values()]
    whole = getattr(torch.ops.visattn, name).default
    torch.library.opcheck(whole, (*inputs, *ARGS[name]))
    results = []
    for op in (whole, ATTENTIONS[name]):
        out = op(*inputs, *ARGS[name])
        out = out[0] if op is whole else out
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= tolerances.OP[torch.float64]


def test_opcheck_convolution():
    args = (torch.randn(2, 5, 6, 4, requires_grad=True), torch.randn(2, 4, 9, requires_grad=True), "auto")
    torch.library.opcheck(torch.ops.visattn.dynamic_depthwise_conv.default, args)


@ATTEND
def test_cost_is_that_of_the_cheaper_order(name):
    for keys, cost in ((100, (20 + 100) * 8 * 6), (3, 20 * 3 * (8 + 6))):
        shapes = shapes_of(name, (2, 4, 5, 3, 8), (2, keys, 3, 8), 6)
        with FlopCounterMode(display=False) as counter:
            ATTENTIONS[name](**{n: torch.empty(s, device="meta") for n, s in shapes.items()})
        assert counter.get_total_flops() == 2 * 2 * 3 * cost


def test_cost_of_the_convolution():
    with FlopCounterMode(display=False) as counter:
        dynamic_depthwise_conv(torch.empty(2, 5, 6, 4, device="meta"), torch.empty(2, 4, 9, device="meta"))
    assert counter.get_total_flops() == 2 * 2 * 5 * 6 * 4 * 9


Q = torch.zeros(1, 5, 6, 2, 4)
SHAPES = r"expected q \[B, \*spatial, N, D\]"


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        *((name, {"k": Q[..., :3]}, ValueError, SHAPES) for name in ATTENTIONS),
        *((name, {"v": Q[:, :4]}, ValueError, SHAPES) for name in ATTENTIONS),
        *((name, {"q": Q.double()}, TypeError, "one floating dtype") for name in ATTENTIONS),
        *((name, {"q": Q[0, 0]}, ValueError, "1 to 3 spatial axes") for name in ATTENTIONS),
        (
            "efficient_attention",
            {"mask": torch.ones(1, 5, 6)},
            ValueError,
            r"boolean mask \(1, 5, 6\), got torch.float",
        ),
        ("efficient_attention", {"mask": torch.ones(1, 30) > 0}, ValueError, r"boolean mask \(1, 5, 6\).* \(1, 30\)"),
        ("inline_attention", {"scale": -1.0}, ValueError, "expected scale > 0, got -1.0"),
        ("focused_linear_attention", {"focus_scale": torch.ones(8)}, ValueError, r"focus_scale \(2, 4\).*\(8,\)"),
        ("focused_linear_attention", {"factor": 0.0}, ValueError, "expected factor > 0, got 0.0"),
        ("inline_attention", {"backend": "cuda"}, BackendError, "'auto', 'triton', 'eager', 'reference'; got 'cuda'"),
    ],
)
def test_mistakes_are_named(name, change, error, message):
    tensors = {"q": Q, "k": Q, "v": Q, **({"focus_scale": Q[0, 0, 0]} if name == "focused_linear_attention" else {})}
    with pytest.raises(error, match=message):
        ATTENTIONS[name](**{**tensors, **change})


@pytest.mark.parametrize("kernels", [torch.zeros(1, 4, 4), torch.zeros(2, 4, 9), torch.zeros(1, 4, 3, 3)])
def test_mistaken_kernels_are_named(kernels):
    with pytest.raises(ValueError, match=r"kernels \[B, C, K \* K\] with an odd K"):
        dynamic_depthwise_conv(torch.zeros(1, 5, 6, 4), kernels)


def test_backend_is_explained():
    with explain() as decisions:
        inline_attention(Q, Q, Q)
        dynamic_depthwise_conv(Q.flatten(3), F.pad(Q[:, 0, 0].flatten(1)[..., None], (0, 8)))
    assert [(d.op, d.backend) for d in decisions] == [
        ("inline_attention", "eager"),
        ("dynamic_depthwise_conv", "eager"),
    ]


def every_op(name):
    """Any of the four, and the shapes of its tensors for a batch of b."""
    if name == "dynamic_depthwise_conv":
        return dynamic_depthwise_conv, lambda b: {"x": (b, 5, 6, 4), "kernels": (b, 4, 9)}
    return ATTENTIONS[name], lambda b: shapes_of(name, (b, 5, 6, 2, 4), dv=3)


EVERY = pytest.mark.parametrize("name", [*ATTENTIONS, "dynamic_depthwise_conv"])
RUNNABLE = pytest.mark.parametrize("backend", [*BACKENDS, "triton"])  # on a CPU in Triton's interpreter


@pytest.mark.parametrize("chunks", [False, True])
@RUNNABLE
@EVERY
def test_empty_batch(name, backend, chunks):
    op, shapes = every_op(name)
    with either_form(chunks):
        results = results_and_gradients(partial(op, backend=backend), leaves(shapes(0), 0, torch.float32))
    assert results["result 0"].shape == op(**leaves(shapes(1), 0, torch.float32))[:0].shape


@RUNNABLE
def test_empty_batch_with_a_mask(backend):
    tensors = leaves(shapes_of("efficient_attention", (0, 5, 6, 2, 4)), 0, torch.float32)
    mask = torch.ones(0, 5, 6, dtype=torch.bool)
    assert efficient_attention(**tensors, mask=mask, backend=backend).shape == (0, 5, 6, 2, 4)


@RUNNABLE
@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (2, 30, 2, 32), (1, 700, 1, 32)])
def test_focused_in_float16_bears_small_normalisers(shape, backend):
    """Keys that are negative nearly throughout leave a normaliser by which a query must not be divided in float16."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(shape).half() for _ in range(3))
    q, k = ((x - 2.5 * (shape[-1] > 1)).requires_grad_() for x in (q, k))
    scale = torch.zeros(shape[-2:])
    out = ops.focused_linear_attention(q, k, v, scale, backend=backend)
    expected = ops.focused_linear_attention(q.double(), k.double(), v.double(), scale.double(), backend="reference")
    assert relative_error(out, expected) <= tolerances.OP[torch.float16]
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), [q, k]))


OTHERS = [None, "q", 1.0, torch.complex64, torch.bool, torch.int64]


@pytest.mark.parametrize("other", OTHERS, ids=str)
@EVERY
def test_other_than_real_tensors_are_refused(name, other):
    op, shapes = every_op(name)
    tensors = leaves(shapes(1), 0, torch.float32)
    for one, t in tensors.items():
        wrong = t.to(other) if isinstance(other, torch.dtype) else other
        with pytest.raises(TypeError, match=r"to be a tensor, got|floating dtype"):
            op(**{**tensors, one: wrong})
    if isinstance(other, torch.dtype):
        with pytest.raises(TypeError, match="floating dtype"):
            op(**{n: t.to(other) for n, t in tensors.items()})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@EVERY
def test_autocast_casts_the_tensors_and_nothing_inside(name, dtype, backend):
    op, shapes = every_op(name)
    tensors = leaves(shapes(2), 0, dtype)
    cast = {n: t if n == "focus_scale" or dtype == torch.float64 else t.bfloat16() for n, t in tensors.items()}
    expected = results_and_gradients(partial(op, backend=backend), cast)
    inputs = [t.requires_grad_() for t in tensors.values()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = op(*inputs, backend=backend)
    cotangent = leaves({"result 0": out.shape}, 1)["result 0"]
    grads = torch.autograd.grad(out, inputs, cotangent.to(out))
    assert out.dtype == (dtype if dtype == torch.float64 else torch.bfloat16)
    assert torch.equal(out, expected["result 0"])
    for t, n, grad in zip(inputs, tensors, grads, strict=True):
        assert grad.dtype == t.dtype
        assert torch.equal(grad, expected[f"grad {n}"].to(grad))


@pytest.mark.parametrize("backend", BACKENDS)
@ATTEND
def test_nan_stays_in_its_image_and_head(name, backend, form):
    """Within those a key reaches all queries. Focused attention takes norms over all heads together."""
    tensors = leaves(shapes_of(name, (3, 5, 6, 2, 4)), 0)
    for one in ("q", "k", "v"):
        spoilt = {**tensors, one: tensors[one].clone()}
        spoilt[one][1, 2, 3, 0, 0] = float("nan")
        out = ATTENTIONS[name](**spoilt, backend=backend)
        clean = torch.ones(3, 5, 6, 2, dtype=torch.bool)
        clean[1, :, :, slice(None) if name == "focused_linear_attention" and one != "v" else 0] = False
        expected = ATTENTIONS[name](**tensors, backend=backend)
        assert relative_error(out[clean], expected[clean]) <= tolerances.OP[torch.float64]
        assert out[1, 2, 3, 0].isnan().any()


@pytest.mark.parametrize("spoilt", ["x", "kernels"])
def test_nan_stays_with_its_neighbours_image_and_channel(spoilt):
    tensors = leaves({"x": (2, 7, 9, 4), "kernels": (2, 4, 9)}, 0)
    tensors[spoilt][(1, 3, 4, 2) if spoilt == "x" else (1, 2, 0)] = float("nan")
    got, expected = (dynamic_depthwise_conv(**tensors, backend=backend).isnan() for backend in BACKENDS)
    assert torch.equal(got, expected)
    assert got[1, ..., 2].any()
    assert got.sum() == got[1, ..., 2].sum()


class AllFour(torch.nn.Module):
    def forward(self, q, k, v, focus_scale, kernels):
        v = inline_attention(q, k, v)
        v = efficient_attention(q, k, v, q[..., 0, 0] > -1)
        v = ops.focused_linear_attention(q, k, v, focus_scale)
        return dynamic_depthwise_conv(v.flatten(3), kernels)


def inputs_of_all(b, h=9, w=7, dtype=torch.float64):
    map_ = (b, h, w, 2, 4)
    shapes = {"q": map_, "k": map_, "v": map_, "focus_scale": (2, 4), "kernels": (b, 8, 9)}
    return tuple(leaves(shapes, b, dtype).values())


def exported(sizes):
    dims = {axis: torch.export.Dim(name, min=1, max=64) for axis, name in enumerate("bhw") if name in sizes}
    shapes = (*(dims,) * 3, None, {0: dims[0]})
    return torch.export.export(AllFour(), inputs_of_all(2), dynamic_shapes=shapes)


def custom_ops(program):
    return [str(n.target) for n in program.graph.nodes if "visattn" in str(n.target)]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_dynamic_batch_is_plain_pytorch():
    program, traced = exported("b"), torch.jit.trace(AllFour(), inputs_of_all(2), check_trace=False)
    assert not custom_ops(program)
    for b in (1, 3):
        inputs = inputs_of_all(b)
        for run in (program.module(), traced):
            assert relative_error(run(*inputs), AllFour()(*inputs)) <= tolerances.SAME_MODEL


def test_decomposition_is_for_every_size():
    program = exported("bhw")
    assert len(custom_ops(program)) == 4
    program = decompose(program)
    assert not custom_ops(program)
    for size in ((1, 33, 47), (1, 1, 1), (3, 2, 1), (2, 40, 5), (1, 9, 7)):
        inputs = inputs_of_all(*size)
        assert relative_error(program.module()(*inputs), AllFour()(*inputs)) <= tolerances.SAME_MODEL
