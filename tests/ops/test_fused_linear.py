"""Products of linear attention and the attentions made of them, in Triton: on a CPU in its interpreter."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests import tolerances
from tests.ops.cases import linear_shapes as shapes_of
from tests.ops.gradients import Recorder, compare, leaves, results_and_gradients
from tests.ops.test_linear import ATTEND, ATTENTIONS, masked_problem
from tests.tolerances import relative_error
from visattn.ops import BackendError, efficient_attention, explain
from visattn.ops.fused import linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = pytest.mark.parametrize(
    ("dtype", "views"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, True)],
    ids=["float32-plain", "float32-strided", "float16-strided"],
)


def on_device(tensors):
    return {name: t.to(DEVICE) for name, t in tensors.items()}


def outer_reference(k, v):
    return torch.einsum("bmnd,bmne->bnde", k, v)


def apply_reference(q, context):
    return torch.einsum("blnd,bnde->blne", q, context)


def strided(x):
    """x as a slice of a tensor that lies heads before positions: no stride is contiguous but the channels'."""
    return torch.cat([x, x], -1).transpose(1, -2).contiguous().transpose(1, -2)[..., : x.shape[-1]]


PRODUCTS = {
    "one head": (1, 40, 1, 32, 32),
    "head dim 24": (2, 37, 3, 24, 24),
    "wider than a block": (1, 18, 2, 150, 72),
    "one position": (2, 1, 2, 16, 48),
    "one channel": (1, 20, 2, 1, 3),
    "several parts": (1, 600, 1, 5, 7),
}


@pytest.mark.parametrize("size", PRODUCTS.values(), ids=PRODUCTS)
@FORMS
def test_products_match_their_definitions(size, views, dtype, poisoned_empty):
    b, m, n, d, e = size
    for op, reference, shapes in (
        (linear.outer, outer_reference, {"k": (b, m, n, d), "v": (b, m, n, e)}),
        (linear.apply, apply_reference, {"q": (b, m, n, d), "context": (b, n, d, e)}),
    ):
        tensors = on_device(leaves(shapes, 0, dtype))
        expected = results_and_gradients(reference, {name: t.double() for name, t in tensors.items()})
        got = results_and_gradients(
            lambda *, op=op, **t: op(*map(strided, t.values()) if views else t.values()), tensors
        )
        for part, value in expected.items():
            assert relative_error(got[part], value) <= tolerances.OP[dtype], (op, part)


def test_contexts_are_float32_and_sums_stay_in_range():
    k = torch.full((1, 300, 1, 4), 200.0, dtype=torch.float16, device=DEVICE)
    context = linear.outer(k, k)
    assert context.dtype == torch.float32
    assert (context == 300 * 200.0**2).all()  # far above what float16 holds


@pytest.mark.parametrize("op", [linear.outer, linear.apply])
def test_second_derivatives(op):
    """Not by gradcheck, which wants float64: against those of the definition."""
    other = (2, 9, 3, 5) if op is linear.outer else (2, 3, 4, 5)
    tensors = on_device(leaves({"x": (2, 9, 3, 4), "y": other}, 0, torch.float32))

    def second(run, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in tensors.values()]
        grads = torch.autograd.grad(run(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    reference = outer_reference if op is linear.outer else apply_reference
    for got, expected in zip(second(op, torch.float32), second(reference, torch.float64), strict=True):
        assert relative_error(got, expected) <= 2 * tolerances.OP[torch.float32]


@pytest.mark.parametrize(
    ("op", "shapes", "error", "message"),
    [
        (linear.outer, [(1, 4, 2, 8), (1, 5, 2, 8)], ValueError, r"expected k \[B, M, N, D\].*\(1, 5, 2, 8\)"),
        (linear.outer, [(1, 4, 2, 8), (4, 2, 8)], ValueError, r"v \[B, M, N, E\]"),
        (linear.apply, [(1, 4, 2, 8), (1, 2, 7, 8)], ValueError, r"context \[B, N, D, E\].*\(1, 2, 7, 8\)"),
        (linear.apply, [(4, 2, 8), (1, 2, 8, 8)], ValueError, r"expected q \[B, L, N, D\]"),
    ],
)
def test_mistaken_shapes_are_named(op, shapes, error, message):
    with pytest.raises(error, match=message):
        op(*map(torch.zeros, shapes))


def test_mistaken_dtypes_are_named():
    with pytest.raises(TypeError, match=r"one dtype, got torch.float32 and torch.float16"):
        linear.outer(torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8).half())


@pytest.mark.parametrize("views", [False, True], ids=["plain", "strided"])
def test_opcheck(views):
    q, context = torch.randn(2, 9, 3, 24, device=DEVICE), torch.randn(2, 3, 24, 5, device=DEVICE)
    q = strided(q) if views else q
    torch.library.opcheck(torch.ops.visattn.linear_outer.default, (q, q))
    torch.library.opcheck(torch.ops.visattn.linear_apply.default, (q, context))


def test_products_are_counted():
    q, context = torch.randn(2, 9, 3, 4, device=DEVICE), torch.randn(2, 3, 4, 5, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        linear.apply(q, context)
    assert counter.get_total_flops() == 2 * 2 * 9 * 3 * 4 * 5
    with FlopCounterMode(display=False) as counter:
        linear.outer(q, q)
    assert counter.get_total_flops() == 2 * 2 * 9 * 3 * 4 * 4


ATTENDED = {  # q, k and the values' channels
    "one axis": ((2, 70, 2, 8), (2, 70, 2, 8), 8),
    "head dim 24": ((2, 7, 9, 3, 24), (2, 7, 9, 3, 24), 24),
    "other keys": ((1, 16, 3, 1, 24), (1, 3, 4, 5, 1, 24), 3),
    "few keys": ((1, 5, 2, 16), (1, 1, 3, 2, 16), 16),
}


@pytest.mark.parametrize(("q", "k", "dv"), ATTENDED.values(), ids=ATTENDED)
@ATTEND
@FORMS
def test_attentions_match_reference(name, dtype, q, k, dv, views):
    run = ATTENTIONS[name]
    tensors = on_device(leaves(shapes_of(name, q, k, dv), 0, dtype))
    compare(partial(run, backend="triton"), partial(run, backend="reference"), tensors, views)


@ATTEND
def test_attentions_in_bfloat16(name, poisoned_empty):
    """The interpreter does not know bfloat16: kernels widen what they load."""
    run, size = ATTENTIONS[name], (2, 56, 56, 2, 24) if DEVICE == "cuda" else (2, 9, 13, 2, 24)
    tensors = on_device(leaves(shapes_of(name, size), 0, torch.bfloat16))
    compare(partial(run, backend="triton"), partial(run, backend="reference"), tensors, True)


@ATTEND
def test_many_positions_in_float16(name):
    """Far from zero on average: sums over 4096 positions of key times value leave the range of float16."""
    tensors = leaves(shapes_of(name, (1, 64, 64, 1, 8)), 0)
    tensors = on_device({n: (t + 6 * (n in ("k", "v"))).half() for n, t in tensors.items()})
    run = partial(ATTENTIONS[name], backend="triton")
    got = results_and_gradients(run, tensors)
    assert all(t.isfinite().all() for t in got.values())
    expected = ATTENTIONS[name](**{n: t.double() for n, t in tensors.items()}, backend="reference")
    assert relative_error(got["result 0"], expected) <= tolerances.OP[torch.float16]


@pytest.mark.parametrize("garbage", [0.0, 1e4, float("nan")])
@pytest.mark.parametrize("other", [False, True], ids=["same map", "other keys"])
def test_masks(other, garbage):
    """Positions without a token take no part, whatever they hold; a sample without any gives 0."""
    tensors, mask, _ = masked_problem(garbage)
    if other:  # queries of another map are all answered
        tensors["q"] = torch.randn(3, 7, 2, 4, dtype=torch.float64)
    tensors, mask = on_device({n: t.float() for n, t in tensors.items()}), mask.to(DEVICE)
    run = partial(efficient_attention, mask=mask)
    got = results_and_gradients(partial(run, backend="triton"), tensors)
    expected = results_and_gradients(partial(run, backend="reference"), {n: t.double() for n, t in tensors.items()})
    for part, value in expected.items():
        if not other or part in ("grad k", "grad v"):
            assert (got[part][~mask] == 0).all()
        assert (got[part][2] == 0).all()
        assert relative_error(got[part], value) <= tolerances.OP[torch.float32], part


@ATTEND
def test_results_repeat_bit_by_bit(name):
    tensors = on_device(leaves(shapes_of(name, (1, 26, 26, 1, 8)), 0, torch.float32))  # two parts
    runs = [results_and_gradients(partial(ATTENTIONS[name], backend="triton"), tensors) for _ in range(3)]
    for part, value in runs[0].items():
        assert all(torch.equal(run[part], value) for run in runs[1:]), part


@ATTEND
def test_no_tensor_is_larger_than_the_inputs(name):
    """Not one of tokens by tokens, and no copy of several inputs; feature maps are in float32."""
    tensors = on_device(leaves(shapes_of(name, (1, 512, 2, 8)), 0, torch.float16))
    with Recorder() as recorder:
        ATTENTIONS[name](**{n: t.requires_grad_() for n, t in tensors.items()}, backend="triton")
    assert recorder.largest <= 512 * 2 * 8 * 4


@ATTEND
def test_choice_of_backend(name):
    tensors = on_device(leaves(shapes_of(name, (1, 40, 2, 8)), 0, torch.float32))
    with explain() as decisions:
        ATTENTIONS[name](**tensors)
        ATTENTIONS[name](**{n: t[:, :2] if n in "qkv" else t for n, t in tensors.items()})  # wide heads, few tokens
    assert [d.backend for d in decisions] == ["triton" if DEVICE == "cuda" else "eager", "eager"]
    assert decisions[1].reasons["triton"] == "few tokens of wide heads cost less token by token"
    with pytest.raises(BackendError, match=r"float32, float16 and bfloat16, got torch.float64"):
        ATTENTIONS[name](**{n: t.double() for n, t in tensors.items()}, backend="triton")
