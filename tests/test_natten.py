"""natten's functions and modules under visattn's door: goldens of natten's own kernels, both layouts, old names."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests import tolerances
from tests.tolerances import relative_error
from visattn import natten
from visattn.ops import neighborhood_attention

ROOT = Path(__file__).parents[1]
GOLDEN = sorted((ROOT / "tests" / "golden").glob("op_na*.npz"))
EXACT = tolerances.OP[torch.float64]
NAMES = ("kernel_size", "stride", "dilation", "is_causal")


def read(path):
    """Inputs of a golden that require gradients, its window, and the rest."""
    data = np.load(path)
    inputs = {n: torch.from_numpy(data[n]).double().requires_grad_() for n in ("q", "k", "v", "rpb") if n in data.files}
    return inputs, {name: data[name].tolist() for name in NAMES}, data


def check(out, inputs, data):
    out.backward(torch.from_numpy(data["grad_out"]).double())
    assert relative_error(out, torch.from_numpy(data["out"])) <= tolerances.OP_GOLDEN_FORWARD
    for name, x in inputs.items():
        assert relative_error(x.grad, torch.from_numpy(data[f"grad_{name}"])) <= tolerances.OP_GOLDEN_GRADIENT, name


def first(x):
    """[B, *spatial, N, D] -> [B, N, *spatial, D]."""
    return x.movedim(-2, 1)


def maps(*size, heads=2, number=3):
    return torch.randn(number, 2, *size, heads, 4, dtype=torch.float64).unbind()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_fused_golden(path):
    inputs, window, data = read(path)
    function = getattr(natten, path.stem.split("_")[1])
    q, k, v = (inputs[n] for n in "qkv")
    check(function(q, k, v, **window, scale=float(data["scale"]), rpb=inputs.get("rpb")), inputs, data)


@pytest.mark.parametrize("path", [p for p in GOLDEN if "stride" not in p.stem], ids=lambda p: p.stem)
def test_split_golden(path):
    inputs, window, data = read(path)
    name, _ = path.stem.split("_")[1], window.pop("stride")
    q, k, v = (first(inputs[n]) for n in "qkv")
    attn = getattr(natten, f"{name}_qk")(q * float(data["scale"]), k, rpb=inputs.get("rpb"), **window).softmax(-1)
    assert attn.shape == (*q.shape[:-1], np.prod(window["kernel_size"]))
    check(getattr(natten, f"{name}_av")(attn, v, **window).movedim(1, -2), inputs, data)


@pytest.mark.parametrize("name", ["op_na1d_k5_d3", "op_na2d_k3_13x11_d3_notmultiple", "op_na2d_k7_7x7_full"])
def test_names_of_natten_014(name):
    inputs, window, data = read(ROOT / "tests" / "golden" / f"{name}.npz")
    axes, kernel, dilation = name[5], window["kernel_size"][0], window["dilation"][0]
    q, k, v = (first(inputs[n]) for n in "qkv")
    scores = getattr(natten, f"natten{axes}dqkrpb")(q * float(data["scale"]), k, inputs["rpb"], kernel, dilation)
    out = getattr(natten, f"natten{axes}dav")(scores.softmax(-1), v, kernel, dilation)
    check(out.movedim(1, -2), inputs, data)
    without = getattr(natten, f"natten{axes}dqk")(q, k, kernel, dilation)
    torch.testing.assert_close(without, getattr(natten, f"natten{axes}dqkrpb")(q, k, None, kernel, dilation))


def test_keys_of_a_causal_query_come_first_and_the_rest_is_hidden():
    q, k, _ = map(first, maps(6))
    scores = natten.na1d_qk(q, k, 3, 2, is_causal=True)  # of token 2: tokens 0 and 2
    torch.testing.assert_close(scores[:, :, 2, :2], torch.einsum("bnd,bnmd->bnm", q[:, :, 2], k[:, :, :3:2]))
    assert (scores[:, :, 2, 2] == float("-inf")).all()
    ones = torch.ones_like(scores)
    torch.testing.assert_close(natten.na1d_av(ones, k, 3, 2, is_causal=True)[:, :, 2], k[:, :, :3:2].sum(2))


@pytest.mark.parametrize("is_causal", [False, True])
def test_additional_keys_come_last(is_causal):
    q, k, v = maps(5, 7)
    extra_k, extra_v = torch.randn(2, 2, 3, 2, 4, dtype=torch.float64)
    window = {"kernel_size": 3, "dilation": (1, 2), "is_causal": is_causal}
    out = natten.na2d(q, k, v, **window, additional_keys=extra_k, additional_values=extra_v)
    window["additional_keys"] = extra_k.transpose(1, 2)
    attn = natten.na2d_qk(first(q) / 2, first(k), **window).softmax(-1)
    window["additional_values"] = extra_v.transpose(1, 2)
    del window["additional_keys"]
    assert attn.shape[-1] == 9 + 3
    assert relative_error(natten.na2d_av(attn, first(v), **window).movedim(1, -2), out) <= EXACT


def test_lse_merges_attentions_to_different_keys():
    q, k, v = (x.requires_grad_() for x in maps(5, 6))
    others = [x.flatten(1, 2) for x in maps(2, 2, number=2)]
    near = natten.na2d(q, k, v, 3, return_lse=True)
    scores = torch.einsum("bhwnd,bmnd->bhwnm", q / 2, others[0])
    far = torch.einsum("bhwnm,bmnd->bhwnd", scores.softmax(-1), others[1]), scores.logsumexp(-1)
    out, lse = natten.merge_attentions([near[0], far[0]], [near[1], far[1]])
    extra = dict(zip(("additional_keys", "additional_values"), others, strict=True))
    expected, expected_lse = natten.na2d(q, k, v, 3, **extra, return_lse=True)
    assert relative_error(out, expected) <= EXACT
    assert relative_error(lse, expected_lse) <= EXACT
    gradients = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    for got, want in zip(gradients, torch.autograd.grad(expected.sum() + expected_lse.sum(), (q, k, v)), strict=True):
        assert relative_error(got, want) <= EXACT


def test_queries_that_see_no_key_merge_to_zeros():
    q, k, v = (x.requires_grad_() for x in maps(5, 6))
    hidden = {"key_mask": torch.zeros(1, 5, 6, dtype=torch.bool).expand(len(q), 5, 6), "return_lse": True}
    (a, lse_a), (b, lse_b) = (neighborhood_attention(q, k, v, size, **hidden) for size in (3, 5))
    out, lse = natten.merge_attentions([a, b], [lse_a, lse_b])
    assert torch.equal(out, torch.zeros_like(out))
    assert lse.isneginf().all()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_weights_of_a_float32_softmax_meet_values_of_half_precision():
    q, _, v = (first(x).bfloat16() for x in maps(5, 6))
    weights = natten.na2d_qk(q, q, 3).float().softmax(-1)
    out = natten.na2d_av(weights, v, 3)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, natten.na2d_av(weights.bfloat16(), v, 3))


def test_heads_shared_by_queries():
    (q,), (k, v) = maps(7, heads=4, number=1), maps(7, number=2)
    out = natten.na1d(q, k, v, 3)
    torch.testing.assert_close(out[:, :, 3], natten.na1d(q[:, :, 3:], k[:, :, 1:], v[:, :, 1:], 3)[:, :, 0])
    torch.testing.assert_close(out[:, :, 1], natten.na1d(q[:, :, 1:2], k[:, :, :1], v[:, :, :1], 3)[:, :, 0])


def test_none_is_a_default_and_a_zero_scale_too():
    q, k, v = maps(5, 6)
    expected = neighborhood_attention(q, k, v, 3)
    torch.testing.assert_close(natten.na2d(q, k, v, 3, stride=None, dilation=None, is_causal=None, scale=0.0), expected)
    tuning = {"backend": "cutlass-fna", "q_tile_shape": (8, 8), "backward_kv_splits": (1, 1), "torch_compile": True}
    torch.testing.assert_close(natten.na2d(q, k, v, 3, attention_kwargs={"backend": None}, **tuning), expected)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_modules(axes):
    """Of 0.21 (`embed_dim`, stride), of 0.17 (`dim`, `rel_pos_bias`) and of 0.15 (`bias`)."""
    kind, x = getattr(natten, f"NeighborhoodAttention{axes}D"), torch.randn(2, *(6, 5, 4)[:axes], 8)
    new = kind(embed_dim=8, num_heads=2, kernel_size=3, stride=2, is_causal=(True, *[False] * (axes - 1)), qk_scale=0.3)
    q, k, v = new.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3)
    window = {"kernel_size": 3, "stride": 2, "is_causal": new.is_causal}
    torch.testing.assert_close(new(x), new.proj(neighborhood_attention(q, k, v, **window, scale=0.3).flatten(-2)))
    old = kind(8, kernel_size=3, num_heads=2, rel_pos_bias=True)
    q, k, v = old.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3)
    torch.testing.assert_close(old(x), old.proj(neighborhood_attention(q, k, v, 3, bias=old.rpb).flatten(-2)))
    shapes = {
        "rpb": (2, *[5] * axes),
        "qkv.weight": (24, 8),
        "qkv.bias": (24,),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
    }
    assert {name: tuple(p.shape) for name, p in old.state_dict().items()} == shapes
    assert kind(dim=8, num_heads=2, kernel_size=3, bias=True).state_dict().keys() == shapes.keys()
    assert "kernel_size=(3," in repr(old)


def test_module_drops_attention_weights_while_training():
    module = natten.NeighborhoodAttention2D(8, 2, 3, dilation=2, rel_pos_bias=True, attn_drop=0.4)
    x = torch.randn(2, 6, 7, 8)
    torch.manual_seed(1)
    out = module(x)
    q, k, v = (first(t) for t in module.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3))
    torch.manual_seed(1)
    weights = F.dropout(natten.na2d_qk(q / 2, k, 3, 2, rpb=module.rpb).softmax(-1), 0.4)
    expected = module.proj(natten.na2d_av(weights, v, 3, 2).movedim(1, -2).flatten(-2))
    torch.testing.assert_close(out, expected)
    assert not torch.equal(out, module(x))
    assert torch.equal(module.eval()(x), module(x))


def refused(q, n=natten):
    """What raises, the type and a part of the sentence, for q [B, H, W, N, D]."""
    yield lambda: n.na2d(q, q, q, 7), ValueError, r"kernel_size \* dilation <= size .* map of \(5, 6\)"
    yield lambda: n.na2d_qk(first(q), first(q), 3, 2), ValueError, r"kernel_size \* dilation <= size"
    yield lambda: n.na2d_av(first(q), first(q), 7), ValueError, r"kernel_size \* dilation <= size"
    yield lambda: n.NeighborhoodAttention2D(8, 2, 3, dilation=2)(q.flatten(3)), ValueError, "dilation <= size"
    yield lambda: n.NeighborhoodAttention1D(8, 2, 3)(q.flatten(3)), ValueError, "expected x with 1 axes"
    yield lambda: n.NeighborhoodAttention2D(8, 2), TypeError, "expected embed_dim"
    yield lambda: n.NeighborhoodAttention2D(8, 2, 3, 2), TypeError, r"expected keywords .* try dilation= or stride="
    yield lambda: n.na2d(q, q, q, 3, 2), TypeError, r"expected keywords after kernel_size, got \(2,\)"
    yield lambda: n.na2d(q, q, q, 3, tiles=2), NotImplementedError, r"that choose a kernel, got \['tiles'\]"
    inner = {"scale": 1.0}
    yield lambda: n.na2d(q, q, q, 3, attention_kwargs=inner), NotImplementedError, r"got \['scale'\]"
    small = q.to(torch.float8_e4m3fn)
    yield lambda: n.na2d(small, small, small, 3), NotImplementedError, "got torch.float8_e4m3fn: .* fp8 needs"
    nested = torch.nested.nested_tensor([torch.randn(5, 2, 4), torch.randn(7, 2, 4)], layout=torch.jagged)
    yield lambda: n.na1d(nested, nested, nested, 3), NotImplementedError, "got a nested one: no kernel here packs"
    yield lambda: n.attention(q, q, q), NotImplementedError, "got attention: neighborhoods alone .* varlen_attn"
    yield lambda: n.use_deterministic_algorithms(True), NotImplementedError, "try its function of this name"
    yield lambda: n.get_configs_for_cutlass_fna(q), NotImplementedError, "visattn.ops.tune"
    causal = {"is_causal": True, "rel_pos_bias": True}
    yield lambda: n.NeighborhoodAttention2D(8, 2, 3, **causal), NotImplementedError, "expected no causal axis"
    yield lambda: n.na2d_qk(first(q), first(q), 3, 1, 2), TypeError, "every input to be a tensor, got int"
    yield lambda: n.na2d_av(first(q), first(q), 3), ValueError, r"expected weights \(1, 2, 5, 6, 9\)"
    yield lambda: n.nothing, AttributeError, "got 'nothing'"
    yield lambda: n.na2d(q[0, 0, 0, 0], q, q, 3), ValueError, r"expected q of shape .*, got \(4,\)"
    yield lambda: n.na2d(q, q[0, 0, 0, 0], q, 3), ValueError, "expected k like q"
    yield lambda: n.na2d(q, q[..., :0, :], q[..., :0, :], 3), ValueError, "expected k like q"
    yield lambda: n.na2d(None, q, q, 3), TypeError, "expected query to be a tensor, got NoneType"
    yield lambda: n.na2d_qk(first(q), None, 3), TypeError, "expected key to be a tensor, got NoneType"
    yield lambda: n.na2d_av(first(q)[..., :1].long(), first(q), 1), TypeError, "expected weights of a floating dtype"
    yield lambda: n.NeighborhoodAttention2D(8, 0, 3), ValueError, "expected dim divisible by num_heads, got 8 and 0"
    yield lambda: n.NeighborhoodAttention2D(0, 2, 3), ValueError, "expected dim divisible by num_heads, got 0 and 2"
    yield lambda: n.NeighborhoodAttention2D(8, 2.0, 3), ValueError, "expected num_heads of one int, got 2.0"
    yield lambda: n.NeighborhoodAttention2D("8", 2, 3), ValueError, "expected embed_dim of one int, got '8'"
    yield lambda: n.NeighborhoodAttention2D(8, 2, 3, qk_scale="x"), ValueError, "convert string to float"
    for wrong in {"kernel_size": 0}, {"dilation": (1, 0)}, {"stride": 4}, {"stride": 0}:
        window = {"kernel_size": 3} | wrong
        yield partial(n.NeighborhoodAttention2D, 8, 2, **window), ValueError, "expected kernel_size >= 1, .* got kernel"


@pytest.mark.parametrize(("call", "error", "words"), [*refused(torch.ones(1, 5, 6, 2, 4))])
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_paths_of_imports():
    from visattn.natten.functional import na2d, natten2dav
    from visattn.natten.natten2d import NeighborhoodAttention2D
    from visattn.natten.types import CausalArg2DTypeOrDed  # noqa: F401

    assert na2d is natten.na2d
    assert natten2dav is natten.na2d_av
    assert NeighborhoodAttention2D is natten.NeighborhoodAttention2D
    assert hasattr(natten, "context")  # how programs tell natten 0.17
    assert not hasattr(natten, "nothing")
    natten.use_fused_na(True)
    assert natten.functional.is_fused_na_enabled()


PROGRAM = """
import sys, types
import visattn.natten
sys.modules["natten"] = types.ModuleType("natten")
try:
    visattn.natten.install()
except ImportError as error:
    assert "expected natten not to be imported yet, got natten" in str(error)
else:
    raise SystemExit("not refused")
del sys.modules["natten"]
visattn.natten.install()
visattn.natten.install()
import natten
import natten.functional
from natten import NeighborhoodAttention2D
from natten.na2d import NeighborhoodAttention2D as Same
from natten.functional import na2d_qk_with_bias
assert natten is visattn.natten and Same is NeighborhoodAttention2D
"""


def test_install():
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, check=True)
