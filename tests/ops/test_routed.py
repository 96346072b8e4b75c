"""Routed attention and region routing: backends against the reference, the rules of cutting and choosing regions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tolerances
from tests.ops.gradients import check, compare, leaves
from tests.tolerances import relative_error
from visattn.ops import BackendError, bilevel_routing_attention, explain, region_routing, routed_attention
from visattn.ops.geometry import Partition
from visattn.ops.routed import eager
from visattn.ops.routed.op import dispatcher
from visattn.ops.routed.routing import token_table

BACKENDS = [backend.name for backend in dispatcher.backends]


@pytest.fixture(params=["masked", "listed"])
def form(request, monkeypatch):
    """Both forms of the eager backend, whatever the map's size."""
    monkeypatch.setattr(eager, "_DENSE", {"masked": 10**9, "listed": 0}[request.param])


@st.composite
def problems(draw):
    """Any call of `routed_attention`: lists with repetitions, per head or not, maps of different sizes, factors."""
    heads, dim, batch = draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 24])), draw(st.integers(1, 2))
    size, kv_size, region, kv_region = ([draw(st.integers(1, n)) for _ in range(2)] for n in (9, 9, 4, 4))
    regions = [-(-h // a) * -(-w // b) for (h, w), (a, b) in ((size, region), (kv_size, kv_region))]
    lists = (batch, draw(st.sampled_from([1, heads])), regions[0], draw(st.integers(1, min(5, regions[1]) + 1)))
    seed = draw(st.integers(0, 2**31))
    shapes = {
        "q": (batch, *size, heads, dim),
        "k": (batch, *kv_size, heads, dim),
        "v": (batch, *kv_size, heads, draw(st.sampled_from([dim, 3]))),
    }
    if draw(st.booleans()):
        shapes["weight"] = lists
    call = {
        "index": torch.randint(regions[1], lists, generator=torch.Generator().manual_seed(seed)),
        "region_size": region,
        "kv_region_size": kv_region,
        "mask_border": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.7])),
    }
    return shapes, call, draw(st.booleans()), seed


@pytest.mark.usefixtures("form")
@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=problems())
def test_matches_reference(problem):
    check(routed_attention, problem, "eager")


@pytest.mark.slow
@pytest.mark.usefixtures("form")
@settings(max_examples=4000, deadline=None)
@given(problem=problems())
def test_matches_reference_long(problem):
    check(routed_attention, problem, "eager")


PLAIN = (
    {"q": (2, 11, 10, 2, 24), "k": (2, 9, 7, 2, 24), "v": (2, 9, 7, 2, 24), "weight": (2, 2, 12, 3)},
    {"index": torch.arange(144).view(2, 2, 12, 3) % 15, "region_size": [4, 3], "kv_region_size": [2, 3]},
    True,
    0,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_border", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.usefixtures("form", "poisoned_empty")
def test_low_precision(weighted, mask_border, dtype):
    shapes, call, *rest = PLAIN
    shapes = {n: s for n, s in shapes.items() if weighted or n != "weight"}
    check(routed_attention, (shapes, {**call, "mask_border": mask_border}, *rest), "eager", dtype)


@pytest.mark.parametrize("mask_border", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("form")
def test_gradcheck(backend, weighted, mask_border):
    shapes = {"q": (1, 2, 3, 2, 2), "k": (1, 3, 2, 2, 2), "v": (1, 3, 2, 2, 1), "weight": (1, 1, 2, 2)}
    tensors = [t.requires_grad_() for t in leaves(shapes, 0).values()][: None if weighted else 3]
    index = torch.tensor([[[[0, 1], [1, 1]]]])

    def op(q, k, v, weight=None):
        return routed_attention(q, k, v, index, [2, 2], [2, 2], weight, mask_border, backend=backend)

    assert torch.autograd.gradcheck(op, tensors)
    assert torch.autograd.gradgradcheck(op, tensors)


def test_gradients_are_added_up_in_one_order_everywhere():
    """What runs on accelerators, on a CPU; and both ways are the transpose of the copy."""
    axes = Partition(5, 2), Partition(4, 3)
    table = token_table(axes, "cpu")
    inside = (table < 20)[..., None]
    listed = torch.randint(6, (2, 12))
    args = listed, table.where(inside[..., 0], 0), 20
    x = torch.randn(2, 12, 6, 7, dtype=torch.float64) * inside[listed]
    x = x.flatten(1, 2)
    by_row = eager._Add.apply(x, *args)
    torch.testing.assert_close(by_row, eager._add_by_product(x, *args))
    y = torch.randn(2, 20, 7, dtype=torch.float64)
    torch.testing.assert_close((eager._Take.apply(y, *args[:2]) * x).sum(), (y * by_row).sum())


@pytest.mark.usefixtures("form")
def test_training_is_deterministic():
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 14, 14, 2, 8))
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(10):
            out = bilevel_routing_attention(q, k, v, 7, 3)
            runs.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@st.composite
def bilevel_problems(draw):
    """Any call of `bilevel_routing_attention`."""
    heads, dim = draw(st.integers(1, 3)), draw(st.sampled_from([2, 24]))
    n_win, size = ([draw(st.integers(1, n)) for _ in range(2)] for n in (5, 11))
    pool = draw(st.sampled_from(["none", "avg", "max", "ada_avg", "ada_max"]))
    if pool != "none":  # regions that fill the map
        size = [n * draw(st.integers(2, 3)) for n in n_win]
    shape = (draw(st.integers(1, 2)), *size, heads, dim)
    shapes = {"q": shape, "k": shape, "v": (*shape[:-1], draw(st.sampled_from([dim, 3])))}
    if draw(st.booleans()):
        shapes["router_weight"] = (heads * dim, heads * dim)
        if draw(st.booleans()):
            shapes["router_bias"] = (heads * dim,)
    call = {
        "n_win": n_win,
        "topk": draw(st.integers(1, 9)),
        "rule": draw(st.sampled_from(["mask", "zero"])),
        "per_head": draw(st.booleans()),
        "soft": True,  # so that gradients reach everything
        "diff": True,
        "kv_pool": pool,
        "kv_size": draw(st.integers(1, 2)),
        "scale": draw(st.sampled_from([None, 0.3])),
    }
    return shapes, call, draw(st.booleans()), draw(st.integers(0, 2**31))


def by_definition(q, k, v, n_win, topk, rule, per_head, soft, diff, kv_pool, kv_size, scale,
                  router_weight=None, router_bias=None):  # fmt: skip
    """Bi-level routing attention with Python loops over regions."""
    batch, h, w, heads, dim = q.shape
    size = [-(-n // m) if rule == "mask" else max(1, n // m) for n, m in zip((h, w), n_win, strict=True)]
    boxes = [(slice(y, y + size[0]), slice(x, x + size[1])) for y in range(0, h, size[0]) for x in range(0, w, size[1])]
    scale = (heads * dim) ** -0.5 if scale is None else scale
    means = [torch.stack([t[:, y, x].mean((1, 2)) for y, x in boxes], 1).flatten(2) for t in (q, k)]
    if router_weight is not None:
        means = [F.linear(m, router_weight, router_bias) for m in means]
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=v.dtype)
    for b in range(batch):
        for n in range(heads):
            channels = slice(n * dim, n * dim + dim) if per_head else slice(None)
            logits = scale * means[0][b, :, channels] @ means[1][b, :, channels].mT
            chosen = logits.topk(min(topk, len(boxes)))
            for r, (y, x) in enumerate(boxes):
                keys, values = [], []
                for c, factor in zip(chosen.indices[r], chosen.values[r].softmax(0), strict=True):
                    for t, found in ((k, keys), (v, values)):
                        tokens = t[b, boxes[c][0], boxes[c][1], n].permute(2, 0, 1)
                        if kv_pool != "none":
                            name = {"avg": "avg_pool2d", "max": "max_pool2d", "ada_avg": "adaptive_avg_pool2d",
                                    "ada_max": "adaptive_max_pool2d"}[kv_pool]  # fmt: skip
                            tokens = getattr(F, name)(tokens[None], kv_size)[0]
                        elif rule == "zero":
                            tokens = F.pad(tokens, (0, size[1] - tokens.shape[2], 0, size[0] - tokens.shape[1]))
                        found.append(tokens.flatten(1).T * (factor if soft else 1))
                weights = (scale * q[b, y, x, n] @ torch.cat(keys).T).softmax(-1)
                out[b, y, x, n] = weights @ torch.cat(values)
    return out


@pytest.mark.usefixtures("form")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=bilevel_problems())
def test_bilevel_routing_by_definition(problem):
    shapes, call, strided, seed = problem
    compare(
        lambda **tensors: bilevel_routing_attention(**tensors, **call),
        lambda **tensors: by_definition(**tensors, **call),
        leaves(shapes, seed),
        strided,
    )


def test_all_regions_is_attention():
    q, k, v = torch.randn(3, 2, 5, 6, 2, 8, dtype=torch.float64)
    flat = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*flat, scale=0.25).transpose(1, 2).reshape(q.shape)
    for n_win in (2, 3, 100):
        out = bilevel_routing_attention(q, k, v, n_win, 10**6)
        assert relative_error(out, expected) <= tolerances.OP[torch.float64]


def test_routing_is_not_differentiable_unless_asked():
    q, k = (t.requires_grad_() for t in torch.randn(2, 1, 6, 6, 2, 4))
    assert not region_routing(q, k, 2, n_win=3)[1].requires_grad
    assert region_routing(q, k, 2, n_win=3, diff=True)[1].requires_grad


def test_fewer_regions_than_topk():
    """Where their number is only wished for, all are taken."""
    q, k = torch.randn(2, 1, 6, 7, 2, 4)
    assert region_routing(q, k, 100, n_win=(2, 3))[0].sort()[0].equal(torch.arange(6).expand(1, 1, 6, 6))


def test_of_regions_that_tie_the_first_is_taken():
    q = k = torch.ones(1, 6, 6, 1, 4)
    index, weight = region_routing(q, k, 3, region_size=2)
    assert torch.equal(index, torch.arange(3).expand(1, 1, 9, 3))
    torch.testing.assert_close(weight, torch.full((1, 1, 9, 3), 1 / 3))


def test_means_leave_out_what_is_not_there():
    """A border region of one token is as much like the queries as a full one."""
    q, k = torch.ones(1, 3, 3, 1, 4), torch.zeros(1, 3, 3, 1, 4)
    k[:, 2, 2], k[:, :2, :2] = 1.0, 0.9
    index, _ = region_routing(q, k, 2, region_size=2)
    assert torch.equal(index, torch.tensor([3, 0]).expand(1, 1, 4, 2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"region_size": 0}, ValueError, r"expected region_size of two ints from 1, got \[0, 0\]"),
        ({"region_size": (2, 2, 2)}, ValueError, "expected region_size of one int or 2"),
        ({"index": torch.zeros(1, 1, 8, 2).long()}, ValueError, r"expected index \(1, '1 or 2', 6, 'topk'\)"),
        ({"index": torch.zeros(1, 1, 6, 0).long()}, ValueError, "at least one"),
        ({"index": torch.zeros(1, 1, 6, 2)}, ValueError, "int64"),
        ({"weight": torch.zeros(1, 1, 6, 3)}, ValueError, r"expected weight like index \(1, 1, 6, 2\)"),
        ({"k": torch.zeros(1, 4, 6, 2, 5)}, ValueError, "expected q"),
        ({"v": torch.zeros(1, 4, 5, 2, 4)}, ValueError, r"expected v \[B, Hk, Wk, N, Dv\]"),
        ({"v": torch.zeros(1, 4, 6, 2, 4, dtype=torch.float64)}, TypeError, "one floating dtype"),
        ({"backend": "cuda"}, BackendError, "expected backend 'auto', 'eager', 'reference'; got 'cuda'"),
    ],
)  # fmt: skip
def test_mistakes_are_named(change, error, message):
    q, k, v = torch.zeros(3, 1, 4, 6, 2, 4)
    index = torch.zeros(1, 1, 6, 2).long()
    with pytest.raises(error, match=message):
        routed_attention(**{"q": q, "k": k, "v": v, "index": index, "region_size": 2, **change})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"topk": 10, "region_size": 2}, "expected topk from 1 to the number of key regions 9, got 10"),
        ({"topk": 0, "n_win": 3}, "expected topk from 1"),
        ({"topk": 1}, "expected one of region_size and n_win"),
        ({"topk": 1, "n_win": 3, "rule": "pad"}, "rule 'mask' or 'zero'"),
    ],
)
def test_mistakes_of_routing_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        region_routing(torch.zeros(1, 6, 6, 1, 4), torch.zeros(1, 6, 6, 1, 4), **call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"topk": 0}, "topk >= 1"),
        ({"n_win": 0}, "expected n_win of two ints from 1"),
        ({"kv_pool": "avg", "kv_size": 4}, r"kv_size from 1 to the size of a region \[3, 3\], got 'avg' and 4"),
        ({"kv_pool": "mean"}, "expected kv_pool 'none'"),
        ({"kv_pool": "avg"}, "expected regions that fill the map to pool keys"),
    ],
)
def test_mistakes_of_bilevel_routing_are_named(call, message):
    q, k, v = torch.zeros(3, 1, 7, 7, 1, 4)
    with pytest.raises(ValueError, match=message):
        bilevel_routing_attention(q, k, v, **{"n_win": 3, "topk": 1, **call})


def test_backend_is_explained():
    q, k, v = torch.randn(3, 1, 4, 4, 1, 4)
    with explain() as decisions:
        bilevel_routing_attention(q, k, v, 2, 1)
    assert [(d.op, d.backend) for d in decisions] == [("routed_attention", "eager")]
