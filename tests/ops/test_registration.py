"""The registered ops under PyTorch's tracers: opcheck, compile, export, script, fx, meta."""

import pytest
import torch

from tests import tolerances
from tests.tolerances import relative_error
from visattn import ops

WINDOW = ([3, 3], [2, 1], [1, 1], [False, False])


def tensors(requires_grad=True, dtype=torch.float64):
    shapes = [(2, 9, 7, 2, 4)] * 2 + [(2, 9, 7, 2, 3), (2, 5, 5), (2, 3, 2, 4), (2, 3, 2, 3), (2, 3)]
    return [torch.randn(s, dtype=dtype, requires_grad=requires_grad) for s in shapes]


class Attend(torch.nn.Module):
    """The op as a module, the way that models call it."""

    def forward(self, q, k, v, bias):
        b, h, w, n, d = q.shape
        q, k, v = (torch.ops.visattn.pad_to_at_least(x.reshape(b, h, w, n * d), [6, 3]) for x in (q, k, v))
        q, k, v = (x.reshape(b, x.shape[1], x.shape[2], n, d) for x in (q, k, v))
        out = torch.ops.visattn.neighborhood_attention(q, k, v, [3, 3], [2, 1], [1, 1], [False, False], bias)
        return torch.ops.visattn.fit(out.flatten(3), [h, w])


def module_inputs(h=9, w=7, batch=2):
    shape = (batch, h, w, 2, 4)
    return [torch.randn(s, requires_grad=True) for s in (shape, shape, shape, (2, 5, 5))]


@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck_opaque(return_lse):
    """Its backward op is reached through it; alone, opcheck cannot look inside that kernel's functional transform."""
    args = (*tensors(), *WINDOW, None, "auto", return_lse)
    torch.library.opcheck(torch.ops.visattn.neighborhood_attention_opaque.default, args)


@pytest.mark.parametrize("size", [[4, 9], [9, 4], [5, 7]])
def test_opcheck_fit(size):
    torch.library.opcheck(torch.ops.visattn.fit_opaque.default, (torch.randn(2, 5, 7, 3, requires_grad=True), size))


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("given", [3, 4, 6, 7])
def test_opaque_equals_composite(return_lse, given):
    """With the first `given` tensors: plain, bias, extra keys, extra bias."""
    inputs = [t if i < given else None for i, t in enumerate(tensors())]
    results = []
    for op in ("opaque", "composite"):
        leaves = [t if t is None else t.detach().clone().requires_grad_() for t in inputs]
        q, k, v, *rest = leaves
        if op == "opaque":
            out = torch.ops.visattn.neighborhood_attention_opaque(*leaves, *WINDOW, None, "auto", return_lse)
        else:
            out = ops.neighborhood_attention(q, k, v, *WINDOW, *rest, return_lse=return_lse)
        out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.numel()]
        torch.autograd.backward(out, [torch.full_like(o, 0.1) + o.detach() for o in out])
        results.append([o.detach() for o in out] + [t.grad for t in leaves if t is not None])
    assert len(results[0]) == len(results[1]) == 1 + return_lse + given
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= tolerances.OP[torch.float64]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_trains(dynamic):
    module = Attend()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((9, 7), (4, 11)):
        inputs = module_inputs(*size)
        grads = []
        for run in (module, compiled):
            out = run(*inputs)
            grads.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        for a, b in zip(*grads, strict=True):
            assert relative_error(a, b) <= tolerances.SAME_MODEL


def test_export_of_known_sizes_is_plain_pytorch():
    inputs = tuple(module_inputs())
    program = torch.export.export(Attend(), inputs).run_decompositions()
    assert not [n for n in program.graph.nodes if "visattn" in str(n.target)]
    assert relative_error(program.module()(*inputs), Attend()(*inputs)) <= tolerances.SAME_MODEL


def test_export_with_dynamic_sizes():
    b, h, w = (torch.export.Dim(name, min=low, max=64) for name, low in (("b", 1), ("h", 3), ("w", 2)))
    shapes = {0: b, 1: h, 2: w}
    program = torch.export.export(Attend(), tuple(module_inputs(batch=3)), dynamic_shapes=(shapes,) * 3 + (None,))
    for size in ((9, 7, 1), (3, 2, 2), (40, 33, 1)):
        inputs = module_inputs(*size)
        assert relative_error(program.module()(*inputs), Attend()(*inputs)) <= tolerances.SAME_MODEL


def test_script_and_meta():
    class Scripted(torch.nn.Module):
        def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            x = torch.ops.visattn.pad_to_multiple(x, [4, 4])
            b, h, w, c = x.shape
            q = x.reshape(b, h, w, 2, c // 2)
            return torch.ops.visattn.neighborhood_attention(q, q, q, [3, 3], [1, 1], [1, 1], [False, False], bias)

    x, bias = torch.randn(1, 7, 9, 8), torch.randn(2, 5, 5)
    expected = Scripted()(x, bias)
    torch.testing.assert_close(torch.jit.script(Scripted())(x, bias), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(Scripted())(x, bias), expected)
    assert Scripted()(x.to("meta"), bias.to("meta")).shape == expected.shape == (1, 8, 12, 2, 4)


def test_flops_count_visible_keys_only():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = torch.randn(3, 2, 14, 14, 3, 8, device="meta")
    for kernel, extra in (((7, 7), 0), ((3, 5), 4)):
        ek = torch.randn(2, extra, 3, 8, device="meta") if extra else None
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            ops.neighborhood_attention(q, k, v, kernel, extra_k=ek, extra_v=ek)
        assert counter.get_total_flops() == 2 * 2 * 14 * 14 * 3 * (kernel[0] * kernel[1] + extra) * (8 + 8)
