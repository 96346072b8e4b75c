"""The fused ops under PyTorch's tracers: opcheck, compile, export, function transforms, autocast, dispatch."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import tolerances
from tests.ops.test_registration import MODULES, Linear, module_inputs
from tests.tolerances import relative_error
from visattn import ops
from visattn.ops import BackendError, explain, use_backend
from visattn.ops.fused import support
from visattn.ops.fused.attention import fused_attention
from visattn.ops.fused.tables import encode
from visattn.ops.geometry import Axis, Halo, Partition

FORWARD = "visattn.fused_forward.default"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs():
    """A call with a position table, extra keys and hidden ones, as the registered ops take it."""
    q, k, v = torch.randn(3, 2, 20, 2, 8, device=DEVICE).unbind(0)
    bias, extra = torch.randn(2, 5, 5, device=DEVICE), torch.randn(2, 2, 3, 2, 8, device=DEVICE)
    extra_bias = torch.randn(1, 20, 1, 3, device=DEVICE)
    rest = (None, None, torch.rand(2, 20, device=DEVICE) < 0.5, encode([Axis(4, 3), Axis(5, 3)]), False, 0.3)
    return q, k, v, bias, None, *extra.unbind(0), extra_bias, *rest


def test_opcheck():
    args = inputs()
    torch.library.opcheck(torch.ops.visattn.fused_forward.default, args)
    out, lse = torch.ops.visattn.fused_forward(*args)
    needs = [x is not None for x in args[:9]]
    for grad_lse in (None, torch.randn_like(lse)):
        torch.library.opcheck(
            torch.ops.visattn.fused_backward.default, (torch.randn_like(out), grad_lse, out, lse, *args, needs)
        )


def test_backward_of_an_output_and_lse_that_are_not_contiguous():
    args = inputs()
    out, lse = torch.ops.visattn.fused_forward(*args)
    given, needs = (torch.randn_like(out), torch.randn_like(lse)), [x is not None for x in args[:9]]
    expected = torch.ops.visattn.fused_backward(*given, out, lse, *args, needs)
    strided = (torch.stack([x, x], -1)[..., 0] for x in (out, lse))
    for got, e in zip(torch.ops.visattn.fused_backward(*given, *strided, *args, needs), expected, strict=True):
        assert torch.equal(got, e)


@pytest.mark.parametrize("needed", range(9))
def test_one_gradient_at_a_time_equals_all(needed):
    args = list(inputs())
    if args[needed] is None:
        args[3], args[8] = None, None
        if needed == 4:  # relative positions of halos
            args[4] = torch.randn(2, 20, 2, 14, device=DEVICE)
            args[11] = encode([Halo(4, 2, 1), Halo(5, 2, 1)])
        else:  # factors of listed regions
            args[8], args[9] = (
                torch.randn(2, 1, 6, 2, device=DEVICE),
                torch.arange(24, device=DEVICE).view(2, 1, 6, 2) % 6,
            )
            args[11] = encode([Partition(4, 2), Partition(5, 2)] * 2)
    out, lse = torch.ops.visattn.fused_forward(*args)
    grad = torch.randn_like(out)
    every = torch.ops.visattn.fused_backward(grad, None, out, lse, *args, [x is not None for x in args[:9]])
    (one,) = torch.ops.visattn.fused_backward(grad, None, out, lse, *args, [i == needed for i in range(9)])
    place = sum(x is not None for x in args[:needed])
    assert one.shape == args[needed].shape
    assert torch.equal(one, every[place])


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_trains(kind, dynamic):
    """With symbolic sizes the op is one custom op, whose backward differentiates the fused op."""
    module = kind()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((5, 4), (4, 7)) if dynamic else ((5, 4),):
        tensors = [t.detach().to(DEVICE).requires_grad_() for t in module_inputs(kind, *size, batch=1)]
        grads = []
        for run, backend in ((module, "eager"), (compiled, "triton")):
            with use_backend(backend):
                out = run(*tensors)
                grads.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        for a, b in zip(*grads, strict=True):
            assert relative_error(b, a) <= tolerances.SAME_MODEL


@pytest.mark.parametrize("kind", MODULES)
def test_export_holds_the_fused_op(kind):
    tensors = tuple(t.to(DEVICE) for t in module_inputs(kind, 5, 4, batch=1))
    with use_backend("triton"):
        program = torch.export.export(kind(), tensors).run_decompositions()
    kernels = {"visattn.linear_apply.default", "visattn.depthwise.default"} if kind is Linear else {FORWARD}
    assert kernels <= {str(node.target) for node in program.graph.nodes}
    assert relative_error(program.module()(*tensors), kind()(*tensors)) <= tolerances.SAME_MODEL


def test_function_transforms():
    q, k, v = torch.randn(3, 1, 20, 1, 8, device=DEVICE).unbind(0)

    def loss(q):
        return fused_attention(q, k, v, [Partition(4, 2), Partition(5, 2)], 0.3)[0].square().sum()

    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(torch.func.grad(loss)(q), expected)


def test_vmap_of_the_op_and_of_its_gradient():
    q, k, v = torch.randn(3, 3, 1, 20, 1, 8, device=DEVICE).unbind(0)
    table = torch.randn(1, 3, 5, device=DEVICE)

    def attend(q, k, v):
        return fused_attention(q, k, v, [Partition(4, 2), Partition(5, 3)], 0.3, bias=table)[0]

    expected = torch.stack([attend(*each) for each in zip(q, k, v, strict=True)])
    assert torch.equal(torch.vmap(attend)(q, k, v), expected)
    gradient = torch.func.grad(lambda q, k, v: attend(q, k, v).square().sum())
    expected = torch.stack([gradient(x, k[0], z) for x, z in zip(q, v, strict=True)])
    assert torch.equal(torch.vmap(gradient, (0, None, 0))(q, k[0], v), expected)


def test_autocast_gives_the_dtype_of_the_projection():
    linear = torch.nn.Linear(8, 24, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        q, k, v = linear(torch.randn(1, 4, 5, 8, device=DEVICE)).unflatten(-1, (3, 1, 8)).unbind(3)
        out = ops.neighborhood_attention(q, k, v, 3, bias=torch.randn(1, 5, 5, device=DEVICE), backend="triton")
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert linear.weight.grad.dtype == torch.float32


def test_second_derivatives_are_refused():
    q, k, v = torch.randn(3, 1, 4, 4, 1, 8, device=DEVICE, requires_grad=True).unbind(0)
    out = ops.window_attention(q, k, v, 2, backend="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated only once; try backend='eager'"):
        grad.sum().backward()


def test_what_cannot_run_says_why():
    q, k, v = torch.randn(3, 1, 4, 4, 1, 8, dtype=torch.float64, device=DEVICE).unbind(0)
    with pytest.raises(BackendError, match=r"float32, float16 and bfloat16, got torch.float64"):
        ops.window_attention(q, k, v, 2, backend="triton")
    wide = torch.zeros(1, 4, 4, 1, 136, device=DEVICE)
    with pytest.raises(BackendError, match=r"at most 128 channels in torch.float32, got 136 and 136"):
        ops.window_attention(wide, wide, wide, 2, backend="triton")
    meta = q.float().to("meta")
    with pytest.raises(BackendError, match="run on CUDA devices, got tensors on 'meta'"):
        ops.window_attention(meta, meta, meta, 2, backend="triton")
    with explain() as decisions:
        ops.window_attention(q, k, v, 2)
        ops.window_attention(*(x.float() for x in (q, k, v)), 2)
    assert [d.backend for d in decisions] == ["eager", "triton" if DEVICE == "cuda" else "eager"]


def test_a_gpu_without_a_c_compiler_is_left_to_eager(monkeypatch):
    """Triton builds a launcher when it first runs; the eager backend needs nothing."""
    with FakeTensorMode():
        q = torch.empty(1, 4, 4, 1, 8, device="cuda")
    monkeypatch.setattr(support, "_is_old", lambda device: False)
    monkeypatch.setattr(support, "_has_compiler", support._has_compiler.__wrapped__)
    monkeypatch.setenv("CC", "cc")
    problem = SimpleNamespace(tensors=lambda: [q])
    assert support.can_run_tensors(problem) is None
    assert support.automatic(problem) is None
    monkeypatch.delenv("CC")
    monkeypatch.setattr(support.shutil, "which", lambda name: None)
    assert "try to install gcc, or set CC" in support.can_run_tensors(problem)
    monkeypatch.setattr(support, "_is_old", lambda device: True)
    assert "compute capability 8.0" in support.can_run_tensors(problem)


def test_versions_of_triton(monkeypatch):
    def version(name):
        if found is None:
            raise support.importlib.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(support.importlib.metadata, "version", version)
    for found, message in (("3.4.0", None), ("3.10.1+git", None), (None, None), ("3.3.1", "expected Triton 3.4")):
        assert (support._missing.__wrapped__() or "")[:19] == (message or ""), found
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in support._missing.__wrapped__()


def test_position_bias_beyond_the_limit_is_refused(monkeypatch):
    from tests.ops import test_aggregated
    from tests.ops.gradients import leaves
    from visattn.ops.aggregated import triton

    shapes, call, *_ = test_aggregated.PLAIN
    tensors = {n: t.to(DEVICE) for n, t in leaves(shapes, 0, torch.float32).items()}
    monkeypatch.setattr(triton, "_MOST", 12 * 9 * 2 * 6 - 1)
    with pytest.raises(BackendError, match=r"expected at most 1295 heads x queries x pooled keys .* got 1296"):
        ops.aggregated_attention(**tensors, **call, backend="triton")


def test_importing_does_not_import_kernels():
    code = "import sys, visattn; visattn.ops.tune; print([m for m in sys.modules if m.endswith('_kernels')])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"
