"""Region routing, and bi-level routing attention: against Python loops over regions, and the rules of choosing them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.gradients import compare, leaves
from visattn.ops import bilevel_routing_attention, decompose, region_routing


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
    """Bi-level routing attention with Python loops over regions; also the regions chosen, [B, N, regions, topk]."""
    batch, h, w, heads, dim = q.shape
    size = [-(-n // m) if rule == "mask" else max(1, n // m) for n, m in zip((h, w), n_win, strict=True)]
    boxes = [(slice(y, y + size[0]), slice(x, x + size[1])) for y in range(0, h, size[0]) for x in range(0, w, size[1])]
    scale = (heads * dim) ** -0.5 if scale is None else scale
    means = [torch.stack([t[:, y, x].mean((1, 2)) for y, x in boxes], 1).flatten(2) for t in (q, k)]
    if router_weight is not None:
        means = [F.linear(m, router_weight, router_bias) for m in means]
    means = means if diff else [m.detach() for m in means]
    out, listed = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=v.dtype), []
    for b in range(batch):
        for n in range(heads):
            channels = slice(n * dim, n * dim + dim) if per_head else slice(None)
            logits = scale * means[0][b, :, channels] @ means[1][b, :, channels].mT
            best, index = (t[:, :topk] for t in logits.sort(descending=True, stable=True))
            listed.append(index)
            for r, (y, x) in enumerate(boxes):
                keys, values = [], []
                for c, factor in zip(index[r], best[r].softmax(0), strict=True):
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
    return out, torch.stack(listed).unflatten(0, (batch, heads))


@pytest.mark.usefixtures("form")
@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=bilevel_problems())
def test_bilevel_routing_by_definition(problem):
    shapes, call, strided, seed = problem
    compare(
        lambda **tensors: bilevel_routing_attention(**tensors, **call),
        lambda **tensors: by_definition(**tensors, **call)[0],
        leaves(shapes, seed),
        strided,
    )


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


class _Bilevel(torch.nn.Module):
    def __init__(self, **call):
        super().__init__()
        self.call = call

    def forward(self, q, k, v):
        return bilevel_routing_attention(q, k, v, **self.call)


def _exported(module, b, h, w, dynamic=(0, 1, 2)):
    sizes = dict.fromkeys(dynamic, torch.export.Dim.AUTO)
    program = torch.export.export(module, _maps(b, h, w), dynamic_shapes=(sizes, sizes, sizes))
    return program, [str(node.target) for node in program.graph.nodes if "visattn" in str(node.target)]


def _maps(b, h, w):
    return tuple(leaves({"q": (b, h, w, 2, 4), "k": (b, h, w, 2, 4), "v": (b, h, w, 2, 3)}, 0).values())


def test_pooled_keys_have_no_form_for_every_size():
    program, _ = _exported(_Bilevel(n_win=2, topk=2, kv_pool="avg", kv_size=2), 2, 8, 12)
    with pytest.raises(NotImplementedError, match="no form for every size with kv_pool 'avg'"):
        decompose(program)


@pytest.mark.usefixtures("form")
def test_a_dynamic_batch_leaves_plain_operations_and_no_sort():
    """ONNX has no stable sort. Of regions that tie the first is taken, in the exported program too."""
    module = _Bilevel(n_win=3, topk=4)
    program, nodes = _exported(module, 2, 9, 7, dynamic=(0,))
    assert not nodes
    assert not any("sort" in str(node.target) for node in program.graph.nodes)
    for batch in (1, 3):
        q, k, v = _maps(batch, 9, 7)
        for keys in (k, torch.ones_like(k)):
            assert torch.equal(program.module()(q, keys, v), module(q, keys, v))


class _Routing(torch.nn.Module):
    """Of a map with itself."""

    def __init__(self, **call):
        super().__init__()
        self.call = call

    def forward(self, q):
        return region_routing(q, q, 2, **self.call)


def test_routing_with_dynamic_sizes_is_plain_pytorch():
    module = _Routing(region_size=(3, 2))
    sizes = {i: torch.export.Dim("bhw"[i], min=6 if i else 1, max=64) for i in range(3)}
    program = torch.export.export(module, _maps(2, 9, 7)[:1], dynamic_shapes=(sizes,))
    assert not [node for node in program.graph.nodes if "visattn" in str(node.target)]
    for size in ((2, 9, 7), (1, 6, 6), (3, 33, 47)):
        (index, weight), (expected, weights) = (run(_maps(*size)[0]) for run in (program.module(), module))
        assert torch.equal(index, expected)
        torch.testing.assert_close(weight, weights)


def test_routing_among_a_number_of_regions_has_no_form_for_every_size():
    with pytest.raises(NotImplementedError, match="no form for every size with n_win"):
        torch.export.export(
            _Routing(n_win=3), _maps(2, 9, 7)[:1], dynamic_shapes=(dict.fromkeys((1, 2), torch.export.Dim.AUTO),)
        )
