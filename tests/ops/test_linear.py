"""Attentions of linear cost, and the convolution with kernels per sample: against their definitions."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import tolerances
from tests.golden import fill
from tests.ops.cases import LINEAR_FORMS, linear_shapes, settled
from tests.ops.gradients import Recorder, leaves, results_and_gradients
from tests.tolerances import relative_error
from visattn import ops
from visattn.ops import efficient_attention

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("efficient_attention", "inline_attention", "focused_linear_attention", "relu_linear_attention",
         "flow_attention")  # fmt: skip
ATTENTIONS = {name: getattr(ops, name) for name in NAMES}
BACKENDS = ["eager", "reference"]
ATTEND = pytest.mark.parametrize("name", ATTENTIONS)


@pytest.fixture(params=LINEAR_FORMS)
def form(request):
    """The eager backend's two ways to do without gradients, whatever the map's size."""
    with settled(LINEAR_FORMS[request.param]):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@ATTEND
def test_many_positions_in_low_precision(name, dtype, form):
    """Also far from zero on average, where sums over 4096 positions of key times value leave the range of float16."""
    op = ATTENTIONS[name]
    for offset in (0, 6):
        tensors = leaves(linear_shapes(name, (1, 64, 64, 1, 8)), 0)
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
@pytest.mark.parametrize("trains", [False, True])
def test_no_tensor_is_larger_than_needed(name, trains, form):
    """Tokens by tokens only where there are few of them, and then no context of channels by channels."""
    for tokens, dim, most in ((1024, 8, 1024 * 8), (4, 64, 4 * 64)):
        tensors = {n: t.requires_grad_(trains) for n, t in leaves(linear_shapes(name, (1, tokens, 2, dim)), 0).items()}
        with Recorder() as recorder:
            ATTENTIONS[name](**tensors)
        assert recorder.largest <= 2 * most * 8


@pytest.mark.parametrize("backend", BACKENDS)
@ATTEND
def test_is_an_average_with_weights_of_pairs(name, backend):
    """softmax times softmax; (s q.k + 1 - mean over keys) / M; f(q).f(k), or relu(q).relu(k), over its sum; flows."""
    tensors = leaves(linear_shapes(name, (2, 30, 3, 4), (2, 20, 3, 4), 5), 0)
    q, k, v, *scale = tensors.values()
    pairs = partial(torch.einsum, "blnd,bmnd->blnm")
    if name == "efficient_attention":
        weights = pairs(q.softmax(-1), k.softmax(1))
    elif name == "inline_attention":
        weights = (pairs(q, k) / 2 + 1 - pairs(q, k).mean(-1, keepdim=True) / 2) / 20
    elif name == "relu_linear_attention":
        weights = pairs(q.relu(), k.relu())
        weights = weights * scale[0][:, None] / weights.sum(-1, keepdim=True).clamp(min=100)
    elif name == "flow_attention":
        flow = pairs(q.sigmoid(), k.sigmoid())
        weights = flow / flow.sum(-1, keepdim=True)
        competition = weights.sum(1, keepdim=True).clamp(max=1).softmax(-1) * 20
        allocation = ((flow / flow.sum(1, keepdim=True)).sum(-1, keepdim=True) * (30 / 20)).sigmoid()
        weights = weights * competition * allocation
    else:
        q, k = ((x.relu() + 1e-6) / F.softplus(scale[0]) for x in (q, k))
        q, k = (F.normalize((x**3).flatten(2), dim=-1) * x.flatten(2).norm(dim=-1, keepdim=True) for x in (q, k))
        weights = pairs(q.unflatten(-1, (3, 4)), k.unflatten(-1, (3, 4))) / 20
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    expected = torch.einsum("blnm,bmne->blne", weights, v)
    limit = (
        1e-5 if name == "flow_attention" else tolerances.OP[torch.float64]
    )  # without what is added to all sums there
    assert relative_error(ATTENTIONS[name](**tensors, backend=backend), expected) <= limit


GOLDENS = {"flow_attention_cv": ops.flow_attention, "l2vit_linear_attention": ops.relu_linear_attention}


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])  # on a CPU in Triton's interpreter
@pytest.mark.parametrize("file", GOLDENS)
def test_official_attention_with_all_gradients(file, backend, device):
    golden = np.load(GOLDEN / f"op_{file}.npz")
    dtype = torch.float32 if backend == "triton" else torch.float64
    arrays = {n: torch.from_numpy(golden[n]).to(device, dtype) for n in golden.files if golden[n].ndim}
    inputs = {n: t.requires_grad_() for n, t in arrays.items() if f"grad_{n}" in arrays and n != "out"}
    out = GOLDENS[file](**inputs, backend=backend)
    assert relative_error(out, arrays["out"]) <= tolerances.OP_GOLDEN_FORWARD
    out.backward(arrays["grad_out"])
    for n, t in inputs.items():
        assert relative_error(t.grad, arrays[f"grad_{n}"]) <= tolerances.OP_GOLDEN_GRADIENT, n


@pytest.mark.parametrize("backend", BACKENDS)
def test_official_flow_attention_with_projections(backend):
    """Its form for sequences leaves out some of what that for images adds, which no tolerance shows."""
    golden = json.loads((GOLDEN / "op_flow_attention.json").read_text())
    parameters = {n.removeprefix("attn."): t.float() for n, t in fill.fill(golden["keys"]).items()}

    def project(name, x):
        return F.linear(x, parameters[f"{name}_projection.weight"], parameters[f"{name}_projection.bias"])

    for run in (golden, golden["alt"]):
        x = fill.image(**run["input"])
        q, k, v = (project(name, x).unflatten(-1, (4, 8)) for name in ("query", "key", "value"))
        out = project("out", ops.flow_attention(q, k, v, backend=backend).flatten(2))
        assert relative_error(out.flatten()[:32], torch.tensor(run["logits"])) <= tolerances.OP_GOLDEN_FORWARD
        assert abs(out.norm() / run["logits_norm"] - 1) <= tolerances.OP_GOLDEN_FORWARD


@pytest.mark.parametrize("factor", [3, 6])
def test_focused_bears_large_scales(factor):
    """A power of tokens that are negative throughout underflows if taken as it is."""
    tensors = leaves(linear_shapes("focused_linear_attention", (1, 40, 2, 8)), 0, torch.float32)
    tensors["q"][:, :20] = -1
    tensors["focus_scale"] += 40
    results = results_and_gradients(lambda **t: ops.focused_linear_attention(**t, factor=factor), tensors)
    assert all(t.isfinite().all() for t in results.values())


def masked_problem(garbage):
    """Maps of 6 x 5, 3 x 4 and no tokens in the corner of 6 x 5, and those by themselves."""
    sizes = [(6, 5), (3, 4), (0, 0)]
    mask = torch.zeros(3, 6, 5, dtype=torch.bool)
    tensors = leaves(linear_shapes("efficient_attention", (3, 6, 5, 2, 4), dv=3), 0)
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


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])  # on a CPU in Triton's interpreter
def test_empty_batch_with_a_mask(backend):
    tensors = leaves(linear_shapes("efficient_attention", (0, 5, 6, 2, 4)), 0, torch.float32)
    mask = torch.ones(0, 5, 6, dtype=torch.bool)
    assert efficient_attention(**tensors, mask=mask, backend=backend).shape == (0, 5, 6, 2, 4)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])  # on a CPU in Triton's interpreter
@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (2, 30, 2, 32), (1, 700, 1, 32)])
@pytest.mark.parametrize("name", NAMES[2:])
def test_small_and_large_normalisers_in_float16(name, shape, backend):
    """Keys that are negative nearly throughout leave a normaliser by which a query must not be divided in float16, nor
    must sums be made of large ones."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(shape).half() for _ in range(3))
    given = {"focused_linear_attention": [torch.zeros(shape[-2:])], "relu_linear_attention": [torch.ones(shape[-2])]}
    more = given.get(name, [])
    for factor, shift in ((1, -2.5 * (shape[-1] > 1)), (30, 30)):
        pair = [(x * factor + shift).requires_grad_() for x in (q, k)]
        out = ATTENTIONS[name](*pair, v, *more, backend=backend)
        expected = ATTENTIONS[name](*(x.double() for x in (*pair, v, *more)), backend="reference")
        assert relative_error(out, expected) <= tolerances.OP[torch.float16]
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), pair))
