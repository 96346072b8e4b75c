"""The registered ops under PyTorch's tracers: opcheck, compile, export, script, fx, meta."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests import tolerances
from tests.tolerances import relative_error
from visattn import ops

WINDOW = ([3, 3], [2, 1], [1, 1], [False, False])


def tensors(requires_grad=True, dtype=torch.float64):
    shapes = [(2, 9, 7, 2, 4)] * 2 + [(2, 9, 7, 2, 3), (2, 5, 5), (2, 3, 2, 4), (2, 3, 2, 3), (2, 3)]
    return [torch.randn(s, dtype=dtype, requires_grad=requires_grad) for s in shapes]


class Neighborhood(torch.nn.Module):
    """The op as a module, the way that models call it."""

    tables = ((2, 5, 5),)

    def forward(self, q, k, v, bias):
        b, h, w, n, d = q.shape
        q, k, v = (torch.ops.visattn.pad_to_at_least(x.reshape(b, h, w, n * d), [6, 3]) for x in (q, k, v))
        q, k, v = (x.reshape(b, x.shape[1], x.shape[2], n, d) for x in (q, k, v))
        out = torch.ops.visattn.neighborhood_attention(q, k, v, [3, 3], [2, 1], [1, 1], [False, False], bias)
        return torch.ops.visattn.fit(out.flatten(3), [h, w])


class Window(torch.nn.Module):
    """Shifted windows, then a grid whose cells grow with the map."""

    tables = ((2, 7, 7), (2, 9, 9))

    def forward(self, q, k, v, bias, table):
        x = torch.ops.visattn.window_attention(q, k, v, [4, 4], [1, 2], False, bias)
        _, h, w, _, _ = q.shape
        size = [-(-h // 2), -(-w // 2)]
        table = torch.ops.visattn.resize_rel_pos(table, [2 * size[0] - 1, 2 * size[1] - 1], "bilinear")
        return torch.ops.visattn.window_attention(x, k, v, size, [0, 0], True, table).flatten(3)


class Halo(torch.nn.Module):
    """Queries at half the resolution, keys outside the map hidden."""

    tables = ((15, 4), (15, 4))

    def forward(self, q, k, v, rel_h, rel_w):
        q = q[:, ::2, ::2]
        return torch.ops.visattn.halo_attention(q, k, v, [4, 4], [2, 2], [2, 2], rel_h, rel_w, True).flatten(3)


class Routed(torch.nn.Module):
    """Both rules of cutting regions, the second with factors that train, per head."""

    tables = ((8, 8),)

    def forward(self, q, k, v, router):
        route = torch.ops.visattn.bilevel_routing_attention
        x = route(q, k, v, [3, 2], 2, "mask", False, True, True, router)
        return route(x, k, v, [2, 2], 40, "zero", True, True, True).flatten(3)


MODULES = [Neighborhood, Window, Halo, Routed]


def module_inputs(module, h=9, w=7, batch=2):
    shape = (batch, h, w, 2, 4)
    return [torch.randn(s, requires_grad=True) for s in (shape, shape, shape, *module.tables)]


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


@pytest.mark.parametrize("with_tables", [False, True])
@pytest.mark.parametrize(
    ("op", "shapes", "args"),
    [
        ("window_attention", [(2, 9, 7, 2, 4)] * 3 + [(2, 7, 7)], lambda q, k, v, t=None: (
            q, k, v, [4, 4], [1, 2], False, t, None, "auto")),
        ("halo_attention", [(2, 5, 4, 2, 4), (2, 9, 7, 2, 4), (2, 9, 7, 2, 3), (15, 4), (15, 4)],
         lambda q, k, v, h=None, w=None: (q, k, v, [4, 4], [2, 2], [2, 2], h, w, True, None, "auto")),
        ("routed_attention", [(2, 9, 7, 2, 4)] * 3 + [(2, 1, 12, 2)], lambda q, k, v, w=None: (
            q, k, v, torch.arange(48).view(2, 1, 12, 2) % 12, [3, 2], [3, 2], w, True, None, "auto")),
        ("bilevel_routing_attention", [(2, 9, 7, 2, 4)] * 3 + [(8, 8), (8,)], lambda q, k, v, w=None, b=None: (
            q, k, v, [3, 4], 2, "mask", False, w is not None, True, w, b, "none", 1, None, "auto")),
    ],
    ids=["window", "halo", "routed", "bilevel"],
)  # fmt: skip
def test_other_opaque_ops(op, shapes, args, with_tables):
    """opcheck, and the same result and gradients as the composite op."""
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes[: None if with_tables else 3]]
    opaque, composite = getattr(torch.ops.visattn, f"{op}_opaque"), getattr(torch.ops.visattn, op)
    torch.library.opcheck(opaque.default, args(*inputs))
    results = []
    for out in (opaque(*args(*inputs)), composite(*args(*inputs))):
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= tolerances.OP[torch.float64]


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_trains(kind, dynamic):
    module = kind()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((9, 7), (4, 11)):
        inputs = module_inputs(kind, *size)
        grads = []
        for run in (module, compiled):
            out = run(*inputs)
            grads.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        for a, b in zip(*grads, strict=True):
            assert relative_error(a, b) <= tolerances.SAME_MODEL


@pytest.mark.parametrize("kind", MODULES)
def test_export_of_known_sizes_is_plain_pytorch(kind):
    inputs = tuple(module_inputs(kind))
    program = torch.export.export(kind(), inputs).run_decompositions()
    assert not [n for n in program.graph.nodes if "visattn" in str(n.target)]
    assert relative_error(program.module()(*inputs), kind()(*inputs)) <= tolerances.SAME_MODEL


@pytest.mark.parametrize("kind", MODULES)
def test_export_with_dynamic_sizes(kind):
    b, h, w = (torch.export.Dim(name, min=low, max=64) for name, low in (("b", 1), ("h", 3), ("w", 3)))
    shapes = {0: b, 1: h, 2: w}
    inputs = tuple(module_inputs(kind, batch=3))
    program = torch.export.export(kind(), inputs, dynamic_shapes=(shapes,) * 3 + (None,) * len(kind.tables))
    for size in ((9, 7, 1), (3, 3, 2), (40, 33, 1)):
        inputs = module_inputs(kind, *size)
        assert relative_error(program.module()(*inputs), kind()(*inputs)) <= tolerances.SAME_MODEL


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


def counted(call, mode=torch.no_grad):
    with mode(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_flops_count_visible_keys_only():
    q, k, v = torch.randn(3, 2, 14, 14, 3, 8, device="meta")
    for kernel, extra in (((7, 7), 0), ((3, 5), 4)):
        ek = torch.randn(2, extra, 3, 8, device="meta") if extra else None
        found = counted(lambda: ops.neighborhood_attention(q, k, v, kernel, extra_k=ek, extra_v=ek))  # noqa: B023
        assert found == 2 * 2 * 14 * 14 * 3 * (kernel[0] * kernel[1] + extra) * (8 + 8)


def test_flops_of_other_ops_count_visible_keys_only():
    q, k, v = torch.randn(3, 2, 9, 14, 3, 8, device="meta")
    table, lists = torch.randn(11, 8, device="meta"), torch.zeros(2, 1, 35, 3, device="meta").long()
    calls = [
        (lambda: ops.window_attention(q, k, v, 7), (7 * 7 + 2 * 2) * (7 * 7 * 2) * 16),
        (lambda: ops.window_attention(q, k, v, 7, grid=True), (5 * 5 + 4 * 4) * (7 * 7 * 2) * 16),
        (lambda: ops.halo_attention(q, k, v, 4, 1, mask_border=False), 9 * 14 * 36 * 16),
        (lambda: ops.halo_attention(q, k, v, 4, 1), (4 * 5 + 4 * 6 + 2) * (4 * 5 + 4 * 6 + 4 * 6 + 2 * 3) * 16),
        (lambda: ops.halo_attention(q, k, v, 4, 1, 1, table, None, False), 9 * 14 * (36 * 16 + 6 * 8)),
        (lambda: ops.routed_attention(q, k, v, lists, 2, (4, 5)), 9 * 14 * 3 * 20 * 16),
        (lambda: ops.bilevel_routing_attention(q, k, v, (3, 7), 4), 9 * 14 * 4 * (3 * 2) * 16),
        (lambda: ops.bilevel_routing_attention(q, k, v, (3, 7), 99), 9 * 14 * 21 * (3 * 2) * 16),
        (lambda: ops.bilevel_routing_attention(q, k, v, (3, 7), 4, kv_pool="avg", kv_size=2), 9 * 14 * 4 * 1 * 16),
    ]
    for call, multiplications in calls:
        assert counted(call) == 2 * 2 * 3 * multiplications


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_flops_are_those_of_the_formula_however_an_op_runs(mode, device, backend):
    q, k, v = (torch.randn(1, 6, 6, 2, 4, device=device, requires_grad=True) for _ in range(3))
    calls = {
        lambda: ops.neighborhood_attention(q, k, v, 3, backend=backend): 9 * 8,
        lambda: ops.neighborhood_attention(q, k, v, 3, return_lse=True, backend=backend): 9 * 8,
        lambda: ops.window_attention(q, k, v, 3, backend=backend): 9 * 8,
        lambda: ops.efficient_attention(q, k, v, backend=backend): 2 * 4 * 4,
    }
    for call, multiplications in calls.items():
        assert counted(call, mode) == 2 * 36 * 2 * multiplications


def test_flops_of_a_backward_pass_are_twice_those_of_the_forward_pass():
    q, k, v = (torch.randn(1, 6, 6, 2, 4, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(ops.window_attention(q, k, v, 3).sum(), (q, k, v))
    with FlopCounterMode(display=False) as counter:
        found = torch.autograd.grad(ops.window_attention(q, k, v, 3).sum(), (q, k, v))
    torch.testing.assert_close(found, expected)
    assert counter.get_total_flops() == 3 * 2 * 36 * 2 * 9 * 8


def test_counting_does_not_break_transforms():
    q, k, v = torch.randn(3, 1, 6, 6, 2, 4)
    gradient = torch.func.grad(lambda q: ops.window_attention(q, k, v, 3).square().sum())
    expected = gradient(q)
    with FlopCounterMode(display=False):
        torch.testing.assert_close(gradient(q), expected)
