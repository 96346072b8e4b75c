"""The table behind the contract test: how to call each op, on small maps and on any that it accepts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from tests.ops.gradients import leaves
from visattn import ops
from visattn.ops.geometry import ceil_div

SIZE = (2, 9, 7, 2, 4)  # batch, height, width, heads, channels of a head


def maps(b, h, w, n, d, value_dim=None):
    """q, k, v on the same map."""
    return {"q": (b, h, w, n, d), "k": (b, h, w, n, d), "v": (b, h, w, n, value_dim or d)}


@st.composite
def common(draw, most, dims=(1, 4, 24), axes=(1, 2, 3)):
    """Batch, number of axes, heads, channels and those of values, whether views are strided, seed."""
    dim = draw(st.sampled_from(dims))
    number = draw(st.sampled_from(axes))
    value_dim = draw(st.sampled_from([dim, 3]))
    batch, heads, seed = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(0, 2**31))
    size = [draw(st.integers(1, most[number])) for _ in range(number)]
    return batch, size, heads, dim, value_dim, draw(st.booleans()), seed


@contextlib.contextmanager
def settled(values):
    """With the attributes {dotted path: value} set."""
    with pytest.MonkeyPatch.context() as patch:
        for path, value in values.items():
            patch.setattr(path, value)
        yield


SCALES = st.sampled_from([None, 0.7])


def neighborhood(window, shape, value_dim=24, bias=True, extra=3, extra_bias="query", scale=None, lse=False,
                 strided=True, seed=0, visible=None):  # fmt: skip
    """A problem for `gradients.check`; window is (kernel_size, dilation, stride, is_causal), visible a part of keys."""
    batch, *size, heads, dim = shape
    shapes = {"q": shape, "k": shape, "v": (*shape[:-1], value_dim)}
    if bias:
        shapes["bias"] = (heads, *(2 * k - 1 for k in window[0]))
    if extra:
        shapes["extra_k"], shapes["extra_v"] = (batch, extra, heads, dim), (batch, extra, heads, value_dim)
        biases = {"query": (*size, 1, extra), "head": (heads, extra), "image": (batch, *size, heads, extra)}
        if extra_bias:
            shapes["extra_bias"] = biases[extra_bias]
    names = ("kernel_size", "dilation", "stride", "is_causal")
    call = {**dict(zip(names, window, strict=True)), "scale": scale, "return_lse": lse}
    if visible is not None:
        call["key_mask"] = torch.rand(shape[:-2], generator=torch.Generator().manual_seed(seed)) < visible
    return shapes, call, strided, seed


@st.composite
def neighborhood_problems(draw):
    """1-3 axes, odd sizes, ragged dilation groups, strides with and without a bias, extra keys, hidden keys."""
    batch, size, heads, dim, value_dim, strided, seed = draw(common({1: 40, 2: 9, 3: 3}))
    kernel = [draw(st.integers(1, min(7, {1: 40, 2: 9, 3: 3}[len(size)]))) for _ in size]
    dilation = [draw(st.integers(1, 3)) for _ in size]
    stride = [draw(st.integers(1, k)) for k in kernel]
    bias = draw(st.booleans())
    causal = [not bias and draw(st.booleans()) for _ in size]
    size = [k * d + n - 1 for k, d, n in zip(kernel, dilation, size, strict=True)]
    extra, extra_bias = draw(st.sampled_from([0, 0, 1, 3])), draw(st.sampled_from([None, "query", "head", "image"]))
    shape, lse = (batch, *size, heads, dim), draw(st.booleans())
    window, visible = (kernel, dilation, stride, causal), draw(st.sampled_from([None, None, 0.0, 0.2, 0.8]))
    return neighborhood(window, shape, value_dim, bias, extra, extra_bias, draw(SCALES), lse, strided, seed, visible)


@st.composite
def window_problems(draw):
    """1-3 axes, maps smaller than the window, partial windows."""
    most = {1: 30, 2: 9, 3: 4}
    batch, size, heads, dim, value_dim, strided, seed = draw(common(most))
    window, grid = [draw(st.integers(1, most[len(size)] + 1)) for _ in size], draw(st.booleans())
    shape = (batch, *size, heads, dim)
    shapes = {"q": shape, "k": shape, "v": (*shape[:-1], value_dim)}
    if draw(st.booleans()):
        shapes["bias"] = (heads, *(2 * w - 1 for w in window))
    shift = [0 if grid else draw(st.integers(0, w - 1)) for w in window]
    call = {"window_size": window, "shift": shift, "grid": grid}
    return shapes, {**call, "scale": draw(SCALES), "return_lse": draw(st.booleans())}, strided, seed


@st.composite
def halo_problems(draw):
    """Maps smaller than a block, halos wider than a block, strides, one table or none."""
    batch, size, heads, dim, value_dim, strided, seed = draw(common({2: 11}, axes=[2]))
    stride = [draw(st.integers(1, 3)) for _ in size]
    block = [s * draw(st.integers(1, 4)) for s in stride]
    halo = [draw(st.integers(0, 4)) for _ in size]
    shapes = maps(batch, *size, heads, dim, value_dim)
    shapes["q"] = (batch, *(ceil_div(n, s) for n, s in zip(size, stride, strict=True)), heads, dim)
    for name, b, h in zip(("rel_h", "rel_w"), block, halo, strict=True):
        if draw(st.booleans()):
            shapes[name] = (2 * (b + 2 * h) - 1, dim)
    call = {"block_size": block, "halo_size": halo, "stride": stride, "return_lse": draw(st.booleans())}
    return shapes, {**call, "mask_border": draw(st.booleans()), "scale": draw(SCALES)}, strided, seed


@st.composite
def routed_problems(draw):
    """Lists with repetitions, per head or not, maps of different sizes, factors."""
    batch, size, heads, dim, value_dim, strided, seed = draw(common({2: 9}, axes=[2]))
    kv_size, region, kv_region = ([draw(st.integers(1, n)) for _ in size] for n in (9, 4, 4))
    regions = [ceil_div(h, a) * ceil_div(w, b) for (h, w), (a, b) in ((size, region), (kv_size, kv_region))]
    lists = (batch, draw(st.sampled_from([1, heads])), regions[0], draw(st.integers(1, min(5, regions[1]) + 1)))
    shapes = maps(batch, *kv_size, heads, dim, value_dim) | {"q": (batch, *size, heads, dim)}
    if draw(st.booleans()):
        shapes["weight"] = lists
    index = torch.randint(regions[1], lists, generator=torch.Generator().manual_seed(seed))
    call = {"index": index, "region_size": region, "kv_region_size": kv_region, "return_lse": draw(st.booleans())}
    return shapes, {**call, "mask_border": draw(st.booleans()), "scale": draw(SCALES)}, strided, seed


def agent_shapes(size, other, heads, dim, value_dim, agents, biases=(True, True), batch=2):
    """q on a map of `size`, k and v on `other`."""
    shapes = {"q": (batch, *size, heads, dim), "k": (batch, *other, heads, dim), "v": (batch, *other, heads, value_dim)}
    shapes["agents"] = (batch, agents, heads, dim)
    if biases[0]:
        shapes["agent_bias"] = (heads, agents, prod(other))
    if biases[1]:
        shapes["query_bias"] = (heads, prod(size), agents)
    return shapes


@st.composite
def agent_problems(draw):
    """Maps of keys unlike those of queries, few and many agents."""
    most = {1: 40, 2: 8, 3: 4}
    batch, size, heads, dim, value_dim, strided, seed = draw(common(most))
    other = size if draw(st.booleans()) else draw(common(most))[1]
    agents, biases = draw(st.sampled_from([1, 4, 9, 15, 16, 25])), (draw(st.booleans()), draw(st.booleans()))
    shapes = agent_shapes(size, other, heads, dim, value_dim, agents, biases, batch)
    return shapes, {"scale": draw(SCALES)}, strided, seed


LOCAL = ("local_bias", "tokens", "token_bias")


def aggregated_shapes(batch, size, pool, heads, dim, hidden=16, width=None, kernel=None, local=LOCAL):
    """Shapes of all tensors; without a kernel size, no neighbours."""
    shapes = {"q": (batch, *size, heads, dim), "pool_k": (batch, *pool, heads, dim)}
    shapes |= {"pool_v": (batch, *pool, heads, width or dim)}
    shapes |= {"temperature": (heads,), "query_embedding": (heads, dim), "cpb_weight1": (hidden, 2)}
    shapes |= {"cpb_bias1": (hidden,), "cpb_weight2": (heads, hidden), "cpb_bias2": (heads,)}
    if kernel is not None:
        shapes |= {"k": (batch, *size, heads, dim), "v": (batch, *size, heads, width or dim)}
        given = dict(zip(LOCAL, ((heads, kernel**2), (heads, dim, kernel**2), (heads, kernel**2)), strict=True))
        shapes |= {n: given[n] for n in local}
    return shapes


@st.composite
def aggregated_problems(draw):
    """Pools that do not divide, maps smaller than the window, all optional parts on or off."""
    # With one channel, gradients of what is normalised are zero but for rounding.
    batch, size, heads, dim, value_dim, strided, seed = draw(common({2: 11}, dims=[2, 4, 24], axes=[2]))
    pool = [draw(st.integers(1, n)) for n in size]
    call = {"pretrain_size": [draw(st.integers(1, 12)) for _ in size]}
    if draw(st.booleans()):
        base = [draw(st.integers(1, 9)) for _ in size]
        call["bias_size"] = [*base, *(draw(st.integers(1, n)) for n in base)]
    kernel = draw(st.sampled_from([None, 1, 3, 3, 5]))
    if kernel is not None:
        call["kernel_size"] = kernel
    call["return_lse"] = draw(st.booleans())
    local, hidden = [n for n in LOCAL if draw(st.booleans())], draw(st.sampled_from([1, 7]))
    shapes = aggregated_shapes(batch, size, pool, heads, dim, hidden, value_dim, kernel, local)
    return shapes, call, kernel is not None and strided, seed


def gated_shapes(q, dv=None, bias=True):
    """Maps [B, H, W, N, D], values of dv channels, and the parameters of heads."""
    shapes = {"q": q, "k": q, "v": (*q[:-1], dv or q[-1]), "gate": q[3:4], "pos_weight": (q[3], 3)}
    return {**shapes, "pos_bias": q[3:4]} if bias else shapes


@st.composite
def gated_problems(draw):
    """Maps of one row or column too, with the bias that cancels and without."""
    batch, size, heads, dim, value_dim, strided, seed = draw(common({2: 11}, axes=[2]))
    shapes = gated_shapes((batch, *size, heads, dim), value_dim, draw(st.booleans()))
    return shapes, {"scale": draw(SCALES)}, strided, seed


def linear_shapes(name, q, k=None, dv=None):
    """The tensors of a call for q [B, *spatial, N, D], another k, and values of dv channels."""
    k = q if k is None else k
    shapes = {"q": q, "k": k, "v": (*k[:-1], dv or k[-1])}
    more = {"focused_linear_attention": {"focus_scale": q[-2:]}, "relu_linear_attention": {"temperature": q[-2:-1]}}
    return {**shapes, **more.get(name, {})}


@st.composite
def linear_problems(draw, name, **options):
    """1-3 axes, other maps of keys, more tokens than channels and fewer."""
    most = {1: 120, 2: 11, 3: 5}
    batch, size, heads, dim, value_dim, strided, seed = draw(common(most))
    other = size if draw(st.booleans()) else draw(common(most))[1]
    shapes = linear_shapes(name, (batch, *size, heads, dim), (batch, *other, heads, dim), value_dim)
    return shapes, {n: draw(st.sampled_from(values)) for n, values in options.items()}, strided, seed


@st.composite
def convolution_problems(draw):
    batch, size, heads, dim, _, strided, seed = draw(common({2: 9}, dims=[1, 4], axes=[2]))
    channels, kernel = heads * dim, draw(st.sampled_from([1, 3, 5]))
    return {"x": (batch, *size, channels), "kernels": (batch, channels, kernel**2)}, {}, strided, seed


@st.composite
def mix_problems(draw, most=9, widest=7):
    """Windows as large as the map, even ones, wide ones, with and without a table."""
    batch, size, heads, dim, _, strided, seed = draw(common({2: most}, axes=[2]))
    kernel = [draw(st.integers(1, widest)) for _ in size]
    lead = (batch, *(k + n - 1 for k, n in zip(kernel, size, strict=True)), heads)
    shapes = {"logits": (*lead, prod(kernel)), "v": (*lead, dim)}
    if draw(st.booleans()):
        shapes["bias"] = (heads, *(2 * k - 1 for k in kernel))
    return shapes, {"kernel_size": kernel}, strided, seed


@dataclass(frozen=True)
class Case:
    """One way to call an op.

    Attributes:
        op: The public function.
        shapes: From (batch, height, width, heads, channels) to the shapes of its floating tensors.
        call: Its other arguments.
        fixed: From the same numbers to its other tensors.
        derive: From tensors to those that the op takes: what a model computes of its maps.
        problems: Draws (shapes, other arguments, strided, seed) of any call.
        examples: How many of them.
        forms: The eager backend's ways by their names; what to set for each.
        small: Numbers for numerical derivatives.
        heads: Heads have nothing to do with one another.
        smooth: No kink where tensors are zero.
        traced: It is one of those that tracers are tried on.
        twice: Derivatives have derivatives; those of PyTorch's fused attention have none.
    """

    op: Callable[..., Any]
    shapes: Callable[..., dict[str, tuple[int, ...]]]
    call: dict[str, Any] = field(default_factory=dict)
    fixed: Callable[..., dict[str, torch.Tensor]] = lambda *numbers: {}
    derive: Callable[..., dict[str, torch.Tensor]] = lambda **tensors: tensors
    problems: Any = None
    examples: int = 100
    forms: dict[str, dict[str, int]] = field(default_factory=lambda: {"": {}})
    small: tuple[int, ...] = (1, 3, 3, 1, 2)
    heads: bool = True
    smooth: bool = True
    traced: bool = True
    twice: bool = True

    def tensors(self, numbers=SIZE, dtype=torch.float64, seed=0):
        """The floating ones, random."""
        return leaves(self.shapes(*numbers), seed, dtype)

    def run(self, **tensors):
        """The op on these, with the case's arguments unless others are given; log-sum-exps as one more channel."""
        out = self.op(**{**self.call, **self.derive(**tensors)})
        if self.call.get("return_lse"):
            out, lse = out
            out = torch.cat([out, lse.unsqueeze(-1).to(out)], -1)
        return out

    def inputs(self, numbers=SIZE, dtype=torch.float64):
        """All its tensors."""
        return {**self.tensors(numbers, dtype), **self.fixed(*numbers)}

    def axes(self, axis):
        """{name: axis} of the tensors of which an axis grows with the axis-th of SIZE's numbers."""
        more = tuple(n + 2 * (i == axis) for i, n in enumerate(SIZE))
        found = {}
        for make in (self.shapes, lambda *numbers: {n: t.shape for n, t in self.fixed(*numbers).items()}):
            for name, shape in make(*more).items():
                for i, (a, b) in enumerate(zip(make(*SIZE)[name], shape, strict=True)):
                    if a != b:
                        found[name] = i
        return found


def strided_queries(q, **others):
    return {"q": q[:, ::2, ::2], **others}


def pooled(pool_k, pool_v, **others):
    """Pooled keys and values of maps as large as that of the queries."""
    pool = (ops.avg_pool_grid(x.flatten(3), [3, 2]).unflatten(-1, x.shape[3:]) for x in (pool_k, pool_v))
    return {**dict(zip(("pool_k", "pool_v"), pool, strict=True)), **others}


def regions(b, h, w, n, d):
    count = ceil_div(h, 3) * ceil_div(w, 2)
    return {"index": torch.randint(count, (b, 1, count, 2), generator=torch.Generator().manual_seed(0))}


def tokens_of_images(b, h, w, n, d):
    return {"mask": torch.rand(b, h, w, generator=torch.Generator().manual_seed(0)) < 0.7}


def visible_keys(b, h, w, n, d):
    """Most tokens, but none in a corner wider than a window."""
    mask = tokens_of_images(b, h, w, n, d)["mask"]
    mask[:, :5, :3] = False
    return {"key_mask": mask}


def plain_map(b, h, w, n, d):
    return {"x": (b, h, w, n * d)}


WINDOW = {"kernel_size": [3, 3], "dilation": [2, 1]}
HALO = {"block_size": [4, 4], "halo_size": [1, 1], "stride": [2, 2]}
_ROUTED = "visattn.ops.chunking.DENSE_KEYS"
_LINEAR = ("visattn.ops.chunking.STREAMED", "visattn.ops.chunking.CHUNK")
ROUTED_FORMS = {"masked": {_ROUTED: 10**9}, "listed": {_ROUTED: 0}}
LINEAR_FORMS = {"whole": {_LINEAR[0]: 10**9, _LINEAR[1]: 100}, "chunks": {_LINEAR[0]: 0, _LINEAR[1]: 100}}
_CHUNKS = ("visattn.ops.chunking.CHUNK", "visattn.ops.chunking.MOST")
CHUNKS = {f"chunks of {n}": {_CHUNKS[0]: n, _CHUNKS[1]: 1000} for n in (500, 1 << 18)}
TILES = {
    "one tile": {"visattn.ops.chunking.TILE": {2: 99}},
    "chunks of tiles": {"visattn.ops.chunking.TILE": {2: 3}, _CHUNKS[0]: 500},
}

ATTENTIONS = {
    "neighborhood": Case(
        ops.neighborhood_attention,
        lambda b, h, w, n, d: {
            **maps(b, h, w, n, d), "bias": (n, 5, 5), "extra_k": (b, 3, n, d), "extra_v": (b, 3, n, d),
            "extra_bias": (n, 3),
        },
        WINDOW, problems=neighborhood_problems(), small=(1, 6, 3, 1, 2),
    ),
    "neighborhood of visible keys": Case(
        ops.neighborhood_attention, lambda b, h, w, n, d: {**maps(b, h, w, n, d), "bias": (n, 5, 5)},
        WINDOW, fixed=visible_keys, small=(1, 6, 3, 1, 2),
    ),
    "neighborhood of visible keys, no table": Case(
        ops.neighborhood_attention, maps, WINDOW, fixed=visible_keys, small=(1, 6, 3, 1, 2), twice=False,
    ),
    "window": Case(
        ops.window_attention, lambda b, h, w, n, d: {**maps(b, h, w, n, d), "bias": (n, 7, 7)},
        {"window_size": [4, 4], "shift": [1, 2]}, problems=window_problems(),
    ),
    "grid": Case(
        ops.window_attention, lambda b, h, w, n, d: {**maps(b, h, w, n, d), "bias": (n, 5, 5)},
        {"window_size": [3, 3], "grid": True},
    ),
    "halo": Case(
        ops.halo_attention, lambda b, h, w, n, d: {**maps(b, h, w, n, d), "rel_h": (11, d), "rel_w": (11, d)},
        HALO, derive=strided_queries, problems=halo_problems(), small=(1, 2, 3, 1, 2),
    ),
    "halo of zeros": Case(
        ops.halo_attention, lambda b, h, w, n, d: {**maps(b, h, w, n, d), "rel_h": (11, d), "rel_w": (11, d)},
        {**HALO, "mask_border": False}, derive=strided_queries, small=(1, 2, 3, 1, 2), traced=False,
    ),
    "routed": Case(
        ops.routed_attention,
        lambda b, h, w, n, d: {**maps(b, h, w, n, d), "weight": (b, 1, ceil_div(h, 3) * ceil_div(w, 2), 2)},
        {"region_size": [3, 2]}, fixed=regions, problems=routed_problems(), forms=ROUTED_FORMS, small=(1, 4, 2, 2, 2),
    ),
    "bilevel": Case(
        ops.bilevel_routing_attention,
        lambda b, h, w, n, d: {**maps(b, h, w, n, d), "router_weight": (n * d, n * d)},
        {"n_win": [3, 2], "topk": 2, "soft": True, "diff": True}, heads=False, forms=ROUTED_FORMS,
    ),
    "bilevel of zeros": Case(
        ops.bilevel_routing_attention, maps, {"n_win": [2, 2], "topk": 40, "rule": "zero", "per_head": True},
        forms=ROUTED_FORMS, twice=False,
    ),
    "agent": Case(
        ops.agent_attention, lambda b, h, w, n, d: agent_shapes((h, w), (h, w), n, d, d, 4, batch=b),
        problems=agent_problems(), small=(1, 2, 2, 1, 2),
    ),
    "many agents": Case(
        ops.agent_attention, lambda b, h, w, n, d: agent_shapes((h, w), (h, w), n, d, d, 17, batch=b),
        small=(1, 2, 2, 1, 2), traced=False,
    ),
    "gated positional": Case(
        ops.gated_positional_attention, lambda *numbers: gated_shapes(numbers), problems=gated_problems(),
        examples=200, twice=False,
    ),
    "aggregated": Case(
        ops.aggregated_attention,
        lambda b, h, w, n, d: aggregated_shapes(b, (h, w), (h, w), n, d, hidden=3, kernel=3),
        {"pretrain_size": [7, 7]}, derive=pooled, problems=aggregated_problems(), forms=CHUNKS,
        small=(1, 2, 3, 1, 2),
    ),
    "interpolated": Case(
        ops.aggregated_attention,
        lambda b, h, w, n, d: aggregated_shapes(b, (h, w), (h, w), n, d, hidden=3),
        {"pretrain_size": [7, 7], "bias_size": [3, 3, 2, 2]}, derive=pooled, small=(1, 2, 3, 1, 2),
        traced=False,
    ),
    "efficient": Case(
        ops.efficient_attention, maps, fixed=tokens_of_images, problems=linear_problems("efficient_attention"),
        forms=LINEAR_FORMS,
    ),
    "inline": Case(
        ops.inline_attention, maps, problems=linear_problems("inline_attention", scale=[None, 0.7]),
        forms=LINEAR_FORMS,
    ),
    "focused": Case(
        ops.focused_linear_attention, lambda b, h, w, n, d: {**maps(b, h, w, n, d), "focus_scale": (n, d)},
        problems=linear_problems("focused_linear_attention", factor=[3.0, 1.0, 4.5]),
        forms=LINEAR_FORMS, heads=False, smooth=False,
    ),
    "flow": Case(
        ops.flow_attention, maps, problems=linear_problems("flow_attention"), examples=200, forms=LINEAR_FORMS,
    ),
    "relu": Case(
        ops.relu_linear_attention, lambda b, h, w, n, d: {**maps(b, h, w, n, d), "temperature": (n,)}, {"floor": 70.0},
        problems=linear_problems("relu_linear_attention", floor=[100.0, 10.0, 1e-3]), examples=200,
        forms=LINEAR_FORMS, smooth=False,
     ),
    "mix": Case(
        ops.neighborhood_mix,
        lambda b, h, w, n, d: {"logits": (b, h, w, n, 15), "v": (b, h, w, n, d), "bias": (n, 5, 9)},
        {"kernel_size": [3, 5]}, problems=mix_problems(), examples=200, forms=TILES, small=(1, 3, 5, 1, 2),
    ),
    "convolution": Case(
        ops.dynamic_depthwise_conv, lambda b, h, w, n, d: {"x": (b, h, w, n * d), "kernels": (b, n * d, 9)},
        problems=convolution_problems(), examples=50, heads=False,
    ),
}  # fmt: skip

MAPS = {
    "fit": Case(ops.fit, plain_map, {"size": [8, 8]}),
    "fit_centered": Case(ops.fit_centered, plain_map, {"size": [8, 10]}),
    "pad_to_at_least": Case(ops.pad_to_at_least, plain_map, {"size": [8, 8]}),
    "pad_to_multiple": Case(ops.pad_to_multiple, plain_map, {"multiple": [4, 4]}),
    "pad_centered_to_multiple": Case(ops.pad_centered_to_multiple, plain_map, {"multiple": [4, 4]}),
    "floor_to_multiple": Case(ops.floor_to_multiple, plain_map, {"multiple": [4, 4]}),
    "pad_same": Case(ops.pad_same, plain_map, {"kernel": [3, 3], "stride": [2, 2]}),
    "pool2x2": Case(ops.pool2x2, plain_map, {"kind": "avg"}),
    "pool2x2 max": Case(ops.pool2x2, plain_map, {"kind": "max"}),
    "adaptive_avg_pool": Case(ops.adaptive_avg_pool, plain_map, {"size": [5, 2]}),
    "avg_pool_grid": Case(ops.avg_pool_grid, plain_map, {"ratio": [2, 3]}),
    "shift": Case(ops.shift, plain_map, {"channels": 2}, small=(1, 3, 3, 2, 4)),
    "shift far": Case(ops.shift, plain_map, {"channels": 1, "step": 8}, small=(1, 3, 3, 2, 4)),
    "window_conv": Case(
        ops.window_conv,
        lambda b, h, w, n, d: {"x": (b, h, w, n * d), "weight": (n * d, 1, 3, 3), "bias": (n * d,)},
        {"window": [4, 3]},
    ),
}
TABLES = {
    "agent_position_bias": Case(
        ops.agent_position_bias,
        lambda b, h, w, n, d: {"table": (n, 9, 7, 7), "rows": (n, 9, 8), "columns": (n, 9, 10)},
        {"size": [8, 9], "agent_size": [2, 3]},
    ),
    "resize_rel_pos": Case(ops.resize_rel_pos, lambda b, h, w, n, d: {"table": (n, 5, 7)}, {"size": [9, 3]}),
}
WITH_LSE = (
    "neighborhood",
    "window",
    "halo",
    "halo of zeros",
    "routed",
    "bilevel",
    "bilevel of zeros",
    "aggregated",
    "interpolated",
)
ATTENTIONS |= {
    f"{n} with lse": replace(ATTENTIONS[n], call={**ATTENTIONS[n].call, "return_lse": True}, problems=None, twice=True)
    for n in WITH_LSE
}
CASES = {**ATTENTIONS, **MAPS, **TABLES}
PROBLEMS = {name: case.problems for name, case in ATTENTIONS.items() if case.problems is not None}
