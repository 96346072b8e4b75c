"""Halo attention: backends against the reference and the goldens of two public implementations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tolerances
from tests.golden import fill
from tests.ops.gradients import Recorder, check, leaves
from tests.tolerances import relative_error
from visattn.ops import BackendError, explain, halo_attention
from visattn.ops.geometry import Halo
from visattn.ops.halo import eager
from visattn.ops.registration import decompose

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "op_halo.npz")
BACKENDS = ["eager", "reference"]  # Triton has tests of its own: no float64


def golden(case, shape):
    """Parameters, input and cotangent of a golden case, in float64; parameters and input require gradients."""
    grads = {k.removeprefix(f"{case}_g_"): GOLDEN[k] for k in GOLDEN.files if k.startswith(f"{case}_g_")}
    parameters = {k: v.double() for k, v in fill.fill({k: g.shape for k, g in grads.items()}).items()}
    parameters["x"], grads["x"] = fill.image(shape, 0).double(), GOLDEN[f"{case}_gx"]
    return {k: v.requires_grad_() for k, v in parameters.items()}, grads


def check_golden(case, out, parameters, grads):
    assert relative_error(out, torch.from_numpy(GOLDEN[f"{case}_y"])) <= tolerances.OP_GOLDEN_FORWARD
    out.backward(fill.image(tuple(out.shape), 1).double())
    for name, grad in grads.items():
        assert relative_error(parameters[name].grad, torch.from_numpy(grad)) <= tolerances.OP_GOLDEN_GRADIENT, name


@pytest.mark.parametrize("case", ["a", "b", "c"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_masked_border(backend, case):
    """halonet-pytorch: borders masked; the relative term is scaled too."""
    case = f"lucid_{case}"
    _, block, halo, dim, heads, *shape = GOLDEN[f"{case}_cfg"].tolist()
    p, grads = golden(case, shape)
    x = p["x"].permute(0, 2, 3, 1)
    q, k, v = F.linear(x, torch.cat([p["to_q.weight"], p["to_kv.weight"]])).unflatten(-1, (3, heads, dim)).unbind(3)
    rel = (p[f"rel_pos_emb.rel_{axis}"] * dim**-0.5 for axis in ("height", "width"))
    out = halo_attention(q, k, v, block, halo, 1, *rel, backend=backend).flatten(3)
    out = F.linear(out, p["to_out.weight"], p["to_out.bias"]).permute(0, 3, 1, 2)
    check_golden(case, out, p, grads)


@pytest.mark.parametrize(
    ("case", "shape"),
    [("s1", (2, 16, 8, 12)), ("s2", (1, 16, 16, 24)), ("s2pool", (1, 16, 14, 14)), ("h8", (1, 32, 16, 16)),
     ("scaled", (1, 16, 8, 8))],
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_unmasked_border(backend, case, shape):
    """timm's HaloAttn: keys outside the map take part as zeros; keys and values interleaved by head."""
    case = f"timm_{case}"
    cfg = json.loads(str(GOLDEN[f"{case}_cfg_json"]))
    p, grads = golden(case, shape)
    heads, stride, block = cfg["num_heads"], cfg.get("stride", 1), cfg["block_size"]
    pool = stride > 1 and block % stride != 0
    dim = p["pos_embed.height_rel"].shape[1]
    x = p["x"].permute(0, 2, 3, 1)
    step = 1 if pool else stride
    q = F.linear(x[:, ::step, ::step], p["q.weight"].flatten(1)).unflatten(-1, (heads, dim))
    k, v = F.linear(x, p["kv.weight"].flatten(1)).unflatten(-1, (heads, -1)).tensor_split([dim], dim=-1)
    factor = dim**-0.5 if cfg.get("scale_pos_embed") else 1
    rel = (p[f"pos_embed.{axis}_rel"] * factor for axis in ("height", "width"))
    out = halo_attention(q, k, v, block, cfg["halo_size"], step, *rel, mask_border=False, backend=backend)
    out = out.flatten(3).permute(0, 3, 1, 2)
    check_golden(case, F.avg_pool2d(out, 2) if pool else out, p, grads)


@st.composite
def problems(draw):
    """Any call the op accepts: maps smaller than a block, halos wider than a block, strides, one table or none."""
    heads, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 24]))
    stride = [draw(st.integers(1, 3)) for _ in range(2)]
    block = [s * draw(st.integers(1, 4)) for s in stride]
    halo = [draw(st.integers(0, 4)) for _ in range(2)]
    size = [draw(st.integers(1, 11)) for _ in range(2)]
    batch = draw(st.integers(1, 2))
    shapes = {
        "q": (batch, *(-(-n // s) for n, s in zip(size, stride, strict=True)), heads, dim),
        "k": (batch, *size, heads, dim),
        "v": (batch, *size, heads, draw(st.sampled_from([dim, 3]))),
    }
    for name, b, h in zip(("rel_h", "rel_w"), block, halo, strict=True):
        if draw(st.booleans()):
            shapes[name] = (2 * (b + 2 * h) - 1, dim)
    call = {
        "block_size": block,
        "halo_size": halo,
        "stride": stride,
        "mask_border": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.7])),
    }
    return shapes, call, draw(st.booleans()), draw(st.integers(0, 2**31))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=problems())
def test_matches_reference(backend, problem):
    check(halo_attention, problem, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@settings(max_examples=4000, deadline=None)
@given(problem=problems())
def test_matches_reference_long(backend, problem):
    check(halo_attention, problem, backend)


PLAIN = (
    {"q": (2, 19, 10, 2, 24), "k": (2, 19, 10, 2, 24), "v": (2, 19, 10, 2, 24), "rel_h": (27, 24), "rel_w": (27, 24)},
    {"block_size": 8, "halo_size": 3},
    True,
    0,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_border", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend, mask_border, dtype, poisoned_empty):
    shapes, call, strided, seed = PLAIN
    check(halo_attention, (shapes, {**call, "mask_border": mask_border}, strided, seed), backend, dtype)


@pytest.mark.parametrize("mask_border", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, mask_border):
    shapes = {"q": (1, 1, 2, 1, 2), "k": (1, 2, 3, 1, 2), "v": (1, 2, 3, 1, 1), "rel_h": (7, 2), "rel_w": (7, 2)}
    tensors = [t.requires_grad_() for t in leaves(shapes, 0).values()]

    def op(q, k, v, rel_h, rel_w):
        return halo_attention(q, k, v, 2, 1, 2, rel_h, rel_w, mask_border, backend=backend)

    assert torch.autograd.gradcheck(op, tensors)
    assert torch.autograd.gradgradcheck(op, tensors)


def test_gradients_that_are_differentiated_are_the_same():
    """The backward pass then builds its relative terms in another way."""
    shapes, call, _, seed = PLAIN
    inputs = [t.requires_grad_() for t in leaves(shapes, seed).values()]
    out = halo_attention(*inputs[:3], call["block_size"], call["halo_size"], 1, *inputs[3:]).square().sum()
    plain = torch.autograd.grad(out, inputs, retain_graph=True)
    for a, b in zip(torch.autograd.grad(out, inputs, create_graph=True), plain, strict=True):
        assert relative_error(a, b) <= tolerances.OP[torch.float64]


@pytest.mark.parametrize("chunk", [1, 1000, 5000])
def test_chunks_do_not_change_the_result(monkeypatch, chunk):
    monkeypatch.setattr(eager, "_CHUNK", chunk)
    check(halo_attention, PLAIN, "eager")


def test_window_of_the_whole_map_is_attention():
    q, k, v = torch.randn(3, 2, 5, 6, 2, 8, dtype=torch.float64)
    out = halo_attention(q, k, v, 6, 6)
    flat = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*flat).transpose(1, 2).reshape(q.shape)
    assert relative_error(out, expected) <= tolerances.OP[torch.float64]


def test_only_the_inputs_are_kept_for_the_backward_pass():
    tensors = leaves({"q": (1, 64, 64, 8, 8), "k": (1, 64, 64, 8, 8), "v": (1, 64, 64, 8, 8)}, 0, torch.float32)
    inputs = [t.requires_grad_() for t in tensors.values()]
    rel = [torch.randn(27, 8, requires_grad=True) for _ in range(2)]
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        halo_attention(*inputs, 8, 3, 1, *rel)
    assert sum(kept.values()) == sum(t.untyped_storage().nbytes() for t in [*inputs, *rel])


def test_pairs_are_those_of_the_geometry():
    for length in range(1, 14):
        for block, halo, stride in ((4, 1, 1), (4, 3, 2), (6, 0, 3), (1, 2, 1)):
            axis = Halo(length, block, halo, stride)
            index = axis.key_index()[torch.arange(axis.queries) // axis.queries_per_block]
            assert axis.pairs(True) == ((index >= 0) & (index < length)).sum()
            assert axis.pairs(False) == index.numel()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size >= 1"),
        ({"halo_size": -1}, ValueError, "halo_size >= 0"),
        ({"block_size": 5, "stride": 2}, ValueError, "stride that divides block_size"),
        ({"stride": 2}, ValueError, r"expected q with \[B, H', W'\] = \(1, 4, 5\)"),
        ({"block_size": (4, 4, 4)}, ValueError, "expected block_size of one int or 2"),
        ({"k": torch.zeros(1, 8, 8, 2, 4)}, ValueError, "got q"),
        ({"v": torch.zeros(1, 8, 9, 2, 4, dtype=torch.float64)}, TypeError, "one floating dtype"),
        ({"q": torch.zeros(8, 4)}, ValueError, r"expected q \[B, H', W', N, D\]"),
        ({"rel_h": torch.zeros(11, 5)}, ValueError, r"expected rel_h \(11, 4\)"),
        ({"rel_w": torch.zeros(12, 4)}, ValueError, r"expected rel_w \(11, 4\)"),
        ({"backend": "cuda"}, BackendError, "expected backend 'auto', 'triton', 'eager', 'reference'; got 'cuda'"),
    ],
)
def test_mistakes_are_named(change, error, message):
    q, k, v = torch.zeros(3, 1, 8, 9, 2, 4)
    with pytest.raises(error, match=message):
        halo_attention(**{"q": q, "k": k, "v": v, "block_size": 4, "halo_size": 1, **change})


def test_backend_is_explained():
    q, k, v = torch.randn(3, 1, 4, 4, 1, 4)
    with explain() as decisions:
        halo_attention(q, k, v, 3, 1)
    assert [(d.op, d.backend) for d in decisions] == [("halo_attention", "eager")]


@pytest.mark.parametrize("mask_border", [False, True])
@pytest.mark.parametrize(
    ("block", "halo", "stride"),
    [((1, 1000), 0, 1), ((1, 1000), (1, 5), 1), ((3, 2), (40, 300), 1), ((2, 1000), (1, 0), (1, 2)), (40, 30, (4, 5))],
)
@pytest.mark.parametrize("with_tables", [False, True])
def test_windows_larger_than_the_map_cost_no_more_than_it(with_tables, block, halo, stride, mask_border):
    """Slots that never hold a key are left out where they take no part, else counted without being made."""
    (bh, bw), (h, w), (sh, sw) = (x if isinstance(x, tuple) else (x, x) for x in (block, halo, stride))
    shapes = {"q": (2, -(-6 // sh), -(-5 // sw), 2, 4), "k": (2, 6, 5, 2, 4), "v": (2, 6, 5, 2, 3)}
    if with_tables:
        shapes |= {"rel_h": (2 * (bh + 2 * h) - 1, 4), "rel_w": (2 * (bw + 2 * w) - 1, 4)}
    call = {"block_size": (bh, bw), "halo_size": (h, w), "stride": (sh, sw), "mask_border": mask_border}
    check(halo_attention, (shapes, call, False, 0), "eager")
    with Recorder() as recorder:
        halo_attention(**leaves(shapes, 0), **call)
    # Every query against all slots of windows of the map's size, and what is linear in the window.
    assert recorder.largest <= 8 * 4 * (9 * 16 * 9 * 16 + 30 * 2 * (bh + bw + 2 * h + 2 * w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("with_tables", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_queries_keys_and_values(backend, with_tables, dtype):
    shapes, call, _, seed = PLAIN
    inputs = {n: t.requires_grad_() for n, t in leaves(shapes, seed, dtype).items() if with_tables or "rel" not in n}
    with torch.autocast("cpu", torch.bfloat16):
        out = halo_attention(**inputs, **call, backend=backend)
    grads = torch.autograd.grad(out.float().square().sum(), list(inputs.values()))
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [dtype] * len(inputs)
    cast = {n: t.bfloat16() if n in ("q", "k", "v") else t for n, t in inputs.items()}
    assert torch.equal(out, halo_attention(**cast, **call, backend=backend))


@pytest.mark.parametrize("mask_border", [False, True])
@pytest.mark.parametrize("halo", [1, 50])
def test_one_nan_key_stays_in_its_image_and_head(halo, mask_border):
    q, k, v = torch.randn(3, 2, 9, 7, 3, 4)
    k[1, 4, 4, 2] = float("nan")
    found = halo_attention(q, k, v, 4, halo, mask_border=mask_border).isnan().flatten(1, 2).any(-1).any(1)  # [B, N]
    assert found.tolist() == [[False, False, False], [False, False, True]]


@pytest.mark.parametrize("halo", [1, 50])
@pytest.mark.parametrize("mask_border", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend, mask_border, halo):
    shapes = {"q": (0, 9, 7, 2, 4), "k": (0, 9, 7, 2, 4), "v": (0, 9, 7, 2, 3), "rel_h": (2 * (4 + 2 * halo) - 1, 4)}
    inputs = {n: t.requires_grad_() for n, t in leaves(shapes, 0).items()}
    out = halo_attention(**inputs, block_size=4, halo_size=halo, mask_border=mask_border, backend=backend)
    assert out.shape == (0, 9, 7, 2, 3)
    assert not torch.autograd.grad(out.sum(), inputs["rel_h"])[0].any()


@pytest.mark.parametrize("change", [{"q": None}, {"k": [1.0]}, {"rel_h": torch.zeros(11, 4).long()}, {"rel_w": 1.0}])
def test_what_is_no_floating_tensor_is_refused(change):
    q, k, v = torch.zeros(3, 1, 8, 9, 2, 4)
    with pytest.raises(TypeError, match=f"expected {next(iter(change))} "):
        halo_attention(**{"q": q, "k": k, "v": v, "block_size": 4, "halo_size": 1, **change})


class _Halo(torch.nn.Module):
    def __init__(self, mask_border):
        super().__init__()
        self.mask_border = mask_border

    def forward(self, q, k, v, rel_h, rel_w):
        return halo_attention(q, k, v, 4, (2, 1), 2, rel_h, rel_w, self.mask_border)


@pytest.mark.parametrize("mask_border", [False, True])
def test_decomposition_is_right_for_every_size(mask_border):
    def inputs(b, h, w):
        shapes = {"q": (b, -(-h // 2), -(-w // 2), 2, 4), "k": (b, h, w, 2, 4), "v": (b, h, w, 2, 3)}
        return tuple(leaves({**shapes, "rel_h": (15, 4), "rel_w": (11, 4)}, 0).values())

    module = _Halo(mask_border)
    sizes = dict.fromkeys(range(3), torch.export.Dim.AUTO)
    program = torch.export.export(module, inputs(2, 9, 7), dynamic_shapes=(sizes, sizes, sizes, None, None))
    assert any("visattn" in str(node.target) for node in program.graph.nodes)
    program = decompose(program)
    assert not any("visattn" in str(node.target) for node in program.graph.nodes)
    for size in ((2, 9, 7), (1, 3, 5), (3, 33, 47)):
        assert relative_error(program.module()(*inputs(*size)), module(*inputs(*size))) <= tolerances.OP[torch.float64]
