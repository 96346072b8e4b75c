"""Every form that the attention kernels are compiled in, in both directions, against the reference in float64."""

import pytest
import torch

from tests.ops.cases import neighborhood
from tests.ops.gradients import leaves, results_and_gradients
from tests.ops.test_fused_attention import DEVICE, check
from tests.tolerances import OP, relative_error
from visattn import ops
from visattn.ops.fused import attention_call
from visattn.ops.fused.attention import fused_attention
from visattn.ops.fused.attention_call import Call
from visattn.ops.geometry import Whole

PLAIN = [3, 3], [1, 1], [1, 1], [False, False]


@pytest.fixture
def metas(monkeypatch, poisoned_empty):
    """{kernel: constants} of the launches of a test."""
    found, run = {}, Call.run

    def noted(self, kernel, keys_hold, *args):
        found[kernel.__name__.removesuffix("_kernel")] = self.meta(keys_hold)
        return run(self, kernel, keys_hold, *args)

    monkeypatch.setattr(Call, "run", noted)
    return found


def forms(metas, name):
    """Of a constant, of the kernels in which queries hold and of the one in which keys do."""
    return [getattr(metas[kernel], name) for kernel in ("forward", "queries_backward", "keys_backward")]


def problem(channels, bias=False, scale=None, visible=None, size=(6, 5)):
    shape = (2, *size, 1, channels)
    return neighborhood(PLAIN, shape, channels, bias, 0, scale=scale, lse=True, strided=False, visible=visible)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_tiles_of_few_rows_together(metas, dtype, bias):
    check(ops.neighborhood_attention, problem(8, bias, visible=0.3, size=(9, 8)), dtype)
    assert forms(metas, "TILES") == [4, 4, 4]


@pytest.mark.parametrize("bias", [False, True])
def test_tiles_together_and_alone_are_equal(monkeypatch, metas, bias):
    shapes, call, _, seed = problem(8, bias, size=(9, 8))
    tensors, found = {n: t.to(DEVICE) for n, t in leaves(shapes, seed, torch.float32).items()}, []
    for few in (True, False):
        attention_call._known.cache_clear()
        monkeypatch.setattr(Call, "few", few)
        found.append(
            results_and_gradients(
                lambda **given: ops.neighborhood_attention(**given, **call, backend="triton"), tensors
            )
        )
        assert forms(metas, "TILES") == [4 if few else 1] * 3
    attention_call._known.cache_clear()
    for name, value in found[0].items():
        assert relative_error(found[1][name], value) <= OP[torch.float32], name


def test_listed_regions_together(metas):
    """Six regions of queries, so that a program holds tiles that are not there; a region that no list holds."""
    q, kv = (1, 6, 4, 2, 8), (1, 4, 5, 2, 8)
    lists = (1, 2, 6, 3)
    index = torch.randint(1, 6, lists, generator=torch.Generator().manual_seed(0))
    call = {"index": index, "region_size": [2, 2], "kv_region_size": [2, 2]}
    check(ops.routed_attention, ({"q": q, "k": kv, "v": kv, "weight": lists}, call, True, 0))
    assert forms(metas, "TILES") == [4, 4, 4]
    assert forms(metas, "SEGMENT") == [4, 4, 4]


@pytest.mark.parametrize(("queries", "keys", "channels"), [(5, 1600, 8), (1600, 5, 72)])
def test_splits_of_columns(metas, queries, keys, channels):
    """Six parts of 25 or 50 steps: the last may be empty."""
    shapes = {"q": (1, queries, 1, channels), "k": (1, keys, 1, channels), "v": (1, keys, 1, channels)}
    tensors = {n: t.to(DEVICE) for n, t in leaves(shapes, 0, torch.float32).items()}
    scale = channels**-0.5

    def expected(q, k, v):
        logits = scale * q.movedim(1, 2) @ k.movedim(1, 2).mT
        return (logits.softmax(-1) @ v.movedim(1, 2)).movedim(1, 2), logits.logsumexp(-1).mT

    def run(q, k, v):
        return fused_attention(q, k, v, [Whole(queries, keys)], scale)

    exact = results_and_gradients(expected, {n: t.double() for n, t in tensors.items()})
    for name, value in results_and_gradients(run, tensors).items():
        assert relative_error(value, exact[name]) <= OP[torch.float32], name
    held = queries < keys
    assert forms(metas, "SPLIT") == [held, held, not held]


def test_rectangles_as_a_product_of_lanes(metas):
    check(ops.neighborhood_attention, problem(72), torch.float16)
    assert min(forms(metas, "LANES")) >= 16


def test_position_tiles_as_a_product(metas):
    check(ops.neighborhood_attention, problem(72, bias=True), torch.float16)
    assert forms(metas, "EYE") == [True] * 3


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1e-7])
def test_any_scale(scale, poisoned_empty):
    check(ops.neighborhood_attention, problem(8, bias=True, scale=scale), torch.float16)


@pytest.mark.parametrize(("channels", "bias"), [(8, False), (8, True), (72, False), (72, True)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_logits_that_float16_does_not_hold(sign, channels, bias, poisoned_empty):
    """All above 6e4 or below -6e4 before they are scaled, with queries that see nothing."""
    shapes, call, *_ = problem(channels, bias, visible=0.2)
    call["key_mask"] = call["key_mask"].to(DEVICE)
    tensors = {n: t.to(DEVICE) for n, t in leaves(shapes, 0, torch.float16).items()}
    tensors["q"], tensors["k"] = tensors["q"] + 100, tensors["k"] + 100 * sign

    def run(backend, given):
        with torch.no_grad():
            return ops.neighborhood_attention(**given, **call, backend=backend)

    expected = run("reference", {n: t.double() for n, t in tensors.items()})
    assert expected[1].isinf().any()
    for got, value in zip(run("triton", tensors), expected, strict=True):
        assert relative_error(got, value) <= OP[torch.float16]


@pytest.mark.parametrize("channels", [8, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_infinite_bias(dtype, channels):
    shapes, call, *_ = problem(channels, bias=True)
    tensors = leaves(shapes, 0, dtype)
    tensors["bias"][:, 0] = -float("inf")
    tensors = {n: t.to(DEVICE) for n, t in tensors.items()}
    got = ops.neighborhood_attention(**tensors, **call, backend="triton")
    exact = {n: t.double() for n, t in tensors.items()}
    for x, value in zip(got, ops.neighborhood_attention(**exact, **call, backend="reference"), strict=True):
        assert relative_error(x, value) <= OP[dtype]
