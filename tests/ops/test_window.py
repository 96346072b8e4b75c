"""Window attention: backends against the reference, and the reference against partitions as timm makes them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.maxxvit import grid_partition, grid_reverse, window_partition, window_reverse
from timm.models.swin_transformer import SwinTransformerBlock

from tests import tolerances
from tests.ops.gradients import Recorder, check, leaves
from tests.tolerances import relative_error
from visattn.ops import BackendError, explain, window_attention
from visattn.ops.geometry import Partition

BACKENDS = ["eager", "reference"]  # Triton has tests of its own: no float64


@st.composite
def problems(draw):
    """Any call the op accepts: 1-3 axes, maps smaller than the window, partial windows, non-contiguous views."""
    number = draw(st.integers(1, 3))
    most = {1: 30, 2: 9, 3: 4}[number]
    grid = draw(st.booleans())
    window = [draw(st.integers(1, most + 1)) for _ in range(number)]
    heads, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 24]))
    shape = (draw(st.integers(1, 2)), *(draw(st.integers(1, most)) for _ in range(number)), heads, dim)
    shapes = {"q": shape, "k": shape, "v": (*shape[:-1], draw(st.sampled_from([dim, 3])))}
    if draw(st.booleans()):
        shapes["bias"] = (heads, *(2 * w - 1 for w in window))
    call = {
        "window_size": window,
        "shift": [0 if grid else draw(st.integers(0, w - 1)) for w in window],
        "grid": grid,
        "scale": draw(st.sampled_from([None, 0.7])),
    }
    return shapes, call, draw(st.booleans()), draw(st.integers(0, 2**31))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=problems())
def test_matches_reference(backend, problem):
    check(window_attention, problem, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@settings(max_examples=4000, deadline=None)
@given(problem=problems())
def test_matches_reference_long(backend, problem):
    check(window_attention, problem, backend)


MAP = (2, 16, 11, 2, 24)
TABLE = (2, 13, 13)
CASES = {
    "whole windows": ((2, 14, 21, 2, 24), {"window_size": 7}),
    "partial windows": (MAP, {"window_size": 7}),
    "shifted": (MAP, {"window_size": 7, "shift": 3}),
    "grid": (MAP, {"window_size": 7, "grid": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend, case, dtype, poisoned_empty):
    shape, call = CASES[case]
    check(window_attention, ({"q": shape, "k": shape, "v": shape, "bias": TABLE}, call, True, 0), backend, dtype)


@pytest.mark.parametrize("call", [{"shift": (1, 0)}, {"grid": True}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, call):
    shapes = {"q": (1, 3, 3, 1, 2), "k": (1, 3, 3, 1, 2), "v": (1, 3, 3, 1, 1), "bias": (1, 3, 3)}
    tensors = [t.requires_grad_() for t in leaves(shapes, 0).values()]

    def op(q, k, v, bias):
        return window_attention(q, k, v, 2, bias=bias, backend=backend, **call)

    assert torch.autograd.gradcheck(op, tensors)
    assert torch.autograd.gradgradcheck(op, tensors)


@pytest.mark.parametrize("size", [(14, 21), (7, 14)])
@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_maxvit_partitions(backend, grid, size):
    """timm's partition, SDPA and reverse; queries and keys at distance (dy, dx) read the bias at (dy + 6, dx + 6)."""
    q, k, v = torch.randn(3, 2, *size, 3, 8, dtype=torch.float64)
    bias = torch.randn(3, 13, 13, dtype=torch.float64)
    cut, join = (grid_partition, grid_reverse) if grid else (window_partition, window_reverse)
    rank = torch.arange(49)
    dy, dx = rank // 7 - (rank // 7)[:, None], rank % 7 - (rank % 7)[:, None]
    parts = (cut(x.flatten(3), (7, 7)).reshape(-1, 49, 3, 8).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*parts, attn_mask=bias[:, dy + 6, dx + 6])
    expected = join(out.transpose(1, 2).reshape(-1, 7, 7, 24), (7, 7), size).reshape(q.shape)
    got = window_attention(q, k, v, 7, grid=grid, bias=bias, backend=backend)
    assert relative_error(got, expected) <= tolerances.OP[torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_swins_cyclic_shift(backend):
    """A Swin block's attention (roll, mask, roll back) with its own projections, whose table runs from query to key."""
    block = SwinTransformerBlock(24, (14, 21), num_heads=3, window_size=7, shift_size=3).double().eval()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(2, 14, 21, 24, dtype=torch.float64)
    q, k, v = block.attn.qkv(x).unflatten(-1, (3, 3, 8)).unbind(3)
    bias = block.attn.relative_position_bias_table.T.reshape(3, 13, 13).flip(1, 2)
    out = window_attention(q, k, v, 7, 3, bias=bias, backend=backend)
    expected = block._attn(x)
    assert relative_error(block.attn.proj(out.flatten(3)), expected) <= tolerances.OP[torch.float64]


@pytest.mark.parametrize("table", [None, torch.ones(2, 13, 13)], ids=["plain", "bias"])
def test_partial_windows_are_fused(table):
    q, k, v = torch.randn(3, 1, 16, 11, 2, 32)
    with torch.no_grad(), Recorder() as recorder:
        window_attention(q, k, v, 7, 3, bias=table)
    assert "_scaled_dot_product_flash_attention_for_cpu" in recorder.names
    assert "_softmax" not in recorder.names


def test_partitions_cover_an_axis():
    for length in range(1, 20):
        for window in range(1, 9):
            for axis in [
                *(Partition(length, window, shift) for shift in range(window)),
                Partition(length, window, is_grid=True),
            ]:
                group, rank = axis.place()
                windows, slots, _ = axis.layout()
                assert group.max() < windows
                assert slots <= window
                assert len({(g, r) for g, r in zip(group.tolist(), rank.tolist(), strict=True)}) == length
                assert axis.occupied().sum() == length
                assert axis.pairs() == (group[:, None] == group).sum()
                if axis.is_grid:
                    assert windows == -(-length // window)
                    assert (group == torch.arange(length) % windows).all()
                else:
                    edge = axis.shift or window
                    expected = [0 if i < edge else 1 + (i - edge) // window for i in range(length)]
                    assert group.tolist() == expected
                    assert (rank[1:] - rank[:-1])[group[1:] == group[:-1]].eq(1).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window_size": 0}, ValueError, "window_size >= 1"),
        ({"shift": 7}, ValueError, "0 <= shift < window_size"),
        ({"shift": 1, "grid": True}, ValueError, "no shift of a grid"),
        ({"window_size": (7, 7, 7)}, ValueError, "expected window_size of one int or 2"),
        ({"k": torch.zeros(1, 8, 8, 2, 4)}, ValueError, "expected k like q"),
        ({"v": torch.zeros(1, 8, 9, 2, 4, dtype=torch.float64)}, TypeError, "one floating dtype"),
        ({"q": torch.zeros(8, 4)}, ValueError, "1 to 3 spatial axes"),
        ({"bias": torch.zeros(2, 13, 12)}, ValueError, r"expected bias \(2, 13, 13\)"),
        ({"backend": "cuda"}, BackendError, "expected backend 'auto', 'triton', 'eager', 'reference'; got 'cuda'"),
    ],
)
def test_mistakes_are_named(change, error, message):
    q, k, v = torch.zeros(3, 1, 8, 9, 2, 4)
    with pytest.raises(error, match=message):
        window_attention(**{"q": q, "k": k, "v": v, "window_size": 7, **change})


def test_backend_is_explained():
    q, k, v = torch.randn(3, 1, 4, 4, 1, 4)
    with explain() as decisions:
        window_attention(q, k, v, 3)
    assert [(d.op, d.backend) for d in decisions] == [("window_attention", "eager")]
