"""What every op keeps to, case by case: values, gradients, dtypes, borders, mistakes, tracers, costs.

Triton has tests of its own for values: its kernels know no float64.
"""

import contextlib
import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from tests import tolerances
from tests.ops.cases import (
    ATTENTIONS,
    CASES,
    MAPS,
    PROBLEMS,
    SIZE,
    TABLES,
    WITH_LSE,
    agent_shapes,
    aggregated_shapes,
    gated_shapes,
    settled,
)
from tests.ops.gradients import check, compare, kept_bytes, leaves, results_and_gradients
from tests.tolerances import finite, relative_error
from visattn import ops
from visattn.ops import BackendError, dispatch, explain, registration
from visattn.ops.geometry import Pooled
from visattn.ops.registration import decompose

# What an op cannot do, and why.
REFUSED = {
    (name, "export_with_dynamic_sizes"): "its lists of regions are inputs, as many as the map has regions"
    for name in ("routed", "routed with lse")
}
# In graphs for every batch, sums are taken in another order.
REORDERED = ["convolution"]
BACKENDS = ["eager", "reference"]
FLOAT64 = tolerances.OP[torch.float64]
ATTEND = pytest.mark.parametrize("name", ATTENTIONS)
EVERY = pytest.mark.parametrize("name", CASES)
ON_MAPS = pytest.mark.parametrize("name", [name for name in (*ATTENTIONS, *MAPS) if CASES[name].traced])
TRACED = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.traced])
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
LOW = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _known(request):
    name, test = getattr(request.node, "callspec", None), request.node.originalname.removeprefix("test_")
    name = name and name.params.get("name")
    if (name, test) in REFUSED:
        pytest.skip(REFUSED[name, test])


def all_forms(name):
    """Settings of each way that the eager backend has."""
    return CASES[name].forms.values()


def assert_same(found, expected, limit=FLOAT64):
    """Results and gradients, relative to the largest one: some are zero but for rounding."""
    assert found.keys() == expected.keys()
    largest = max(1, *(finite(t, t)[1].norm().item() for t in expected.values()))
    for name, value in expected.items():
        assert found[name].shape == value.shape
        got, value = finite(found[name], value)
        error = (got - value).norm()
        assert error <= limit * largest, f"{name}: {error} of {largest}"


# Values


def search(name, examples, **options):
    @settings(max_examples=examples, deadline=None, **options)
    @given(problem=PROBLEMS[name], form=st.sampled_from(list(CASES[name].forms)))
    def run(problem, form):
        with settled(CASES[name].forms[form]):
            check(CASES[name].op, problem, "eager")

    run()


@pytest.mark.parametrize("name", PROBLEMS)
def test_matches_reference(name):
    search(name, CASES[name].examples, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_matches_reference_long(name):
    search(name, 4000)


@pytest.mark.parametrize(("heads", "dim"), [(1, 24), (1, 1), (3, 24)], ids=str)
@ATTEND
def test_heads_and_channels(name, heads, dim):
    case = CASES[name]
    if dim == 1 and case.op is ops.aggregated_attention:
        pytest.skip("what is normalised then has no gradient but for rounding")
    for form in all_forms(name):
        with settled(form):
            runs = (partial(case.run, backend=backend) for backend in BACKENDS)
            compare(*runs, case.inputs((*SIZE[:3], heads, dim)))


WHOLE = {
    "neighborhood": {"kernel_size": (5, 6)},
    "window": {"window_size": (5, 6)},
    "halo": {"block_size": 6, "halo_size": 6},
    "bilevel": {"n_win": (2, 3), "topk": 10**6, "scale": 8**-0.5},
}


@EACH_BACKEND
@pytest.mark.parametrize("name", WHOLE)
def test_of_the_whole_map_is_attention(name, backend):
    q, k, v = torch.randn(3, 2, 5, 6, 2, 8, dtype=torch.float64)
    flat = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).reshape(q.shape)
    assert relative_error(CASES[name].op(q, k, v, **WHOLE[name], backend=backend), expected) <= FLOAT64


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("name", WITH_LSE)
def test_log_sum_exps(name, backend, device):
    """In float32 at least, next to the same result."""
    case = CASES[name]
    inputs = {n: t.to(device) for n, t in case.derive(**case.inputs(dtype=torch.float16)).items()}
    out, lse = case.op(**inputs, **case.call, return_lse=True, backend=backend)
    assert lse.dtype == torch.float32
    assert lse.shape == out.shape[:-1]
    plain = case.op(**inputs, **case.call, backend=backend)
    assert relative_error(out, plain) <= tolerances.OP[torch.float16]


@pytest.mark.parametrize("name", ["halo", "routed", "mix"])
def test_only_the_inputs_are_kept_for_the_backward_pass(name):
    """Not copies of the keys and values of every window or list, nor weights."""
    case = CASES[name]
    inputs = {n: t.detach() for n, t in case.derive(**case.inputs((1, 36, 36, 2, 8), torch.float32)).items()}
    inputs = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
    kept, _ = kept_bytes(partial(case.op, **case.call), **inputs)
    assert kept == sum(t.untyped_storage().nbytes() for t in inputs.values())


@LOW
@ATTEND
def test_low_precision(name, dtype, poisoned_empty):
    case = CASES[name]
    for backend, form in [*(("eager", form) for form in all_forms(name)), ("reference", {})]:
        with settled(form):
            runs = (partial(case.run, backend=b) for b in (backend, "reference"))
            compare(*runs, case.inputs((2, 13, 11, 2, 24), dtype), strided=True)


@EVERY
def test_strides_make_no_difference(name):
    case = CASES[name]
    for more in [{"backend": b} for b in BACKENDS] if name in ATTENTIONS else [{}]:
        found = (results_and_gradients(partial(case.run, **more), case.inputs(), strided) for strided in (True, False))
        assert_same(*found)


@EVERY
def test_gradcheck(name):
    """In every tensor, twice."""
    case = CASES[name]
    tensors, fixed = case.tensors(case.small), case.fixed(*case.small)
    if not case.smooth:
        tensors = {n: t.abs() + 0.1 for n, t in tensors.items()}  # not at the kink
    names, inputs = list(tensors), [t.requires_grad_() for t in tensors.values()]
    for more in [{"backend": b} for b in BACKENDS] if name in ATTENTIONS else [{}]:
        for form in all_forms(name) if more != {"backend": "reference"} else [{}]:

            def op(*given, more=more):
                return case.run(**dict(zip(names, given, strict=True)), **fixed, **more)

            with settled(form):
                assert torch.autograd.gradcheck(op, inputs, fast_mode=True)
                assert not case.twice or torch.autograd.gradgradcheck(op, inputs, fast_mode=True)


@ATTEND
def test_gradients_that_are_differentiated_are_the_same(name):
    """A backward pass may then be made in another way."""
    inputs = {n: t.requires_grad_(t.is_floating_point()) for n, t in CASES[name].inputs().items()}
    leaves = [t for t in inputs.values() if t.requires_grad]
    out = CASES[name].run(**inputs).square().sum()
    plain = torch.autograd.grad(out, leaves, retain_graph=True)
    for a, b in zip(torch.autograd.grad(out, leaves, create_graph=True), plain, strict=True):
        assert relative_error(a, b) <= FLOAT64


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@ON_MAPS
def test_empty_batch(name, backend, device):
    case = CASES[name]
    if name in MAPS and backend != "eager":
        pytest.skip("one form for all")
    more = {"backend": backend} if name in ATTENTIONS else {}
    given = (case.inputs((batch, *SIZE[1:]), torch.float32) for batch in (1, 0))
    single, inputs = ({n: t.to(device) for n, t in tensors.items()} for tensors in given)
    one, batched = results_and_gradients(partial(case.run, **more), single), case.axes(0)
    none = results_and_gradients(partial(case.run, **more), inputs)
    with torch.no_grad():
        none["result of inference"] = case.run(**inputs, **more)
    one["result of inference"] = one["result 0"]
    for part, value in none.items():
        if part.startswith("result") or part.removeprefix("grad ") in batched:
            assert value.shape == (0, *one[part].shape[1:])
        else:
            assert value.shape == one[part].shape
            assert (value == 0).all(), part


@EACH_BACKEND
@ATTEND
def test_nan_stays_in_its_image_and_head(name, backend):
    case = CASES[name]
    for axis, place in [(0, 0), (3, -2)] if case.heads else [(0, 0)]:
        axes = case.axes(axis)
        hurt = inputs = case.inputs()
        for n, t in inputs.items():
            if n in axes and t.is_floating_point():
                hurt = {**hurt, n: t.index_fill(axes[n], torch.tensor(1), torch.nan)}

        def healthy(t, axis):
            return t.select(axis, 0)

        for form in all_forms(name):
            with settled(form):
                run = partial(case.run, backend=backend)
                expected, found = (results_and_gradients(run, given) for given in (inputs, hurt))
                with torch.no_grad():
                    expected["inference"], found["inference"] = run(**inputs), run(**hurt)
            for part, value in expected.items():
                where = axes.get(part.removeprefix("grad ")) if "grad" in part else place
                if where is not None:
                    torch.testing.assert_close(healthy(found[part], where), healthy(value, where))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@ATTEND
def test_autocast(name, dtype):
    """The result has autocast's dtype with every backend, and the backward pass needs no autocast."""
    case = CASES[name]

    def run(backend):
        def op(**tensors):
            with torch.autocast("cpu", torch.bfloat16):
                return case.run(**tensors, backend=backend)

        return results_and_gradients(op, case.inputs(dtype=dtype))

    found, expected = run("eager"), run("reference")
    assert found["result 0"].dtype == expected["result 0"].dtype == torch.bfloat16
    assert all(t.dtype == dtype for n, t in found.items() if "grad" in n)
    assert_same(found, expected, tolerances.OP[torch.bfloat16])


@ATTEND
def test_autocast_leaves_float64_alone(name):
    case = CASES[name]
    plain = case.run(**case.inputs())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.run(**case.inputs()), plain)


# Mistakes


@ATTEND
def test_tensors_of_other_kinds(name):
    """None for what must be given, complex, bool and int64 for what is floating."""
    case = CASES[name]
    call = {**case.call, **case.derive(**case.inputs())}
    parameters = inspect.signature(case.op).parameters
    for n, x in call.items():
        if not isinstance(x, torch.Tensor):
            continue
        wrong = [x.to(torch.complex64)]
        wrong += [x > 0, x.long()] if x.is_floating_point() else [x.float()]
        wrong += [None] if parameters[n].default is inspect.Parameter.empty else []
        for value in wrong:
            with pytest.raises((TypeError, ValueError), match="expected"):
                case.op(**{**call, n: value})


@ATTEND
def test_numpy_ints(name):
    """They are welcome; floats and None are no sizes."""
    case = CASES[name]
    inputs = case.inputs()
    expected = case.run(**inputs)
    for n, value in case.call.items():
        values = value if isinstance(value, list) else [value]
        if isinstance(values[0], (bool, str, float)):
            continue
        wide = [np.int64(x) for x in values]
        for fine in (wide, np.array(values)) if isinstance(value, list) else wide:
            assert torch.equal(case.run(**inputs, **{n: fine}), expected), n
        for x in (2.0, "2", None, 2j):
            wrong = [x] * len(values) if isinstance(value, list) else x
            with pytest.raises((TypeError, ValueError), match=f"expected.*{n}"):
                case.run(**inputs, **{n: wrong})


@ATTEND
def test_unknown_backend(name):
    case = CASES[name]
    with pytest.raises(BackendError, match="expected backend 'auto', 'triton', 'eager', 'reference'; got 'cuda'"):
        case.run(**case.inputs(), backend="cuda")


QKV = dict.fromkeys("qkv", (1, 8, 9, 2, 4))
FITTING = {
    "neighborhood": {**QKV, "kernel_size": 3},
    "window": {**QKV, "window_size": 7},
    "halo": {**QKV, "block_size": 4, "halo_size": 1},
    "routed": {
        **dict.fromkeys("qkv", (1, 4, 6, 2, 4)), "index": torch.zeros(1, 1, 6, 2).long(), "region_size": 2,
    },
    "bilevel": {**dict.fromkeys("qkv", (1, 7, 7, 1, 4)), "n_win": 3, "topk": 1},
    "agent": agent_shapes((2, 3), (4,), 2, 4, 3, 9),
    "gated positional": gated_shapes((1, 5, 6, 2, 4)),
    "aggregated": {**aggregated_shapes(1, (8, 9), (3, 3), 2, 4, kernel=3), "pretrain_size": 7},
    **dict.fromkeys(("efficient", "inline", "flow"), dict.fromkeys("qkv", (1, 5, 6, 2, 4))),
    "focused": {**dict.fromkeys("qkv", (1, 5, 6, 2, 4)), "focus_scale": (2, 4)},
    "relu": {**dict.fromkeys("qkv", (1, 5, 6, 2, 4)), "temperature": (2,)},
    "mix": {"logits": (1, 5, 6, 2, 9), "v": (1, 5, 6, 2, 4), "kernel_size": 3},
    "convolution": {"x": (1, 5, 6, 4), "kernels": (1, 4, 9)},
    "agent_position_bias": {
        "table": (2, 9, 7, 7), "rows": (2, 9, 8), "columns": (2, 9, 10), "size": [8, 10], "agent_size": [3, 3],
    },
}  # fmt: skip
BASE = {"k": None, "v": None, "local_bias": None, "tokens": None, "token_bias": None, "bias_size": [8, 8, 2, 2]}
LINEAR_ATTENTIONS = ("efficient", "inline", "focused", "flow", "relu")
MISTAKES = [
    ("neighborhood", {"kernel_size": 9}, r"kernel_size \* dilation <= size.*\[9, 9\].*\(8, 9\)"),
    ("neighborhood", {"dilation": 3}, r"kernel_size \* dilation <= size"),
    ("neighborhood", {"stride": 4}, "stride <= kernel_size"),
    ("neighborhood", {"kernel_size": 0}, "kernel_size >= 1"),
    ("neighborhood", {"kernel_size": (3, 3, 3)}, "expected kernel_size of one int or 2"),
    ("neighborhood", {"dilation": 1.5}, "expected dilation of one int or 2"),
    ("neighborhood", {"is_causal": 1}, "expected is_causal of one bool or 2"),
    ("neighborhood", {"k": (1, 8, 8, 2, 4)}, "expected k like q"),
    ("neighborhood", {"bias": (2, 5, 6)}, r"expected bias \(2, 5, 5\)"),
    ("neighborhood", {"bias": (2, 5, 5), "is_causal": True}, "no causal axis with a bias"),
    ("neighborhood", {"extra_k": (1, 3, 2, 4)}, "extra_k and extra_v together"),
    ("neighborhood", {"extra_k": (3, 2, 4), "extra_v": (3, 2, 4)}, "expected extra_k"),
    ("neighborhood", {"extra_bias": (3,)}, "got extra_bias alone"),
    ("neighborhood", {"extra_k": (1, 3, 2, 4), "extra_v": (1, 3, 2, 4), "extra_bias": (4,)}, "broadcastable"),
    ("neighborhood", {"key_mask": (1, 8, 9)}, r"boolean key_mask \(1, 8, 9\), got torch.float"),
    ("neighborhood", {"key_mask": torch.ones(1, 72) > 0}, r"boolean key_mask \(1, 8, 9\).* \(1, 72\)"),
    ("window", {"window_size": 0}, "window_size >= 1"),
    ("window", {"shift": 7}, "0 <= shift < window_size"),
    ("window", {"shift": 1, "grid": True}, "no shift of a grid"),
    ("window", {"window_size": (7, 7, 7)}, "expected window_size of one int or 2"),
    ("window", {"k": (1, 8, 8, 2, 4)}, "expected k like q"),
    ("window", {"bias": (2, 13, 12)}, r"expected bias \(2, 13, 13\)"),
    ("halo", {"block_size": 0}, "block_size >= 1"),
    ("halo", {"halo_size": -1}, "halo_size >= 0"),
    ("halo", {"block_size": 5, "stride": 2}, "stride that divides block_size"),
    ("halo", {"stride": 2}, r"expected q with \[B, H', W'\] = \(1, 4, 5\)"),
    ("halo", {"block_size": (4, 4, 4)}, "expected block_size of one int or 2"),
    ("halo", {"k": (1, 8, 8, 2, 4)}, "got q"),
    ("halo", {"q": (8, 4)}, r"expected q \[B, H', W', N, D\]"),
    ("halo", {"rel_h": (11, 5)}, r"expected rel_h \(11, 4\)"),
    ("halo", {"rel_w": (12, 4)}, r"expected rel_w \(11, 4\)"),
    ("routed", {"region_size": 0}, r"expected region_size of two ints from 1, got \[0, 0\]"),
    ("routed", {"region_size": (2, 2, 2)}, "expected region_size of one int or 2"),
    ("routed", {"index": torch.zeros(1, 1, 8, 2).long()}, r"expected index \(1, '1 or 2', 6, 'topk'\)"),
    ("routed", {"index": torch.zeros(1, 1, 6, 0).long()}, "at least one"),
    ("routed", {"index": torch.zeros(1, 1, 6, 2)}, "int64"),
    ("routed", {"weight": (1, 1, 6, 3)}, r"expected weight like index \(1, 1, 6, 2\)"),
    ("routed", {"k": (1, 4, 6, 2, 5)}, "expected q"),
    ("routed", {"v": (1, 4, 5, 2, 4)}, r"expected v \[B, Hk, Wk, N, Dv\]"),
    ("bilevel", {"topk": 0}, "topk >= 1"),
    ("bilevel", {"n_win": 0}, "expected n_win of two ints from 1"),
    ("bilevel", {"kv_pool": "avg", "kv_size": 4}, r"kv_size from 1 to .* a region \[3, 3\], got 'avg' and 4"),
    ("bilevel", {"kv_pool": "mean"}, "expected kv_pool 'none'"),
    ("bilevel", {"kv_pool": "avg"}, "expected regions that fill the map to pool keys"),
    ("agent", {"k": (2, 4, 2, 5)}, r"expected q \[B, \*spatial, N, D\], k .* k \(2, 4, 2, 5\)"),
    ("agent", {"k": (1, 4, 2, 4), "v": (1, 4, 2, 3)}, "expected q"),
    ("agent", {"v": (2, 5, 2, 3)}, "expected q"),
    ("agent", {"agents": (2, 3, 3, 2, 4)}, r"agents \[B, A, N, D\]"),
    ("agent", {"agents": (1, 9, 2, 4)}, "expected q"),
    ("agent", {"agent_bias": (2, 9, 6)}, r"expected agent_bias \(2, 9, 4\) without .* \(2, 9, 6\)"),
    ("agent", {"query_bias": (1, 6, 9)}, r"expected query_bias \(2, 6, 9\)"),
    ("gated positional", {"k": (1, 5, 6, 2, 3)}, "expected k like q"),
    ("gated positional", dict.fromkeys("qkv", (1, 30, 2, 4)), r"expected q of shape \[B, H, W, N, D\], got .*30"),
    ("gated positional", {"gate": (2, 1)}, r"expected gate \(2,\) \(\[N\]\), got \(2, 1\)"),
    ("gated positional", {"pos_weight": (3, 2)}, r"expected pos_weight \(2, 3\).*got \(3, 2\)"),
    ("gated positional", {"pos_bias": (3,)}, r"expected pos_bias \(2,\)"),
    ("aggregated", {"q": (8, 4)}, r"expected q \[B, H, W, N, D\]"),
    ("aggregated", {"pool_k": (1, 3, 3, 2, 5)}, r"expected pool_k \(1, 3, 3, 2, 4\)"),
    ("aggregated", {"pool_v": (1, 3, 2, 2, 4)}, r"expected pool_v \(1, 3, 3, 2, 4\)"),
    ("aggregated", {"temperature": (2, 1)}, r"expected temperature \(2,\)"),
    ("aggregated", {"cpb_weight2": (2, 7)}, r"expected cpb_weight2 \(2, 16\)"),
    ("aggregated", {"pretrain_size": 0}, "pretrain_size of 2 ints >= 1"),
    ("aggregated", {"pretrain_size": (7, 7, 7)}, "expected pretrain_size of one int or 2"),
    ("aggregated", {"bias_size": [8, 8]}, "bias_size of no or 4 ints"),
    ("aggregated", {"bias_size": [8, 8, 9, 1]}, "at most as many pooled keys"),
    ("aggregated", {**BASE, "q": (1, 2, 9, 2, 4)}, "at most as many pooled keys"),
    ("aggregated", {"v": None}, "expected k and v together"),
    ("aggregated", {"k": None, "v": None}, "expected k and v together"),
    ("aggregated", {"kernel_size": 4}, "odd kernel_size"),
    ("aggregated", {"kernel_size": 5}, r"expected local_bias \(2, 25\)"),
    ("aggregated", {"tokens": (2, 9, 4)}, r"expected tokens \(2, 4, 9\)"),
    ("aggregated", {"k": (1, 8, 8, 2, 4)}, r"expected k \(1, 8, 9, 2, 4\)"),
    *((n, {"k": (1, 5, 6, 2, 3)}, r"expected q \[B, \*spatial, N, D\]") for n in LINEAR_ATTENTIONS),
    *((n, {"v": (1, 4, 6, 2, 4)}, r"expected q \[B, \*spatial, N, D\]") for n in LINEAR_ATTENTIONS),
    ("efficient", {"mask": torch.ones(1, 5, 6)}, r"boolean mask \(1, 5, 6\), got torch.float"),
    ("efficient", {"mask": torch.ones(1, 30) > 0}, r"boolean mask \(1, 5, 6\).* \(1, 30\)"),
    ("inline", {"scale": -1.0}, "expected scale > 0, got -1.0"),
    ("focused", {"focus_scale": (8,)}, r"focus_scale \(2, 4\).*\(8,\)"),
    ("focused", {"factor": 0.0}, "expected factor > 0, got 0.0"),
    ("relu", {"temperature": (2, 1)}, r"temperature \(2,\).*\(2, 1\)"),
    ("relu", {"floor": 0.0}, "expected floor > 0, got 0.0"),
    ("mix", {"kernel_size": 0}, "expected kernel_size >= 1"),
    ("mix", {"kernel_size": (3, 3, 3)}, "expected kernel_size of one int or 2"),
    ("mix", {"kernel_size": 5}, r"logits \[B, H, W, N, 25\], got v .* logits \(1, 5, 6, 2, 9\)"),
    ("mix", {"kernel_size": (1, 9)}, r"expected kernel_size <= size on every axis, got .*\[1, 9\].*\(5, 6\)"),
    ("mix", {"v": (1, 5, 5, 2, 4)}, r"expected v \[B, H, W, N, C\]"),
    ("mix", {"v": (5, 6, 2, 4), "logits": (5, 6, 2, 9)}, r"expected v \[B, H, W, N, C\]"),
    ("mix", {"bias": (2, 5, 6)}, r"expected bias \(2, 5, 5\)"),
    *(("convolution", {"kernels": s}, r"kernels \[B, C, K \* K\] with an odd K")
      for s in ((1, 4, 4), (2, 4, 9), (1, 4, 3, 3))),
    ("agent_position_bias", {"table": (2, 9, 7)}, r"expected table \[N, A, h, w\]"),
    ("agent_position_bias", {"rows": (1, 9, 8)}, r"rows \[N, A, H\].* \(1, 9, 8\)"),
    ("agent_position_bias", {"size": (8, 10, 1)}, "expected size and agent_size of 2 ints"),
    ("agent_position_bias", {"agent_size": (0, 3)}, r"ints >= 1, got \[8, 10\] and \[0, 3\]"),
    ("agent_position_bias", {"table": (2, 8, 7, 7), "rows": (2, 8, 8), "columns": (2, 8, 10)},
     "expected a square number of agents, got 8; try 4"),
    *((n, {"q": (8, 4)}, "1 to 3 spatial axes") for n in ("neighborhood", "window", "agent", "efficient", "inline")),
]  # fmt: skip


def fitting(name, change=()):
    """A call with tensors of zeros where `FITTING` and the change have their shapes."""
    sizes = {n for n, x in inspect.signature(CASES[name].op).parameters.items() if "Tensor" not in str(x.annotation)}
    call = {**FITTING[name], **dict(change)}
    return {n: torch.zeros(x) if isinstance(x, tuple) and n not in sizes else x for n, x in call.items()}


@pytest.mark.parametrize(("name", "change", "message"), MISTAKES)
def test_mistakes_are_named(name, change, message):
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        CASES[name].op(**fitting(name, change))
    assert raised.type is ValueError or "dtype" in message or "Tensor" in str(change)


@pytest.mark.parametrize("name", [n for n in FITTING if n not in TABLES])
def test_fitting_calls_and_tensors_of_two_dtypes(name):
    call = fitting(name)
    CASES[name].op(**call)
    last = next(n for n in ("v", "pool_v", "agents", "kernels") if n in call)
    with pytest.raises(TypeError, match="one floating dtype"):
        CASES[name].op(**{**call, last: call[last].double()})


KEYS = [  # a call with logits of zero, and how many keys take part
    ("neighborhood", {"kernel_size": (5, 3)}, 15),
    ("window", {"window_size": (8, 10)}, 72),
    ("halo", {"block_size": (8, 9)}, 72),
    ("halo", {"mask_border": False}, 36),
    ("routed", {}, 8),
    *(("routed", {"index": torch.ones(1, 1, 6, 2).long(), "kv_region_size": (4, 5), "mask_border": masked}, keys)
      for masked, keys in ((True, 8), (False, 40))),
    ("bilevel", {"topk": 9}, 49),
    ("bilevel", {"rule": "zero"}, 4),
    ("aggregated", dict.fromkeys(("k", "v", "local_bias", "tokens", "token_bias")), 9),
    ("aggregated", {"kernel_size": 1, "local_bias": (2, 1), "tokens": (2, 4, 1), "token_bias": (2, 1)}, 10),
    ("halo", {"block_size": 99, "halo_size": 50, "mask_border": False}, 199**2),
]  # fmt: skip


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize(("name", "change", "keys"), KEYS)
def test_log_sum_exps_count_what_takes_part(name, change, keys, backend, device):
    call = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in fitting(name, change).items()}
    _, lse = CASES[name].op(**call, return_lse=True, backend=backend)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(keys)))


# Tracers


class Call(torch.nn.Module):
    """The op as a module of the tensors named."""

    def __init__(self, case, names):
        super().__init__()
        self.case, self.names = case, tuple(names)

    def forward(self, *tensors):
        return self.case.run(**dict(zip(self.names, tensors, strict=True)))


def exported(name, dynamic):
    """A program whose sizes `dynamic` (0: batch, 1: height, 2: width) are dynamic, and a function to its inputs."""
    case = CASES[name]
    axes = [case.axes(axis) for axis in range(3)]
    # What is as large as the map, but made of parameters, is made anew for each of its sizes.
    names = [n for n in case.inputs() if max(dynamic) == 0 or n in axes[0] or n not in {**axes[1], **axes[2]}]
    dims = {axis: torch.export.Dim("bhw"[axis], min=6 if axis else 1, max=64) for axis in dynamic}
    shapes = tuple({axes[axis][n]: dim for axis, dim in dims.items() if n in axes[axis]} for n in names)

    def inputs(*numbers):
        given = case.inputs((*numbers, *SIZE[3:]))
        return tuple(given[n] for n in names)

    module = Call(case, names)
    return module, torch.export.export(module, inputs(3, 9, 7), dynamic_shapes=(shapes,)), inputs


def nodes(program):
    return [str(node.target) for node in program.graph.nodes if "visattn" in str(node.target)]


@ON_MAPS
def test_export_with_a_dynamic_batch(name):
    """Plain PyTorch, the same for every batch."""
    module, program, inputs = exported(name, (0,))
    assert not nodes(program)
    plain = program.module()
    for batch in (1, 3):
        given = inputs(batch, 9, 7)
        difference = relative_error(plain(*given), module(*given))
        assert difference <= (FLOAT64 if name in REORDERED else 0)


@ON_MAPS
def test_export_with_dynamic_sizes(name):
    """One node for each op, in whose place plain PyTorch for every size can be put."""
    module, program, inputs = exported(name, (0, 1, 2))
    assert nodes(program)
    plain = decompose(program)
    assert not nodes(plain)
    runs = [p.module() for p in (program, plain)]
    for size in ((3, 9, 7), (1, 6, 6), (2, 33, 16)):
        given = inputs(*size)
        expected = module(*given)
        for run in runs:
            assert relative_error(run(*given), expected) <= FLOAT64


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@ON_MAPS
def test_trace(name):
    """For the traced size and any batch."""
    case = CASES[name]
    module, inputs = Call(case, case.inputs()), lambda batch: tuple(case.inputs((batch, *SIZE[1:])).values())
    traced = torch.jit.trace(module, inputs(2), check_trace=False)
    for batch in (3, 1):
        torch.testing.assert_close(traced(*inputs(batch)), module(*inputs(batch)))


@pytest.mark.parametrize("dynamic", [False, True])
@TRACED
def test_compile(name, dynamic):
    """The whole graph, and training with it."""
    case = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(case.run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (SIZE, (3, 12, 11, *SIZE[3:]))[: 1 + dynamic]:
        expected, found = (results_and_gradients(run, case.inputs(size)) for run in (case.run, compiled))
        assert_same(found, expected)


@EVERY
def test_meta_tensors(name):
    """Shapes without values."""
    case = CASES[name]
    assert case.run(**{n: t.to("meta") for n, t in case.inputs().items()}).shape == case.run(**case.inputs()).shape


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@EVERY
def test_vmap(name):
    """A further axis in front of all tensors, also of their gradients."""
    case = CASES[name]
    tensors, fixed = {n: torch.stack([t, t.flip(0)]) for n, t in case.tensors().items()}, case.fixed(*SIZE)

    def run(given):
        return case.run(**given, **fixed)

    def loss(given):
        return run(given).square().sum()

    for call in (run, torch.func.grad(loss)):
        found = torch.func.vmap(call)(tensors)
        for i in range(2):
            one, given = (tree_map(lambda t: t[i], x) for x in (found, tensors))  # noqa: B023
            torch.testing.assert_close(one, call(given))


class Calls(TorchDispatchMode):
    """Calls of custom ops of visattn, with their arguments."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "visattn":
            self.found.append((func, args))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def kept_whole():
    """As where sizes are symbolic."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (dispatch, registration):
            patch.setattr(module, "known_sizes", lambda *args: torch._C._functorch.peek_interpreter_stack() is not None)
        yield


@pytest.mark.parametrize("name", [name for name in CASES if name != "resize_rel_pos"])
def test_custom_op(name):
    """It passes PyTorch's own checks, and gives what its parts give."""
    case = CASES[name]
    expected = results_and_gradients(case.run, case.inputs())
    with kept_whole():
        assert_same(results_and_gradients(case.run, case.inputs()), expected)
        with torch.no_grad(), Calls() as calls:
            case.run(**case.inputs())
    op, args = calls.found[-1]
    if name in ATTENTIONS:
        assert op is getattr(torch.ops.visattn, case.op.__name__).default
    args = [x.requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x for x in args]
    torch.library.opcheck(op, tuple(args))


# Costs


def counted(call, mode=torch.no_grad):
    with mode(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@ATTEND
def test_flops_are_the_same(name):
    """On every device, by every backend; those of a backward pass are twice those of the forward pass."""
    case = CASES[name]
    inputs = {n: t.detach() for n, t in case.derive(**case.inputs(dtype=torch.float32)).items()}
    run = partial(case.op, **case.call)
    expected = counted(lambda: run(**inputs))
    assert expected > 0
    for device, backend, mode in (("meta", "eager", torch.no_grad), ("cpu", "reference", torch.inference_mode)):
        given = {n: t.to(device) for n, t in inputs.items()}
        assert counted(lambda: run(**given, backend=backend), mode) == expected  # noqa: B023
    trained = {}
    assert counted(lambda: trained.update(results_and_gradients(run, inputs)), torch.enable_grad) == 3 * expected
    assert_same(trained, results_and_gradients(run, inputs), tolerances.OP[torch.float32])


def meta(**shapes):
    return {n: torch.empty(s, device="meta") for n, s in shapes.items()}


M = meta(**dict.fromkeys("qkv", (2, 9, 14, 3, 8)))
LISTS = torch.zeros(2, 1, 35, 3, device="meta", dtype=torch.int64)
EXTRA = meta(extra_k=(2, 4, 3, 8), extra_v=(2, 4, 3, 8))
PAIRS = (8 + 7 + 7) * (5 + 4 + 4) + 8 * 5 * 4  # of aggregated attention on 8 x 5 tokens with 2 x 2 pooled ones
BIAS = len(Pooled(8, 2).distances) * len(Pooled(5, 2).distances) * 6 * (2 + 3)
LINEAR = {"q": (2, 4, 5, 3, 8), "k": (2, 100, 3, 8), "v": (2, 100, 3, 6)}
FEW = {"q": (2, 4, 5, 3, 8), "k": (2, 3, 3, 8), "v": (2, 3, 3, 6)}
COSTS = [  # a call, and its multiplications
    (ops.neighborhood_attention, {**M, "kernel_size": 7}, 6 * 9 * 14 * 49 * 16),
    (ops.neighborhood_attention, {**M, **EXTRA, "kernel_size": (3, 5)}, 6 * 9 * 14 * (15 + 4) * 16),
    (ops.neighborhood_attention, {**M, "kernel_size": 7, "key_mask": M["q"][..., 0, 0] > 0}, 6 * 9 * 14 * 49 * 16),
    (ops.window_attention, {**M, "window_size": 7}, 6 * (7 * 7 + 2 * 2) * (7 * 7 * 2) * 16),
    (ops.window_attention, {**M, "window_size": 7, "grid": True}, 6 * (5 * 5 + 4 * 4) * (7 * 7 * 2) * 16),
    (ops.halo_attention, {**M, "block_size": 4, "halo_size": 1, "mask_border": False}, 6 * 9 * 14 * 36 * 16),
    (ops.halo_attention, {**M, "block_size": 4, "halo_size": 1},
     6 * (4 * 5 + 4 * 6 + 2) * (4 * 5 + 4 * 6 + 4 * 6 + 2 * 3) * 16),
    (ops.halo_attention, {**M, **meta(rel_h=(11, 8)), "block_size": 4, "halo_size": 1, "mask_border": False},
     6 * 9 * 14 * (36 * 16 + 6 * 8)),
    (ops.routed_attention, {**M, "index": LISTS, "region_size": 2, "kv_region_size": (4, 5)},
     6 * 9 * 14 * 3 * 20 * 16),
    (ops.bilevel_routing_attention, {**M, "n_win": (3, 7), "topk": 4}, 6 * 9 * 14 * 4 * (3 * 2) * 16),
    (ops.bilevel_routing_attention, {**M, "n_win": (3, 7), "topk": 99}, 6 * 9 * 14 * 21 * (3 * 2) * 16),
    (ops.bilevel_routing_attention, {**M, "n_win": (3, 7), "topk": 4, "kv_pool": "avg", "kv_size": 2},
     6 * 9 * 14 * 4 * 16),
    (ops.agent_attention, meta(**agent_shapes((14, 14), (7, 7), 3, 8, 5, 9)), 6 * 9 * (14 * 14 + 7 * 7) * (8 + 5)),
    (ops.gated_positional_attention, meta(**gated_shapes((2, 9, 14, 3, 8), 5)),
     6 * 9 * 14 * (9 * 14 * (8 + 5) + (9 + 14) * 5)),
    (ops.aggregated_attention,
     {**meta(**aggregated_shapes(2, (8, 5), (2, 2), 3, 4, hidden=6, width=7, kernel=3)), "pretrain_size": 7},
     6 * (PAIRS * (4 + 7) + 8 * 5 * 9 * 4) + BIAS),
    *((op, meta(**shapes, **more), 6 * cost)
      for op, more in ((ops.efficient_attention, {}), (ops.inline_attention, {}), (ops.flow_attention, {}),
                       (ops.focused_linear_attention, {"focus_scale": (3, 8)}),
                       (ops.relu_linear_attention, {"temperature": (3,)}))
      for shapes, cost in ((LINEAR, (20 + 100) * 8 * 6), (FEW, 20 * 3 * (8 + 6)))),
    (ops.neighborhood_mix, {**meta(logits=(2, 9, 14, 3, 35), v=(2, 9, 14, 3, 8)), "kernel_size": (5, 7)},
     6 * 9 * 14 * 35 * 8),
    (ops.dynamic_depthwise_conv, meta(x=(2, 5, 6, 4), kernels=(2, 4, 9)), 2 * 5 * 6 * 4 * 9),
]  # fmt: skip


@pytest.mark.parametrize(("op", "call", "multiplications"), COSTS)
def test_flops_count_what_takes_part(op, call, multiplications):
    assert counted(lambda: op(**call)) == 2 * multiplications


@ATTEND
def test_backend_is_explained(name):
    case = CASES[name]
    with explain() as decisions:
        case.run(**case.inputs())
    names = {case.op.__name__, case.op.__name__.replace("bilevel_routing", "routed")}
    assert [d.backend for d in decisions] == ["eager"]
    assert decisions[0].op in names
    assert set(decisions[0].reasons) == {"triton"}


# Neighbourhoods


@pytest.mark.parametrize(
    ("kernel", "dilation", "stride", "size"),
    [((3,), (1,), (3,), (10,)), ((5,), (2,), (2,), (17,)), ((7,), (1,), (5,), (7,)), ((4,), (3,), (4,), (29,)),
     ((3, 4), (2, 1), (2, 3), (9, 8)), ((2, 3, 3), (1, 1, 2), (2, 3, 1), (3, 5, 7))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("trains", [False, True])
def test_bias_with_a_stride(kernel, dilation, stride, size, trains):
    """Queries that share a window read the table at displacements of their own; written once more, pair by pair."""
    from tests.ops.test_geometry import Axis, visible_keys

    shape = (2, *size, 2, 4)
    shapes = {**dict.fromkeys("qkv", shape), "bias": (2, *(2 * k - 1 for k in kernel))}
    axes = [Axis(*axis) for axis in zip(size, kernel, dilation, stride, strict=True)]
    tokens = math.prod(size)
    places = [np.unravel_index(i, size) for i in range(tokens)]
    seen = [[set(visible_keys(i, axis)) for i in range(axis.length)] for axis in axes]
    entry = torch.full((tokens, tokens), -1)
    for i, here in enumerate(places):
        for j, there in enumerate(places):
            if all(b in seen[a][here[a]] for a, b in enumerate(there)):
                steps = [(t - h) // d + k - 1 for t, h, d, k in zip(there, here, dilation, kernel, strict=True)]
                entry[i, j] = int(np.ravel_multi_index(steps, [2 * k - 1 for k in kernel]))

    def by_definition(q, k, v, bias):
        q, k, v = (x.flatten(1, -3) for x in (q, k, v))
        scores = torch.einsum("bind,bjnd->bnij", q, k) / 2
        scores = scores + bias.flatten(1)[:, entry.clamp(min=0)]
        weights = scores.masked_fill(entry < 0, -math.inf).softmax(-1)
        return torch.einsum("bnij,bjnd->bind", weights, v).reshape(shape)

    tensors = leaves(shapes, 0)
    for backend in BACKENDS:
        op = partial(ops.neighborhood_attention, kernel_size=kernel, dilation=dilation, stride=stride, backend=backend)
        if trains:
            assert_same(results_and_gradients(op, tensors), results_and_gradients(by_definition, tensors))
        else:
            assert relative_error(op(**tensors), by_definition(**tensors)) <= FLOAT64
