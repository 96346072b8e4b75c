"""The Triton backends of the attention ops against the reference in float64, all gradients included.

Without a GPU the kernels are interpreted, on maps of at most 16 x 16 tokens; with one, the same tests run there, and
those marked `cuda` add bfloat16, real sizes, memory and time-independent determinism.
"""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests import tolerances
from tests.ops import test_aggregated, test_routed
from tests.ops.cases import PROBLEMS, agent_shapes, gated_shapes, mix_problems, neighborhood
from tests.ops.gradients import Recorder, compare, leaves, results_and_gradients
from tests.tolerances import relative_error
from visattn import ops
from visattn.ops.fused import attention_call

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking takes minutes in the interpreter
OPS = {
    name: (getattr(ops, f"{name}_attention"), PROBLEMS[name])
    for name in ("neighborhood", "window", "halo", "routed", "aggregated", "agent")
}
OPS["gated positional"] = ops.gated_positional_attention, PROBLEMS["gated positional"]
OPS["mix"] = ops.neighborhood_mix, mix_problems(5, 5)


def check(op, problem, dtype=torch.float32):
    """The Triton backend; a problem is (shapes, other arguments, strided, seed)."""
    shapes, call, strided, seed = problem
    call = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in call.items()}
    tensors = {n: t.to(DEVICE) for n, t in leaves(shapes, seed, dtype).items()}

    def run(backend):
        return lambda **given: op(**given, **call, backend=backend)

    compare(run("triton"), run("reference"), tensors, strided)


def is_small(problem):
    """Few enough tokens for the interpreter."""
    shapes = problem[0]
    return (
        DEVICE == "cuda" or max(torch.Size(shapes[n][1:-2]).numel() for n in shapes if n in ("q", "k", "logits")) <= 256
    )


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=8, deadline=None, derandomize=True, phases=PHASES)
@given(data=st.data())
def test_matches_reference(name, data):
    op, problems = OPS[name]
    check(op, data.draw(problems.filter(is_small)))


MAP = (2, 13, 11, 2, 24)
ARGS = {"kernel_size": [7, 5], "dilation": [1, 2], "stride": [1, 1], "is_causal": [False, False]}
TABLE = {"q": MAP, "k": MAP, "v": MAP, "bias": (2, 13, 9)}
HALO = {"q": (2, 6, 8, 2, 24), "k": (2, 12, 15, 2, 24), "v": (2, 12, 15, 2, 16), "rel_h": (27, 24), "rel_w": (19, 24)}
CASES = {
    "neighborhood": ("neighborhood", (TABLE, ARGS, True, 0)),
    "neighborhood without phases": ("neighborhood", (TABLE, {**ARGS, "dilation": [1, 1]}, False, 0)),
    "neighborhood causal stride": (
        "neighborhood",
        neighborhood(([4, 4], [2, 1], [2, 3], [True, False]), (1, 13, 9, 1, 40), bias=False, lse=True, extra_bias=None),
    ),
    "neighborhood 1d": (
        "neighborhood",
        neighborhood(([6], [3], [1], [False]), (2, 61, 2, 24), extra=70, extra_bias="image"),
    ),
    "neighborhood 3d": (
        "neighborhood",
        neighborhood(([2, 3, 3], [1, 1, 2], [1, 1, 1], [False] * 3), (1, 3, 5, 7, 2, 8), extra_bias="head"),
    ),
    "neighborhood of visible keys": (
        "neighborhood",
        neighborhood(([7, 5], [1, 2], [1, 1], [False] * 2), MAP, extra=0, lse=True, visible=0.05),
    ),
    "window": ("window", ({**TABLE, "bias": (2, 9, 9)}, {"window_size": 5, "shift": 3}, True, 0)),
    "grid": ("window", ({**TABLE, "bias": (2, 13, 13)}, {"window_size": 7, "grid": True}, True, 0)),
    "halo": ("halo", (HALO, {"block_size": [8, 4], "halo_size": [3, 3], "stride": [2, 2]}, True, 0)),
    "halo zero keys": (
        "halo",
        (
            {**dict.fromkeys("qkv", (1, 16, 16, 1, 24)), "rel_h": (27, 24), "rel_w": (27, 24)},
            {"block_size": 8, "halo_size": 3, "mask_border": False},
            True,
            0,
        ),
    ),
    "routed": ("routed", test_routed.PLAIN),
    "aggregated": ("aggregated", test_aggregated.PLAIN),
    "gated positional": ("gated positional", (gated_shapes((2, 9, 11, 2, 24), 16), {}, True, 0)),
    "agent": ("agent", (agent_shapes((9, 11), (7, 8), 2, 24, 16, 49), {}, True, 0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_low_precision(case, dtype, poisoned_empty):
    """Every kind of tile in each dtype, with what is not written showing as NaN."""
    name, problem = CASES[case]
    if dtype == torch.bfloat16 and DEVICE == "cpu" and case not in ("neighborhood", "halo"):
        pytest.skip("the interpreter has no bfloat16: kernels convert after loading, which two cases show")
    check(OPS[name][0], problem, dtype)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs programs one after the other")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_runs_are_bit_equal(case, dtype):
    op, (shapes, call, strided, seed) = OPS[CASES[case][0]][0], CASES[case][1]
    tensors = {n: t.to(DEVICE) for n, t in leaves(shapes, seed, dtype).items()}
    call = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in call.items()}
    first, *others = (
        results_and_gradients(lambda **given: op(**given, **call, backend="triton"), tensors, strided)
        for _ in range(10)
    )
    for other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tables", [("rel_h", "rel_w"), ("rel_w",)], ids=str)
def test_halo_gathers_no_relative_terms(tables, dtype):
    """The gradient of a gather adds in any order, and is refused by `torch.use_deterministic_algorithms`."""
    shapes = {n: s for n, s in HALO.items() if n in ("q", "k", "v", *tables)}
    tensors = {n: t.to(DEVICE).requires_grad_() for n, t in leaves(shapes, 0, dtype).items()}
    with Recorder() as recorder:
        ops.halo_attention(**tensors, block_size=(8, 4), halo_size=3, stride=2, backend="triton").sum().backward()
    assert "fused_backward" in recorder.names
    assert not [name for name in recorder.names if "gather" in name or "scatter" in name or "index" in name]


def test_wide_offsets(monkeypatch):
    monkeypatch.setattr(attention_call, "_WIDE", 0)
    monkeypatch.setattr(attention_call, "_known", lambda *form: {})  # nothing from before
    check(ops.neighborhood_attention, neighborhood(([3, 3], [1, 1], [1, 1], [False] * 2), (2, 7, 9, 2, 24)))


def test_a_view_of_a_larger_map_and_one_of_transposed_channels():
    """Tokens without one stride between them, and channels that do not lie side by side, are copied."""
    wide = torch.randn(2, 9, 12, 3, 24, 2, device=DEVICE)
    for views in (wide[:, :, 2:9].movedim(-1, -2), wide[:, 1:8, 3:10].movedim(-1, -2)):
        q, k, v = views.unbind(3)
        expected = ops.window_attention(q.double(), k.double(), v.double(), 4, backend="reference")
        got = ops.window_attention(q, k, v, 4, backend="triton")
        assert relative_error(got, expected) <= tolerances.OP[torch.float32]


@pytest.mark.parametrize("name", ["window", "agent"])
def test_empty_batch(name):
    q, k, v = torch.randn(3, 0, 5, 6, 2, 8, device=DEVICE, requires_grad=True).unbind(0)
    agents = (torch.randn(0, 4, 2, 8, device=DEVICE),) if name == "agent" else (3,)
    out = OPS[name][0](q, k, v, *agents, backend="triton")
    assert out.shape == q.shape
    out.sum().backward()


def test_allocates_nothing_larger_than_qkv(monkeypatch):
    """Forward and backward, but for the one gradient of q, k and v, which are three of its three parts."""
    qkv = torch.randn(2, 16, 16, 3, 2, 24, device=DEVICE, requires_grad=True)
    sizes = []
    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty"), (torch.Tensor, "contiguous")):
        original = getattr(owner, name)

        def recorded(*args, original=original, **kwargs):
            out = original(*args, **kwargs)
            if out.is_floating_point():
                sizes.append(out.numel())
            return out

        monkeypatch.setattr(owner, name, recorded)
    ops.neighborhood_attention(*qkv.unbind(3), 7, backend="triton").square().sum().backward()
    assert sizes
    assert max(sizes) <= qkv.numel()


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
@settings(max_examples=300, deadline=None, phases=PHASES)
@given(data=st.data())
def test_matches_reference_long(name, data):
    op, problems = OPS[name]
    check(op, data.draw(problems.filter(is_small)))


def test_no_extra_key_at_all():
    shapes = {"q": (2, 5, 6, 2, 4), "extra_k": (2, 0, 2, 4), "extra_v": (2, 0, 2, 4), "extra_bias": (2, 5, 6, 2, 0)}
    tensors = {n: t.to(DEVICE).requires_grad_() for n, t in leaves(shapes, 0, torch.float32).items()}
    q, *extra = tensors.values()
    out = ops.neighborhood_attention(q, q, q, 3, 1, 1, False, None, *extra, backend="triton")
    expected = ops.neighborhood_attention(q, q, q, 3, backend="reference")
    assert relative_error(out, expected) <= tolerances.OP[torch.float32]
    grads = torch.autograd.grad(out.square().sum(), list(tensors.values()), allow_unused=True)
    assert relative_error(grads[0], torch.autograd.grad(expected.square().sum(), q)[0]) <= tolerances.OP[torch.float32]
