"""What tracers see: plain PyTorch or one custom op, its schema, gradients and decomposition; ops in modules."""

from collections.abc import Sequence

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from tests import tolerances
from tests.ops.cases import CASES
from tests.tolerances import relative_error
from visattn import ops
from visattn.ops.geometry import ceil_div
from visattn.ops.registration import custom_op, decompose, known_sizes, register


class Neighborhood(torch.nn.Module):
    """On a map padded to the window."""

    tables = ((2, 5, 5),)

    def forward(self, q, k, v, bias):
        b, h, w, n, d = q.shape
        q, k, v = (ops.pad_to_at_least(x.reshape(b, h, w, n * d), [6, 3]) for x in (q, k, v))
        q, k, v = (x.unflatten(3, (2, 4)) for x in (q, k, v))
        out = ops.neighborhood_attention(q, k, v, kernel_size=[3, 3], dilation=[2, 1], bias=bias)
        return ops.fit(out.flatten(3), [h, w])


class Window(torch.nn.Module):
    """Shifted windows, then a grid whose cells grow with the map."""

    tables = ((2, 7, 7), (2, 9, 9))

    def forward(self, q, k, v, bias, table):
        x = ops.window_attention(q, k, v, window_size=4, shift=(1, 2), bias=bias)
        size = [ceil_div(n, 2) for n in q.shape[1:3]]
        table = ops.resize_rel_pos(table, [2 * n - 1 for n in size], "bilinear")
        return ops.window_attention(x, k, v, window_size=size, grid=True, bias=table).flatten(3)


class Halo(torch.nn.Module):
    """Queries at half the resolution, keys outside the map hidden."""

    tables = ((15, 4), (15, 4))

    def forward(self, q, k, v, rel_h, rel_w):
        q = q[:, ::2, ::2]
        return ops.halo_attention(q, k, v, block_size=4, halo_size=2, stride=2, rel_h=rel_h, rel_w=rel_w).flatten(3)


class Routed(torch.nn.Module):
    """Both rules of cutting regions, the second with factors that train, per head."""

    tables = ((8, 8),)

    def forward(self, q, k, v, router):
        x = ops.bilevel_routing_attention(q, k, v, n_win=(3, 2), topk=2, soft=True, diff=True, router_weight=router)
        options = {"rule": "zero", "per_head": True, "soft": True, "diff": True}
        return ops.bilevel_routing_attention(x, k, v, n_win=(2, 2), topk=40, **options).flatten(3)


class Linear(torch.nn.Module):
    """Attentions of linear cost, then the convolution of what they give with kernels per image."""

    tables = ()

    def forward(self, q, k, v):
        v = ops.inline_attention(q, k, ops.efficient_attention(q, k, v))
        x = ops.focused_linear_attention(q, k, v, q.new_zeros(2, 4)).flatten(3)
        return ops.dynamic_depthwise_conv(x, x.mean((1, 2))[..., None].expand(-1, -1, 9))


MODULES = [Neighborhood, Window, Halo, Routed, Linear]


def module_inputs(module, h=9, w=7, batch=2):
    shape = (batch, h, w, 2, 4)
    return [torch.randn(s, requires_grad=True) for s in (shape, shape, shape, *module.tables)]


@pytest.mark.parametrize("kind", [Window])
def test_export_of_modules_with_dynamic_sizes(kind):
    """Where the window and the table grow with the map."""
    b, h, w = (torch.export.Dim(name, min=low, max=64) for name, low in (("b", 1), ("h", 3), ("w", 3)))
    shapes = ({0: b, 1: h, 2: w},) * 3 + (None,) * len(kind.tables)
    program = torch.export.export(kind(), tuple(module_inputs(kind, batch=3)), dynamic_shapes=shapes)
    plain = decompose(program)
    assert not [node for node in plain.graph.nodes if "visattn" in str(node.target)]
    runs = [p.module() for p in (program, plain)]
    for size in ((9, 7, 1), (3, 3, 2), (40, 33, 1)):
        inputs = module_inputs(kind, *size)
        for run in runs:
            assert relative_error(run(*inputs), kind()(*inputs)) <= tolerances.SAME_MODEL


@pytest.mark.parametrize("name", ["aggregated", "mix"])
def test_compiled_for_a_cpu_the_op_stays_whole(name):
    case, names = CASES[name], set()

    def keep(graph, example_inputs):
        names.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch.compile(case.run, dynamic=False, backend=aot_autograd(fw_compiler=keep))(**case.inputs())
    assert f"visattn.{case.op.__name__}.default" in names


@custom_op(fake=lambda x, sizes, *_: x.new_empty((x.shape[0], *sizes)), flops=lambda x, *_: x.numel())
def scale_in_a_test(x: Tensor, sizes: Sequence[int], other: Tensor | None = None, factor: float = 2.0) -> Tensor:
    """A view if nothing is scaled."""
    x = x.reshape(x.shape[0], *sizes) if factor == 1 else factor * x.reshape(x.shape[0], *sizes)
    return x if other is None else x * other


SCALE = torch.ops.visattn.scale_in_a_test


def test_schema_comes_from_the_annotations():
    expected = "visattn::scale_in_a_test(Tensor x, SymInt[] sizes, Tensor? other, float factor) -> Tensor[]"
    assert str(SCALE.default._schema) == expected
    backward = torch.ops.visattn.scale_in_a_test_backward.default
    assert str(backward._schema) == expected.replace("(", "_backward(Tensor[] grads, bool[] needs, ")


def graph_of(function, *args, **options):
    return [str(node.target) for node in make_fx(function, **options)(*args).graph.nodes]


def test_only_sizes_that_are_cut_by_make_a_custom_op():
    x = torch.randn(4, 6)
    whole = "visattn.scale_in_a_test.default"
    assert whole not in graph_of(lambda x: scale_in_a_test(x, [2, 3]), x)
    assert whole in graph_of(lambda x: scale_in_a_test(x, [x.shape[1]]), x, tracing_mode="symbolic")
    sizes = {"x": {0: torch.export.Dim("b", min=1, max=9)}}

    class Scale(torch.nn.Module):
        def forward(self, x):
            assert known_sizes(x, [2, 3], None)
            assert not known_sizes(x, [2, x.shape[0]])
            assert not known_sizes(x.t())
            return scale_in_a_test(x, [2, 3])

    program = torch.export.export(Scale(), (x,), dynamic_shapes=sizes)
    assert whole not in [str(node.target) for node in program.graph.nodes]


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)], ids=str)
def test_custom_op_has_the_gradients_that_are_asked_for(trained):
    found = []
    for run in (scale_in_a_test, lambda *args: SCALE(*args)[0]):
        inputs = [t.requires_grad_(on) for t, on in zip(torch.ones(2, 4, 6).unbind(0), trained, strict=True)]
        out = run(inputs[0], [6], inputs[1], 3.0)
        found.append([out, *torch.autograd.grad(out.square().sum(), [t for t in inputs if t.requires_grad])])
    assert len(found[0]) == 1 + sum(trained)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_custom_op_returns_no_view_of_its_inputs():
    x = torch.randn(4, 6)
    assert scale_in_a_test(x, [2, 3], None, 1.0).data_ptr() == x.data_ptr() != SCALE(x, [2, 3], None, 1.0)[0].data_ptr()


def test_decomposition_that_does_not_exist_says_why():
    def double(x: Tensor, size: int) -> Tensor:
        return 2 * x

    def refuse(x, size):
        raise NotImplementedError("double: as many parts as the map has rows")

    whole = register("test_only_double", double, lambda x, size: torch.empty_like(x), decomposition=refuse)

    class Double(torch.nn.Module):
        def forward(self, x):
            return whole(x, x.shape[1])

    program = torch.export.export(Double(), (torch.randn(2, 5),), dynamic_shapes={"x": {1: torch.export.Dim("n")}})
    with pytest.raises(NotImplementedError, match="as many parts as the map has rows"):
        decompose(program)


def test_counting_does_not_break_transforms():
    q, k, v = torch.randn(3, 1, 6, 6, 2, 4)
    gradient = torch.func.grad(lambda q: ops.window_attention(q, k, v, 3).square().sum())
    expected = gradient(q)
    with FlopCounterMode(display=False):
        torch.testing.assert_close(gradient(q), expected)
