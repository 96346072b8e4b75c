"""What every layer keeps: shapes, gradients, no images, autocast, tracing, exporting; and what it refuses."""

import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tests.tolerances import OP, SAME_MODEL, relative_error
from visattn import layers


class Tokens(nn.Module):
    """A token mixer for maps of 8 x 6 and dim 12; the first pixels once more as prefix tokens."""

    def __init__(self, name, **args):
        super().__init__()
        self.attn = layers.create_token_mixer(name, 12, 2, (8, 6), **args)
        self.prefix = self.attn.num_prefix_tokens

    def forward(self, x):
        if not self.prefix:
            return self.attn(x)
        size, x = [x.shape[1], x.shape[2]], x.flatten(1, 2)
        return self.attn(torch.cat([x[:, : self.prefix], x], 1), size)[:, self.prefix :].unflatten(1, size)


@dataclass(frozen=True)
class Case:
    """A layer; maps are [B, H, W, 12], or [B, 12, H, W] with `first`; the result has ceil(size / stride)."""

    build: object
    first: bool = False
    stride: int = 1
    dim: int = 12
    smallest: int = 4


def net(**options):
    return nn.Sequential(
        layers.ConvStem(12, 8, same_pad=True), layers.MBConv(8, 16, 2, **options), layers.MBConv(16, 16, 2, **options)
    )


def log_table():
    return layers.GlobalAttention(12, 2, 4, attn_dim=16, rel_pos=layers.LogRelPos(2, 8))


CASES = {
    "neighborhood": Case(lambda: layers.NeighborhoodAttention(12, 2, 3, 2)),
    "global": Case(lambda: layers.GlobalAttention(12, 2, (8, 6))),
    "global, computed table": Case(log_table),
    "window": Case(lambda: layers.WindowAttention(12, 2, 4)),
    "grid": Case(lambda: layers.WindowAttention(12, 2, (4, 3), grid=True)),
    "growing windows": Case(lambda: layers.WindowAttention(12, 2, None, 2, 4)),
    "shifted window": Case(lambda: layers.ShiftedWindowAttention(12, 2, 4, shifted=True)),
    "shifted window, no table": Case(lambda: layers.ShiftedWindowAttention(12, 2, 4, shifted=True, rel_pos=False)),
    "stripes": Case(lambda: layers.CrossShapedAttention(12, 2, 3)),
    "no stripes": Case(lambda: layers.CrossShapedAttention(12, 2, None)),
    "lepe": Case(lambda: layers.LePEAttention(12, 2, 3)),
    "routing": Case(lambda: layers.BiLevelRoutingAttention(12, 2, 2, 2)),
    "routing, padded": Case(lambda: layers.BiLevelRoutingAttention(12, 2, 2, 2, padding="project")),
    "aggregated": Case(lambda: layers.AggregatedAttention(12, 2, 3, 2, 8)),
    "cosine": Case(lambda: layers.CosineAttention(12, 2, 8, 4)),
    "gated positional": Case(lambda: nn.Sequential(layers.GatedPositionalAttention(12, 2))),
    "halo": Case(lambda: layers.HaloAttention(12, num_heads=2, block_size=4, halo_size=1), True),
    "halo, pooled": Case(lambda: layers.HaloAttention(12, 16, 2, None, 5, 1, 2), True, 2, 16),
    "efficient, module": Case(lambda: nn.Sequential(layers.EfficientAttention2d(12, 8, 2, 4)), True),
    "contmix": Case(lambda: layers.ContMixBlock(8, 4, 2, 5, 3, layer_scale=1.0), True),
    "dilated": Case(lambda: layers.DilatedReparam(12, 7), True),
    "split": Case(lambda: layers.SplAt(12), True),
    "conv glu": Case(lambda: layers.ConvGLU(12, 8)),
    "merging": Case(lambda: layers.PatchMerging(12), stride=2, dim=24),
    "merging, stride 1": Case(lambda: layers.PatchMerging(12, 1, 2), dim=24),
    "downsampler": Case(lambda: layers.ConvDownsampler(12), stride=2, dim=24),
    "downsampler, stride 1": Case(lambda: layers.ConvDownsampler(12, True, 1, 2), dim=24),
    "patches, stride 1": Case(lambda: layers.PatchConv(12, 16, 2, 1, dilation=2), True, dim=16),
    "mbconv, same": Case(lambda: net(same_pad=True), True, 8, 16, 9),
    "mbconv, pool": Case(lambda: net(stride_mode="pool"), True, 8, 16, 9),
    "mbconv, max3": Case(lambda: net(pool="max3"), True, 8, 16, 9),
    "softmax, reduced keys": Case(lambda: Tokens("softmax", sr_ratio=2)),
    "agent": Case(lambda: Tokens("agent", num_agents=9)),
    "agent, prefix": Case(lambda: Tokens("agent", num_agents=4, num_prefix_tokens=2)),
    "agent, other agents": Case(lambda: Tokens("agent", num_agents=4, agent_size=(3, 5))),
    "agent, reduced keys": Case(lambda: Tokens("agent", num_agents=9, sr_ratio=2)),
    "inline": Case(lambda: Tokens("inline", kernel_func="exp", lepe=True, num_prefix_tokens=2)),
    "inline, reduced keys": Case(lambda: Tokens("inline", sr_ratio=2, lepe=True)),
    "focused": Case(lambda: Tokens("focused", num_prefix_tokens=2, kernel_size=3)),
    "focused, reduced keys": Case(lambda: Tokens("focused", sr_ratio=2)),
    "flow": Case(lambda: Tokens("flow", num_prefix_tokens=2)),
    "flow, reduced keys": Case(lambda: Tokens("flow", sr_ratio=2)),
    "relu, lcm, prefix": Case(lambda: Tokens("relu_linear", floor=1e-3, lcm=True, num_prefix_tokens=2)),
    "relu, lcm, reduced keys": Case(lambda: Tokens("relu_linear", lcm=True, sr_ratio=2)),
    "efficient": Case(lambda: Tokens("efficient")),
    "efficient, reduced keys": Case(lambda: Tokens("efficient", sr_ratio=2)),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def layer(case):
    return case.build().eval()


def maps(case, batch, height, width):
    return torch.randn((batch, 12, height, width) if case.first else (batch, height, width, 12))


@pytest.mark.parametrize("size", [(8, 6), (9, 13), (5, 20)], ids=str)
def test_shapes_and_gradients(case, layer, size):
    x = maps(case, 2, *size).requires_grad_()
    out = layer(x)
    height, width = (-(-n // case.stride) for n in size)
    assert out.shape == ((2, case.dim, height, width) if case.first else (2, height, width, case.dim))
    out.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, *layer.parameters()))


@torch.no_grad()
def test_no_images(case, layer):
    assert layer(maps(case, 0, 9, 13)).shape[0] == 0


def test_autocast(case, layer):
    x = maps(case, 2, 9, 13)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().square().sum().backward()
    assert relative_error(out, expected) <= 2 * OP[torch.bfloat16]
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@torch.no_grad()
def test_fx_and_export_with_dynamic_sizes(case, layer):
    dims = [torch.export.Dim(n, min=low, max=64) for n, low in (("b", 1), ("h", case.smallest), ("w", case.smallest))]
    shapes = dict(zip((0, 2, 3) if case.first else (0, 1, 2), dims, strict=True))
    program = torch.export.export(layer, (maps(case, 2, 16, 20),), dynamic_shapes=(shapes,)).module()
    traced = torch.fx.symbolic_trace(layer)
    for size in ((1, 9, 2 * case.smallest), (3, case.smallest, 13), (2, 33, 47)):
        x = maps(case, *size)
        for run in (traced, program):
            assert relative_error(run(x), layer(x)) <= SAME_MODEL


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_takes_any_batch(case, layer):
    traced = torch.jit.trace(layer, maps(case, 2, 9, 13), check_trace=False)
    for batch in (1, 3):
        x = maps(case, batch, 9, 13)
        assert relative_error(traced(x), layer(x)) <= SAME_MODEL


@torch.no_grad()
def test_export_with_a_dynamic_batch_needs_no_visattn(case, layer):
    shapes = ({0: torch.export.Dim("b", min=1, max=64)},)
    program = torch.export.export(layer, (maps(case, 2, 9, 13),), dynamic_shapes=shapes)
    assert not [n for n in program.graph.nodes if "visattn" in str(n.target)]
    for batch in (1, 3):
        x = maps(case, batch, 9, 13)
        assert relative_error(program.module()(x), layer(x)) <= SAME_MODEL


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_layer_trains(case, layer, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    x, results = maps(case, 2, 9, 13), []
    for run in (layer, compiled):
        out = run(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= SAME_MODEL * max(1, b.norm())


REFUSALS = [
    (lambda: layers.NeighborhoodAttention(10, 3), "expected dim divisible by num_heads, got 10 and 3"),
    (lambda: layers.ShiftedWindowAttention(10, 3), "expected dim divisible by num_heads, got 10 and 3"),
    (lambda: layers.ShiftedWindowAttention(8, 2, 0), "expected window_size of one int or two, at least 1, got 0"),
    (lambda: layers.ShiftedWindowAttention(8, 2, (3, 3, 3)), "expected window_size of one int or two"),
    (lambda: layers.WindowAttention(8, 2, 0), "expected window_size of one int or two, at least 1, got 0"),
    (lambda: layers.WindowAttention(8, 2, (7, 7, 7)), "expected window_size of one int or two"),
    (lambda: layers.WindowAttention(8, 2, None), "expected table_size where window_size is None.*try table_size=7"),
    (lambda: layers.WindowAttention(8, 2, None, 0, 7), "expected num_windows .* got 0"),
    (lambda: layers.WindowAttention(8, 3), "expected dim divisible by num_heads, got 8 and 3"),
    (lambda: layers.CrossShapedAttention(8, 2, 0), "expected split_size .* got 0 and 2; try split_size=None"),
    (lambda: layers.CrossShapedAttention(8, 1), "an even number of heads, got 7 and 1"),
    (lambda: layers.CrossShapedAttention(8, 3, None), "expected dim divisible by num_heads, got 8 and 3"),
    (lambda: layers.HaloAttention(10, num_heads=4), "expected dim and dim_out divisible by 4 heads, got 10 and 10"),
    (lambda: layers.HaloAttention(8, 10, 4), "got 8 and 10"),
    (lambda: layers.HaloAttention(8, stride=3), "expected stride 1 or 2, got 3"),
    (lambda: layers.HaloAttention(8, block_size=0), "expected block_size >= 1 and halo_size >= 0, got 0 and 3"),
    (lambda: layers.HaloAttention(8, halo_size=-1), "got 8 and -1"),
    (lambda: layers.SplAt(48, 5, 1), r"expected channels and hidden channels in groups of equal width, got \d+"),
    (lambda: layers.SplAt(48, 2, 5), r"in groups of equal width, got \d+"),
    (lambda: layers.SplAt(48, 0, 1), r"in groups of equal width, got \d+"),
    (lambda: layers.SplAt(60, 1, 12), r"in groups of equal width, got \d+"),
    (lambda: layers.MBConv(8, stride=3), "expected stride 1 or 2, got 3"),
    (lambda: layers.MBConv(8, stride_mode="conv2"), "expected stride_mode 'dw', 'conv1' or 'pool', got 'conv2'"),
    (lambda: layers.create_pool("avg"), "expected a pool of 'avg2', 'avg3', 'max2' or 'max3', got 'avg'"),
    (lambda: layers.LePEAttention(12, 3, lepe_on="v"), "expected lepe_on 'input' or 'value', got 'v'"),
    (lambda: layers.EfficientAttention2d(12, 10, 3, 9), "key_channels and value_channels divisible .* got 10, 9 and 3"),
    (lambda: layers.EfficientAttention2d(12, 9, 3, 10), "key_channels and value_channels divisible .* got 9, 10 and 3"),
    (lambda: Tokens("agent", num_agents=8), "expected num_agents to be a square, got 8; try 4"),
    (lambda: Tokens("agent", num_agents=0), "expected num_agents to be a square, got 0; try 1"),
    (lambda: Tokens("agent", agent_size=(3, 0)), r"expected agent_size of 2 ints >= 1, got \(3, 0\)"),
    (
        lambda: Tokens("agent", num_agents=4, num_prefix_tokens=1, agent_size=(3, 5)),
        "expected agent_size of 4 agents with prefix tokens, .* got",
    ),
    (lambda: layers.ContMixBlock(12, num_heads=5), r"expected dim divisible by 2 \* num_heads, got 12 and 5"),
    (lambda: layers.ContMixBlock(8, small_kernel=4), "expected odd kernels, small_kernel at most .*, got 4 and 7"),
    (lambda: layers.DilatedReparam(8, 6), r"expected a kernel_size of \[5, 7, .*\], got 6"),
    (lambda: layers.create_token_mixer("agent", 12, 5, (7, 7)), "expected dim divisible by num_heads"),
    (lambda: Tokens("agent", num_prefix_tokens=1, sr_ratio=2), "expected no prefix tokens with sr_ratio 2, got 1"),
    (lambda: Tokens("inline", kernel_func="gelu"), "expected kernel_func 'identity', .* or 'exp', got 'gelu'"),
    (lambda: Tokens("focused", kernel_size=4), "expected an odd kernel_size, got 4"),
    (lambda: Tokens("focused", focusing_factor=0), "expected focusing_factor > 0, got 0"),
    (lambda: Tokens("relu_linear", floor=-1.0), "expected floor > 0, got -1.0"),
]


@pytest.mark.parametrize(("build", "message"), REFUSALS, ids=[re.sub(r"\W+", "_", message) for _, message in REFUSALS])
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
