"""Aggregated attention under PyTorch's tracers: opcheck, compile, export, fx, meta, and its FLOPs."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental import _config as config

from tests import tolerances
from tests.ops.gradients import leaves
from tests.ops.test_aggregated import MAPS, shapes_of
from tests.tolerances import relative_error
from visattn.ops import aggregated_attention, avg_pool_grid
from visattn.ops.geometry import Pooled
from visattn.ops.registration import decompose


def traced(q, pool_k, pool_v, temperature, embedding, w1, b1, w2, b2, k, v, bias, tokens, token_bias):
    """As the layer calls it."""
    out = aggregated_attention(
        q, pool_k, pool_v, temperature, embedding, w1, b1, w2, b2, [7, 7], [], k, v, 3, bias, tokens, token_bias
    )
    return out.flatten(3)


class Traced(torch.nn.Module):
    """Pools its own keys, so that their number follows the map's size."""

    def forward(self, x, *parameters):
        pooled = avg_pool_grid(x.flatten(3), [4, 4]).unflatten(-1, x.shape[3:])
        return traced(x, pooled, pooled, *parameters[:6], x, x, *parameters[6:])


def traced_inputs(*size, batch=2):
    shapes = shapes_of(batch, size, (1, 1), 2, 4, kernel=3)
    tensors = leaves(shapes, 0, torch.float32)
    return [t.requires_grad_() for n, t in tensors.items() if n == "q" or n not in MAPS]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_trains(dynamic):
    compiled = torch.compile(Traced(), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((9, 7), (4, 11)):
        inputs = traced_inputs(*size)
        grads = []
        for run in (Traced(), compiled):
            out = run(*inputs)
            grads.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        for a, b in zip(*grads, strict=True):
            assert relative_error(a, b) <= tolerances.SAME_MODEL


def test_compiled_for_a_cpu_it_stays_whole():
    names = set()

    def keep(graph, example_inputs):
        names.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch.compile(Traced(), dynamic=False, backend=aot_autograd(fw_compiler=keep))(*traced_inputs(9, 7))
    assert "visattn.aggregated_attention.default" in names


def test_export_with_dynamic_sizes():
    """PyTorch gives graphs of their own to tensors with a size of 1, here to maps with a single pooled row."""
    b, h, w = (torch.export.Dim(name, min=low, max=64) for name, low in (("b", 1), ("h", 8), ("w", 8)))
    inputs = tuple(traced_inputs(9, 17, batch=3))
    shapes = ({0: b, 1: h, 2: w}, (None,) * (len(inputs) - 1))
    program = torch.export.export(Traced(), inputs, dynamic_shapes=shapes)
    for size in ((9, 17), (8, 8), (40, 33)):
        inputs = traced_inputs(*size, batch=1)
        assert relative_error(program.module()(*inputs), Traced()(*inputs)) <= tolerances.SAME_MODEL


@pytest.mark.parametrize("kernel", [None, 3])
@pytest.mark.parametrize("bias_size", [[], [8, 8, 2, 2]])
def test_custom_op(kernel, bias_size):
    """opcheck, and the same result and gradients as the public function."""
    tensors = leaves(shapes_of(2, (9, 7), (2, 3), 2, 4, kernel=kernel), 0)
    tensors = {n: t.requires_grad_() for n, t in tensors.items()}
    names = ("k", "v", "local_bias", "tokens", "token_bias")
    k, v, *local = (tensors.get(n) for n in names)
    args = (*(t for n, t in tensors.items() if n not in names), [7, 7], bias_size, k, v, 3, *local, "auto")
    op = torch.ops.visattn.aggregated_attention.default
    torch.library.opcheck(op, args)
    results = []
    for out in (op(*args)[0], aggregated_attention(*args)):
        results.append([out, *torch.autograd.grad(out.square().sum(), list(tensors.values()))])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= tolerances.OP[torch.float64] * max(1, b.norm())


torch.fx.wrap("aggregated_attention")


def test_fx_and_meta():
    class Plain(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, e: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return aggregated_attention(x, x, x, t, e, w.t(), w[0], w, t, [7, 7])

    given = (torch.randn(1, 3, 4, 2, 8), torch.randn(2), torch.randn(2, 8), torch.randn(2, 5))
    expected = Plain()(*given)
    torch.testing.assert_close(torch.fx.symbolic_trace(Plain())(*given), expected)
    assert Plain()(*(t.to("meta") for t in given)).shape == expected.shape


def test_flops_count_what_takes_part():
    from torch.utils.flop_counter import FlopCounterMode

    shapes = shapes_of(2, (8, 5), (2, 2), 3, 4, hidden=6, width=7, kernel=3)
    tensors = {n: torch.randn(s, device="meta") for n, s in shapes.items()}
    with FlopCounterMode(display=False) as counter:
        aggregated_attention(**tensors, pretrain_size=7)
    pairs = (8 + 7 + 7) * (5 + 4 + 4) + 8 * 5 * 4
    bias = len(Pooled(8, 2).distances) * len(Pooled(5, 2).distances) * 6 * (2 + 3)
    assert counter.get_total_flops() == 2 * (2 * 3 * (pairs * (4 + 7) + 8 * 5 * 9 * 4) + bias)


class Sized(Traced):
    """With the position bias computed for another map, or for a fixed number of pooled keys."""

    def __init__(self, kernel, bias_size, pool_size):
        super().__init__()
        self.kernel, self.bias_size, self.pool_size = kernel, bias_size, pool_size

    def forward(self, x, temperature, embedding, w1, b1, w2, b2, bias, tokens, token_bias):
        pooled = avg_pool_grid(x.flatten(3), [4, 4], self.pool_size).unflatten(-1, x.shape[3:])
        local = {"k": x, "v": x, "local_bias": bias, "tokens": tokens, "token_bias": token_bias}
        parameters = (temperature, embedding, w1, b1, w2, b2, [7, 7], self.bias_size)
        return aggregated_attention(x, pooled, pooled, *parameters, **(local if self.kernel else {})).flatten(3)


@pytest.mark.parametrize(
    ("kernel", "bias_size", "pool_size"), [(True, [], []), (True, [8, 8, 2, 2], []), (False, [], [2, 2])], ids=str
)
def test_decomposition_is_right_for_every_size(kernel, bias_size, pool_size):
    """Exported with symbolic batch, height and width; plain PyTorch; also one image, and one pooled key."""
    module = Sized(kernel, bias_size, pool_size)

    def inputs(batch, *size):
        return tuple(t.detach().double() for t in traced_inputs(*size, batch=batch))

    b, h, w = (torch.export.Dim(name, min=low, max=64) for name, low in (("b", 1), ("h", 2), ("w", 2)))
    example = inputs(3, 9, 17)
    shapes = ({0: b, 1: h, 2: w}, *(None,) * (len(example) - 1))
    with config.patch(backed_size_oblivious=True):
        program = torch.export.export(
            module, example, dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
        )
    program = decompose(program)
    assert not [node for node in program.graph.nodes if "visattn" in str(node.target)]
    for size in ((3, 9, 17), (1, 33, 47), (2, 8, 8), (1, 4, 7), (2, 2, 3)):
        assert relative_error(program.module()(*inputs(*size)), module(*inputs(*size))) <= tolerances.OP[torch.float64]


@pytest.mark.parametrize("bias_size", [[], [8, 8, 2, 2]], ids=str)
def test_a_dynamic_batch_leaves_plain_pytorch(bias_size):
    module = Sized(True, bias_size, [])
    shapes = ({0: torch.export.Dim("b", min=1, max=64)}, *(None,) * 9)
    program = torch.export.export(module, tuple(traced_inputs(9, 7)), dynamic_shapes=shapes)
    assert not [node for node in program.graph.nodes if "visattn" in str(node.target)]
    traced = torch.jit.trace(module, tuple(traced_inputs(9, 7)), check_trace=False)
    for batch in (1, 3):
        inputs = traced_inputs(9, 7, batch=batch)
        assert torch.equal(program.module()(*inputs), module(*inputs))
        assert torch.equal(traced(*inputs), module(*inputs))
