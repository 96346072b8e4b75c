"""Bi-level routing attention and full attention with LePE: the official modules' values, and their definitions."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import tolerances
from tests.layers.checks import GOLDEN, assert_same_with_gradients, randomized
from tests.tolerances import relative_error
from visattn.layers import BiLevelRoutingAttention, DepthwiseConv, LePEAttention

OPS = sorted(path.stem for path in GOLDEN.glob("op_bra_*.npz"))
RENAMED = {"qkv.qkv.": "qkv.", "wo.": "proj.", "qkv_linear.": "qkv.", "output_linear.": "proj."}


def own_name(key):
    for official, own in RENAMED.items():
        key = key.replace(official, own)
    return key


def create(golden):
    """Our module of an official class, in float64."""
    kwargs = json.loads(str(golden["kwargs"]))
    official = str(golden["cls"])
    if "AttentionLePE" in official or official == "Attention":
        kwargs["lepe_on"] = "value" if official == "nchwAttentionLePE" else "input"
        return LePEAttention(**{"side_dwconv": 0, **kwargs}, dtype=torch.float64)
    padding = "zero" if official == "nchwBRA" else "project" if kwargs.pop("auto_pad", False) else "mask"
    return BiLevelRoutingAttention(**kwargs, padding=padding, dtype=torch.float64)


@pytest.mark.parametrize("name", OPS)
def test_golden(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    module = create(golden)
    weights = {own_name(key[2:]): torch.from_numpy(golden[key]) for key in golden if key.startswith("w.")}
    weights = {key: w.flatten(1) if key.endswith(("qkv.weight", "proj.weight")) else w for key, w in weights.items()}
    module.load_state_dict(weights)

    def channels_last(key):
        x = torch.from_numpy(golden[key]).double()
        return x.permute(0, 2, 3, 1) if str(golden["layout"]) == "NCHW" else x

    x = channels_last("x").requires_grad_()
    out = module(x)
    assert relative_error(out, channels_last("out")) <= tolerances.OP_GOLDEN_FORWARD
    out.backward(channels_last("grad_out"))
    grads = {"grad_x": x.grad, **{f"grad.{key}": p.grad for key, p in module.named_parameters()}}
    expected = {
        own_name(key): channels_last(key) if key == "grad_x" else torch.from_numpy(golden[key])
        for key in golden
        if key.startswith(("grad_x", "grad."))
    }
    assert grads.keys() == expected.keys()
    for key, value in expected.items():
        assert relative_error(grads[key], value.view_as(grads[key])) <= tolerances.OP_GOLDEN_GRADIENT, key
    if "route_index" in golden:
        attended = module.attended(x)
        assert torch.equal(attended["regions"][:, 0], torch.from_numpy(golden["route_index"]).long())
        weights = torch.from_numpy(golden["route_weight"])
        assert relative_error(attended["weights"][:, 0], weights) <= tolerances.OP_GOLDEN_FORWARD


def by_definition(module, x, pool=None):
    """Region by region, from the paper and the official operators' padding rules; also the regions chosen."""
    h, w = x.shape[1:3]
    if module.padding == "project":
        x = F.pad(x, (0, 0, 0, -w % module.n_win[1], 0, -h % module.n_win[0]))
    q, k, v = module.qkv(x).split(module.split, dim=-1)
    lepe = 0 if module.lepe is None else F.conv2d(
        v.permute(0, 3, 1, 2), module.lepe.weight, module.lepe.bias, padding="same", groups=v.shape[-1]
    ).permute(0, 2, 3, 1)  # fmt: skip
    zero = module.padding == "zero"
    size = [max(1, n // r) if zero else -(-n // r) for n, r in zip(x.shape[1:3], module.n_win, strict=True)]
    places = [
        (slice(a, a + size[0]), slice(b, b + size[1]))
        for a in range(0, x.shape[1], size[0])
        for b in range(0, x.shape[2], size[1])
    ]
    means = [torch.stack([t[:, a, b].mean((1, 2)) for a, b in places], 1) for t in (q, k)]
    if not module.diff_routing:
        means = [m.detach() for m in means]
    if module.router is not None:
        means = [module.router(m) for m in means]
    logits, index = (module.scale * means[0] @ means[1].mT).sort(descending=True, stable=True)
    index, factors = index[..., : module.topk], logits[..., : module.topk].softmax(-1)

    def tokens(t, image, region):
        t = t[image, places[region][0], places[region][1]]
        if zero:
            t = F.pad(t, (0, 0, 0, size[1] - t.shape[1], 0, size[0] - t.shape[0]))
        if pool is not None:
            t = pool(t.permute(2, 0, 1)).permute(1, 2, 0)
        return t.flatten(0, 1)

    out = torch.zeros_like(v)
    for image, region in itertools.product(range(len(x)), range(len(places))):
        listed = index[image, region].tolist()
        factor = factors[image, region] if module.soft_routing else [1] * len(listed)
        key, value = (torch.cat([f * tokens(t, image, r) for f, r in zip(factor, listed, strict=True)]) for t in (k, v))
        query = q[image][places[region]]
        heads = (t.unflatten(-1, (module.num_heads, -1)).transpose(0, 1) for t in (query.flatten(0, 1), key, value))
        result = F.scaled_dot_product_attention(*heads, scale=module.scale).transpose(0, 1)
        rows, columns = (torch.arange(n)[s] for n, s in zip(out.shape[1:3], places[region], strict=True))
        where = (torch.tensor(image), rows[:, None], columns)
        out = out.index_put(where, result.reshape(*query.shape[:2], -1))
    return module.proj((out + lepe)[:, :h, :w]), index


def small(**kwargs):
    options = {"dim": 12, "num_heads": 3, "n_win": 3, **kwargs}
    return randomized(BiLevelRoutingAttention(**options, dtype=torch.float64), 0.5)


def check(module, size, pool=None):
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    expected, index = by_definition(module, x, pool)
    assert torch.equal(module.attended(x)["regions"][:, 0], index)
    assert_same_with_gradients(module(x), expected, [x, *module.parameters()])


@pytest.mark.parametrize("size", [(9, 12), (7, 11), (2, 10), (1, 1)], ids=str)
@pytest.mark.parametrize("padding", ["mask", "project", "zero"])
@pytest.mark.parametrize("topk", [1, 4, 100])
def test_is_the_definition_with_all_gradients(padding, size, topk):
    check(small(padding=padding, topk=topk), size)


@pytest.mark.parametrize("size", [(9, 12), (7, 11)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"qk_dim": 6},
        {"qk_dim": 24, "qk_scale": 0.7},
        {"n_win": (2, 4)},
        {"param_attention": "qkv", "side_dwconv": 0},
        {"side_dwconv": 3},
        {"kv_downsample_mode": "maxpool", "kv_downsample_ratio": 1},
        {"soft_routing": True},
        {"soft_routing": True, "diff_routing": True, "num_heads": 1},
        {"soft_routing": True, "diff_routing": True, "param_routing": True, "qk_dim": 9},
    ],
    ids=str,
)
def test_options_are_the_definition_with_all_gradients(options, size):
    check(small(topk=2, **options), size)


@pytest.mark.parametrize(
    ("options", "pool"),
    [
        ({"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 2}, torch.nn.AvgPool2d(2)),
        ({"kv_downsample_mode": "maxpool", "kv_downsample_ratio": 2}, torch.nn.MaxPool2d(2)),
        ({"kv_downsample_mode": "ada_avgpool", "kv_per_win": 2}, torch.nn.AdaptiveAvgPool2d(2)),
        ({"kv_downsample_mode": "ada_maxpool", "kv_per_win": 3}, torch.nn.AdaptiveMaxPool2d(3)),
        ({"kv_downsample_mode": "ada_avgpool", "kv_per_win": 1}, torch.nn.AdaptiveAvgPool2d(1)),
    ],
    ids=str,
)
def test_pooled_keys_and_values(options, pool):
    check(small(topk=2, padding="project", **options), (9, 14), pool)


@torch.no_grad()
def test_padding_rules_agree_where_regions_divide_the_map_and_only_there():
    modules = [small(padding=padding) for padding in ("mask", "project", "zero")]
    for module in modules:
        module.load_state_dict(modules[0].state_dict())
    for size, agree in (((6, 9), True), ((7, 9), False)):
        x = torch.randn(2, *size, 12, dtype=torch.float64)
        mask, *others = (module(x) for module in modules)
        assert [relative_error(o, mask) <= tolerances.OP[torch.float64] for o in others] == [agree, agree]


@torch.no_grad()
def test_all_regions_are_attention_over_the_whole_map():
    module = small(topk=9, side_dwconv=0)
    x = torch.randn(2, 7, 8, 12, dtype=torch.float64)
    q, k, v = module.qkv(x).flatten(1, 2).unflatten(-1, (9, 4)).transpose(1, 2).chunk(3, dim=1)
    expected = F.scaled_dot_product_attention(q, k, v, scale=12**-0.5).transpose(1, 2).reshape(x.shape)
    assert relative_error(module(x), module.proj(expected)) <= tolerances.OP[torch.float64]


@torch.no_grad()
def test_attended_regions_are_all_that_matters():
    """Values far from the regions named for a query region do not reach it."""
    module = small(topk=2, side_dwconv=0)
    x = torch.randn(1, 6, 6, 12, dtype=torch.float64)
    attended = module.attended(x)
    assert attended["regions"].shape == attended["weights"].shape == (1, 1, 9, 2)
    torch.testing.assert_close(attended["weights"].sum(-1), torch.ones(1, 1, 9, dtype=torch.float64))
    out = module(x)
    for region in range(9):
        rows, columns = region // 3 * 2, region % 3 * 2
        changed = []
        for other in range(9):
            values = torch.zeros(1, 6, 6, 12, dtype=torch.float64)
            values[:, other // 3 * 2 : other // 3 * 2 + 2, other % 3 * 2 : other % 3 * 2 + 2] = 1
            hook = module.qkv.register_forward_hook(lambda m, i, out, v=values: out + F.pad(v, (24, 0)))
            moved = module(x) - out
            hook.remove()
            changed += [other] if moved[0, rows, columns].abs().max() > 1e-9 else []
        assert changed == sorted(attended["regions"][0, 0, region].tolist())


@pytest.mark.parametrize("lepe_on", ["input", "value"])
@pytest.mark.parametrize(("kernel", "size"), [(5, (4, 7)), (3, (1, 1)), (0, (3, 2))])
def test_lepe_attention_is_the_definition_with_all_gradients(lepe_on, kernel, size):
    module = LePEAttention(12, 3, kernel, lepe_on, qkv_bias=True, dtype=torch.float64)
    torch.nn.init.normal_(module.qkv.bias)
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    q, k, v = module.qkv(x).flatten(1, 2).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
    if kernel:
        y = x if lepe_on == "input" else v.transpose(1, 2).reshape(x.shape)
        out = out + module.lepe(y)
    assert_same_with_gradients(module(x), module.proj(out), [x, *module.parameters()])


def test_output_projection_may_be_left_out():
    parameters = dict(small(side_dwconv=0, param_attention="qkv").named_parameters())
    assert parameters.keys() == {"qkv.weight", "qkv.bias"}


def test_depthwise_convolution_is_channels_last():
    module = DepthwiseConv(6, 3)
    x = torch.randn(2, 5, 4, 6)
    expected = F.conv2d(x.permute(0, 3, 1, 2), module.weight, module.bias, padding=1, groups=6).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 5}, ValueError, "divisible by num_heads, got 12, 12 and 5"),
        ({"qk_dim": 10}, ValueError, "divisible by num_heads, got 12, 10 and 3"),
        ({"topk": 0}, ValueError, "expected n_win and topk of at least 1, got 3 and 0"),
        ({"n_win": 0}, ValueError, "got 0 and 4"),
        ({"padding": "same"}, ValueError, "expected padding .* got 'same'"),
        ({"param_attention": "none"}, ValueError, "expected param_attention .* got 'none'"),
        ({"param_routing": True}, ValueError, "expected diff_routing with param_routing"),
        ({"diff_routing": True}, NotImplementedError, "try soft_routing=True"),
        ({"kv_downsample_mode": "fracpool"}, NotImplementedError, "try one of .*'avgpool'"),
        ({"kv_downsample_mode": "conv"}, NotImplementedError, "'conv' is named by the official code"),
        ({"kv_downsample_mode": "sum"}, ValueError, "got 'sum'"),
        ({"kv_downsample_mode": "ada_avgpool", "kv_per_win": -1}, ValueError, "expected kv_per_win .* got -1"),
        ({"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 0}, ValueError, "expected kv_downsample_ratio"),
        ({"side_dwconv": 4}, ValueError, "expected an odd kernel_size, got 4"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        small(**options)


def test_regions_that_do_not_fill_the_map_cannot_be_pooled():
    with pytest.raises(ValueError, match="regions that fill the map"):
        small(kv_downsample_mode="avgpool", kv_downsample_ratio=2)(torch.randn(1, 7, 11, 12, dtype=torch.float64))
