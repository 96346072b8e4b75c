"""What only a GPU shows of the Triton backends: real sizes, equal bits, graphs, streams, memory, models.

Benchmarks time nothing before these have passed, also as ptxas compiles without optimizing (PTXAS_OPTIONS=-O0).
"""

import pytest
import timm
import torch
from bench_device import captured
from gpu_report import BOTH
from op_cases import TINY
from op_gate import Given, runner

import visattn  # noqa: F401
from tests import tolerances
from tests.tolerances import relative_error
from visattn import layers, ops
from visattn.ops import explain, use_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
BFLOAT16 = tolerances.OP[torch.bfloat16]


def maps(batch, size, heads, dim, dtype=torch.bfloat16):
    """q, k, v as views of one projection, and the projection."""
    qkv = torch.randn(batch, *size, 3, heads, dim, device=DEVICE, dtype=dtype, requires_grad=True)
    return qkv, qkv.unbind(-3)


# size, heads, head dim, op, arguments, entries per axis of a position table, extra keys
CALLS = {
    "neighborhood 56": ((56, 56), 2, 32, ops.neighborhood_attention, {"kernel_size": 7}, 13, 0),
    "neighborhood 57x75": ((57, 75), 1, 24, ops.neighborhood_attention, {"kernel_size": 13, "dilation": 2}, None, 0),
    "neighborhood 31x45": ((31, 45), 3, 64, ops.neighborhood_attention, {"kernel_size": 7}, 13, 49),
    "dilated 56": ((56, 56), 2, 32, ops.neighborhood_attention, {"kernel_size": 7, "dilation": 8}, 13, 0),
    "window 56": ((56, 56), 2, 32, ops.window_attention, {"window_size": 7}, 13, 0),
    "window 48x50": ((48, 50), 4, 32, ops.window_attention, {"window_size": 12, "shift": 6}, 23, 0),
    "grid 56": ((56, 56), 2, 32, ops.window_attention, {"window_size": 7, "grid": True}, 13, 0),
    "halo 32": ((32, 32), 4, 32, ops.halo_attention, {"block_size": 8, "halo_size": 3, "mask_border": False}, None, 0),
    "halo 27x35": ((27, 35), 2, 16, ops.halo_attention, {"block_size": 8, "halo_size": 3}, None, 0),
    "routed 28": ((28, 28), 4, 32, ops.bilevel_routing_attention, {"n_win": 7, "topk": 4}, None, 0),
}


def leaves(call, dtype, batch=2):
    """The tensors of a call, by name: the projection, a position table and extra keys, if any, and a cotangent."""
    size, heads, dim, _, _, entries, extra = CALLS[call]
    shapes = {"qkv": (batch, *size, 3, heads, dim)}
    if entries is not None:
        shapes["bias"] = (heads, entries, entries)
    if extra:
        shapes |= {"extra_k": (batch, extra, heads, dim), "extra_v": (batch, extra, heads, dim)}
        shapes["extra_bias"] = (heads, extra)
    wide = ("bias", "extra_bias")
    found = {n: torch.randn(s, device=DEVICE, dtype=torch.float32 if n in wide else dtype) for n, s in shapes.items()}
    return found, torch.randn(batch, *size, heads, dim, device=DEVICE, dtype=dtype)


def results(call, tensors, cotangent, backend, dtype=None):
    """Output and gradients by name, computed in `dtype`."""
    *_, op, args, _, _ = CALLS[call]
    inputs = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()}
    more = {n: t for n, t in inputs.items() if n != "qkv"}
    out = op(*inputs["qkv"].unbind(-3), **args, **more, backend=backend)
    grads = torch.autograd.grad(out, list(inputs.values()), cotangent.to(out.dtype))
    return {"out": out.detach(), **dict(zip(inputs, grads, strict=True))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_real_sizes(call, dtype):
    """Against the eager backend in float64 on the same rounded inputs."""
    tensors, cotangent = leaves(call, dtype)
    found = results(call, tensors, cotangent, "triton")
    expected = results(call, tensors, cotangent, "eager", torch.float64)
    for name, got in found.items():
        factor = tolerances.CANCELLING if name in ("bias", "extra_bias") else 1
        assert relative_error(got, expected[name]) <= factor * tolerances.OP[dtype], name


def same(found, expected):
    return all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("call", CALLS)
def test_ten_runs_are_bit_equal(call):
    tensors, cotangent = leaves(call, torch.bfloat16, 8)
    first = results(call, tensors, cotangent, "triton")
    assert all(same(results(call, tensors, cotangent, "triton"), first) for _ in range(9))


def test_calls_of_two_shapes_alternate_and_run_on_other_streams():
    calls = {call: leaves(call, torch.bfloat16) for call in ("neighborhood 56", "neighborhood 31x45")}
    first = {call: results(call, *given, "triton") for call, given in calls.items()}
    stream = torch.cuda.Stream()
    for where in (torch.cuda.current_stream(), stream, torch.cuda.current_stream()):
        where.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(where):
            found = {call: results(call, *given, "triton") for call, given in calls.items()}
        where.synchronize()
        assert all(same(found[call], first[call]) for call in calls)


def test_a_layer_in_a_cuda_graph():
    """Its forward and backward pass, replayed on other images."""
    layer = layers.NeighborhoodAttention(64, 2).to(DEVICE)
    image = torch.randn(2, 29, 37, 64, device=DEVICE, requires_grad=True)
    wanted = [image, *layer.parameters()]

    def run():
        with torch.autocast(DEVICE, torch.bfloat16):
            out = layer(image)
        return [out, *torch.autograd.grad(out.float().square().sum(), wanted)]

    graph, found = captured(run)
    for _ in range(2):
        with torch.no_grad():
            image.normal_()
        expected = run()
        graph.replay()
        for got, e in zip(found, expected, strict=True):
            assert relative_error(got, e) <= 1e-6


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_tiny_maps(case):
    """In float32 and small enough for compute-sanitizer."""
    given, attend = Given(case, BOTH, torch.device(DEVICE)), case.visattn("triton")
    error, is_right = given.check(attend, runner(attend, given.inputs, BOTH, given.cotangents(attend)[0])())
    assert is_right, error


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
    qkv = torch.randn(1, side, side, 3, 1, 32, device=DEVICE, dtype=torch.bfloat16)
    part = qkv[:, -14:]
    got = ops.window_attention(*qkv.unbind(3), 2, backend="triton")[:, -14:]
    expected = ops.window_attention(*part.double().unbind(3), 2, backend="eager")
    assert relative_error(got, expected) <= BFLOAT16


def test_auto_takes_the_kernels_in_a_model_under_autocast():
    model = timm.create_model("test_dinat").cuda().train()
    with explain() as decisions, torch.autocast("cuda", torch.bfloat16):
        model(torch.randn(2, 3, 96, 128, device=DEVICE)).float().sum().backward()
    assert {d.backend for d in decisions} == {"triton"}
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["test_dinat", "test_maxvit_va", "test_biformer", "test_transnext"])
def test_compiled_model_equals_eager(name):
    model = timm.create_model(name).cuda().eval()
    image = torch.randn(2, 3, 96, 128, device=DEVICE)
    with torch.no_grad():
        with use_backend("eager"):
            expected = model(image)
        assert relative_error(torch.compile(model, fullgraph=True)(image), expected) <= 1e-4
