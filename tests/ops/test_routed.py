"""Routed attention: backends against the reference, both forms of the eager one, and what it keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tolerances
from tests.ops.gradients import check, leaves
from tests.tolerances import relative_error
from visattn.ops import BackendError, bilevel_routing_attention, explain, routed_attention
from visattn.ops.geometry import Partition
from visattn.ops.registration import decompose
from visattn.ops.routed import eager

BACKENDS = ["eager", "reference"]  # Triton has tests of its own: no float64


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
    q, k = torch.randn(2, 2, 5, 4, 3, 7, dtype=torch.float64)
    axes = Partition(5, 2), Partition(4, 3)
    call = eager._Call(q, k, k, torch.randint(6, (2, 6, 4)), axes, axes, True)
    copies = call.take(call.k, call.k_rows, slice(None))
    x, by_row = torch.randn_like(copies), torch.zeros_like(call.k)
    call.add(by_row, slice(None), x)
    maps = [call.k_map.map(rows, 3) for rows in (by_row, call.sum_by_product(call.lines(x)))]
    torch.testing.assert_close(*maps)
    torch.testing.assert_close((copies * x).sum(), (k * maps[0]).sum())


@pytest.mark.parametrize("chunk", [1, 2000, 10**9])
def test_chunks_do_not_change_the_result(monkeypatch, chunk):
    monkeypatch.setattr(eager, "_DENSE", 0)
    monkeypatch.setattr(eager, "_CHUNK", chunk)
    check(routed_attention, PLAIN, "eager")


def test_only_the_inputs_are_kept_for_the_backward_pass(monkeypatch):
    """The official way keeps `topk` copies of keys and values."""
    monkeypatch.setattr(eager, "_DENSE", 0)
    inputs = [torch.randn(1, 12, 12, 2, 8, requires_grad=True) for _ in range(3)]
    index = torch.randint(9, (1, 1, 9, 4))
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        routed_attention(*inputs, index, 4)
    assert sum(kept.values()) == sum(t.untyped_storage().nbytes() for t in [*inputs, index])


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
        ({"backend": "cuda"}, BackendError, "expected backend 'auto', 'triton', 'eager', 'reference'; got 'cuda'"),
    ],
)  # fmt: skip
def test_mistakes_are_named(change, error, message):
    q, k, v = torch.zeros(3, 1, 4, 6, 2, 4)
    index = torch.zeros(1, 1, 6, 2).long()
    with pytest.raises(error, match=message):
        routed_attention(**{"q": q, "k": k, "v": v, "index": index, "region_size": 2, **change})


def test_backend_is_explained():
    q, k, v = torch.randn(3, 1, 4, 4, 1, 4)
    with explain() as decisions:
        bilevel_routing_attention(q, k, v, 2, 1)
    assert [(d.op, d.backend) for d in decisions] == [("bilevel_routing_attention", "eager")]


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("wrong", [-1, 6, 10**12])
@pytest.mark.usefixtures("form")
def test_a_list_of_what_is_no_region_is_refused(wrong, backend):
    q, k, v = torch.zeros(3, 1, 4, 6, 2, 4)
    index = torch.zeros(1, 1, 6, 2).long()
    index[0, 0, 3, 1] = wrong
    with pytest.raises(ValueError, match="expected index of key regions from 0 to 5, got"):
        routed_attention(q, k, v, index, 2, backend=backend)


def test_lists_are_not_looked_at_where_they_have_no_values():
    q, k, v = torch.zeros(3, 1, 4, 6, 2, 4, device="meta")
    index = torch.zeros(1, 1, 6, 2, device="meta").long()
    assert routed_attention(q, k, v, index, 2).shape == q.shape
    q, k, v, index = (torch.zeros_like(x, device="cpu") for x in (q, k, v, index))
    assert torch.func.vmap(lambda i: routed_attention(q, k, v, i, 2))(index.expand(3, *index.shape)).shape[0] == 3
    torch.compile(lambda *x: routed_attention(*x, 2), backend="aot_eager", fullgraph=True)(q, k, v, index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("form")
def test_autocast_casts_queries_keys_and_values(backend, weighted, dtype):
    shapes, call, _, seed = PLAIN
    inputs = {n: t.requires_grad_() for n, t in leaves(shapes, seed, dtype).items() if weighted or n != "weight"}
    with torch.autocast("cpu", torch.bfloat16):
        out = routed_attention(**inputs, **call, backend=backend)
    grads = torch.autograd.grad(out.float().square().sum(), list(inputs.values()))
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [dtype] * len(inputs)
    cast = {n: t.bfloat16() if n in ("q", "k", "v") else t for n, t in inputs.items()}
    assert torch.equal(out, routed_attention(**cast, **call, backend=backend))


@pytest.mark.parametrize("mask_border", [False, True])
@pytest.mark.parametrize("lists", [1, 3])
@pytest.mark.usefixtures("form")
def test_one_nan_key_stays_in_its_image_and_head(lists, mask_border):
    q, k, v = torch.randn(3, 2, 9, 7, 3, 4)
    k[1, 4, 4, 2] = float("nan")
    index = torch.arange(12).expand(2, lists, 12, 12)
    found = routed_attention(q, k, v, index, (3, 2), mask_border=mask_border).isnan().any(-1).flatten(1, 2).any(1)
    assert found.tolist() == [[False, False, False], [False, False, True]]


@pytest.mark.parametrize("lists", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("form")
def test_no_images(backend, lists):
    q, k, v = (torch.randn(0, 9, 7, 2, d, requires_grad=True) for d in (4, 4, 3))
    weight = torch.zeros(0, lists, 12, 2, requires_grad=True)
    index = weight.detach().long()
    for factors in (None, weight):
        out = routed_attention(q, k, v, index, (3, 2), weight=factors, backend=backend)
        assert out.shape == (0, 9, 7, 2, 3)
        assert torch.autograd.grad(out.sum(), k)[0].shape == k.shape


@pytest.mark.parametrize("change", [{"k": None}, {"index": None}, {"index": [[0]]}, {"weight": torch.zeros(1).bool()}])
def test_what_is_no_fitting_tensor_is_refused(change):
    q, k, v = torch.zeros(3, 1, 4, 6, 2, 4)
    call = {"q": q, "k": k, "v": v, "index": torch.zeros(1, 1, 6, 2).long(), "region_size": 2, **change}
    with pytest.raises(TypeError, match=f"expected {next(iter(change))} "):
        routed_attention(**call)


class _Routed(torch.nn.Module):
    def __init__(self, mask_border):
        super().__init__()
        self.mask_border = mask_border

    def forward(self, q, k, v, index, weight):
        return routed_attention(q, k, v, index, (3, 2), (2, 2), weight, self.mask_border)


@pytest.mark.parametrize(("mask_border", "lists"), [(True, 1), (False, 2)])
def test_decomposition_is_right_for_every_size(mask_border, lists):
    def inputs(b, h, w, hk, wk):
        number, kv_number = -(-h // 3) * -(-w // 2), -(-hk // 2) * -(-wk // 2)
        shapes = {"q": (b, h, w, 2, 4), "k": (b, hk, wk, 2, 4), "v": (b, hk, wk, 2, 3), "w": (b, lists, number, 2)}
        q, k, v, weight = leaves(shapes, 0).values()
        return q, k, v, torch.arange(weight.numel()).view(weight.shape) % kv_number, weight

    module, auto = _Routed(mask_border), torch.export.Dim.AUTO
    sizes, index = dict.fromkeys(range(3), auto), dict.fromkeys((0, 2), auto)
    program = torch.export.export(module, inputs(2, 10, 9, 7, 8), dynamic_shapes=(sizes, sizes, sizes, index, index))
    assert any("visattn" in str(node.target) for node in program.graph.nodes)
    program = decompose(program)
    assert not any("visattn" in str(node.target) for node in program.graph.nodes)
    for size in ((2, 10, 9, 7, 8), (1, 3, 4, 5, 6), (3, 33, 47, 3, 9)):
        assert relative_error(program.module()(*inputs(*size)), module(*inputs(*size))) <= tolerances.OP[torch.float64]
