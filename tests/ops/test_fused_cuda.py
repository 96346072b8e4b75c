"""What only a GPU shows of the Triton backends: real sizes in bfloat16, memory, offsets beyond 32 bits, models."""

import pytest
import timm
import torch

import visattn  # noqa: F401
from tests import tolerances
from tests.tolerances import relative_error
from visattn import ops
from visattn.ops import explain, use_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BFLOAT16 = tolerances.OP[torch.bfloat16]


def maps(batch, size, heads, dim, dtype=torch.bfloat16):
    """q, k, v as views of one projection, and the projection."""
    qkv = torch.randn(batch, *size, 3, heads, dim, device="cuda", dtype=dtype, requires_grad=True)
    return qkv, qkv.unbind(-3)


# size, heads, head dim, op, arguments, entries per axis of a position table
CALLS = {
    "neighborhood 56": ((56, 56), 2, 32, ops.neighborhood_attention, {"kernel_size": 7}, 13),
    "neighborhood 57x75": ((57, 75), 1, 24, ops.neighborhood_attention, {"kernel_size": 13, "dilation": 2}, None),
    "dilated 56": ((56, 56), 2, 32, ops.neighborhood_attention, {"kernel_size": 7, "dilation": 8}, 13),
    "window 56": ((56, 56), 2, 32, ops.window_attention, {"window_size": 7}, 13),
    "window 48x50": ((48, 50), 4, 32, ops.window_attention, {"window_size": 12, "shift": 6}, 23),
    "grid 56": ((56, 56), 2, 32, ops.window_attention, {"window_size": 7, "grid": True}, 13),
    "halo 32": ((32, 32), 4, 32, ops.halo_attention, {"block_size": 8, "halo_size": 3, "mask_border": False}, None),
    "routed 28": ((28, 28), 4, 32, ops.bilevel_routing_attention, {"n_win": 7, "topk": 4}, None),
}


@pytest.mark.parametrize("call", CALLS)
def test_real_sizes_in_bfloat16(call):
    """Against the eager backend in float64 on the same rounded inputs."""
    size, heads, dim, op, args, entries = CALLS[call]
    qkv, _ = maps(2, size, heads, dim)
    cotangent = torch.randn(2, *size, heads, dim, device="cuda", dtype=torch.bfloat16)
    tables = [] if entries is None else [torch.randn(heads, entries, entries, device="cuda")]
    found = []
    for backend, dtype in (("triton", torch.bfloat16), ("eager", torch.float64)):
        leaf, *bias = (x.detach().to(dtype).requires_grad_() for x in (qkv, *tables))
        out = op(*leaf.unbind(-3), **args, **({"bias": bias[0]} if bias else {}), backend=backend)
        found.append([out, *torch.autograd.grad(out, [leaf, *bias], cotangent.to(dtype))])
    for got, expected in zip(*found, strict=True):
        assert relative_error(got, expected) <= BFLOAT16


def test_memory_grows_with_tokens_and_no_faster():
    """Twice the side, four times the tokens: at most 4.4 times the memory, forward and backward."""
    peaks = []
    for side in (56, 112, 224):
        qkv, (q, k, v) = maps(4, (side, side), 2, 32)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ops.neighborhood_attention(q, k, v, 7, backend="triton").sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del qkv, q, k, v
    assert peaks[1] <= 4.4 * peaks[0]
    assert peaks[2] <= 4.4 * peaks[1]


def test_offsets_beyond_32_bits():
    """One image of more than 2^31 numbers: the last rows as if they were a map of their own."""
    side = 4736  # 4736^2 * 3 * 32 > 2^31
    qkv = torch.randn(1, side, side, 3, 1, 32, device="cuda", dtype=torch.bfloat16)
    part = qkv[:, -14:]
    got = ops.window_attention(*qkv.unbind(3), 2, backend="triton")[:, -14:]
    expected = ops.window_attention(*part.double().unbind(3), 2, backend="eager")
    assert relative_error(got, expected) <= BFLOAT16


def test_auto_takes_the_kernels_in_a_model_under_autocast():
    model = timm.create_model("test_dinat").cuda().train()
    with explain() as decisions, torch.autocast("cuda", torch.bfloat16):
        model(torch.randn(2, 3, 96, 128, device="cuda")).float().sum().backward()
    assert {d.backend for d in decisions} == {"triton"}
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["test_dinat", "test_maxvit_va", "test_biformer", "test_transnext"])
def test_compiled_model_equals_eager(name):
    model = timm.create_model(name).cuda().eval()
    image = torch.randn(2, 3, 96, 128, device="cuda")
    with torch.no_grad():
        with use_backend("eager"):
            expected = model(image)
        assert relative_error(torch.compile(model, fullgraph=True)(image), expected) <= 1e-4
