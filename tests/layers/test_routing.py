"""Bi-level routing attention and full attention with LePE: the official modules' values, and their definitions."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import tolerances
from tests.layers.checks import GOLDEN, assert_same_with_gradients, randomized
from tests.ops.test_bilevel_routing import by_definition
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


def around(module, x, kv_pool="none", kv_size=1):
    """The op by its definition between the official modules' projections and padding; also the regions chosen."""
    h, w = x.shape[1:3]
    if module.padding == "project":
        x = F.pad(x, (0, 0, 0, -w % module.n_win[1], 0, -h % module.n_win[0]))
    q, k, v = module.qkv(x).split(module.split, dim=-1)
    lepe = 0 if module.lepe is None else F.conv2d(
        v.permute(0, 3, 1, 2), module.lepe.weight, module.lepe.bias, padding="same", groups=v.shape[-1]
    ).permute(0, 2, 3, 1)  # fmt: skip
    router = [] if module.router is None else [module.router.weight, module.router.bias]
    rule, how = "zero" if module.padding == "zero" else "mask", (module.soft_routing, module.diff_routing)
    heads = (t.unflatten(-1, (module.num_heads, -1)) for t in (q, k, v))
    options = (module.n_win, module.topk, rule, False, *how, kv_pool, kv_size, module.scale)
    out, index = by_definition(*heads, *options, *router)
    return module.proj((out.flatten(3) + lepe)[:, :h, :w]), index[:, 0]


def small(**kwargs):
    options = {"dim": 12, "num_heads": 3, "n_win": 3, **kwargs}
    return randomized(BiLevelRoutingAttention(**options, dtype=torch.float64), 0.5)


def check(module, size, *pool):
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    expected, index = around(module, x, *pool)
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
        ({"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 2}, ("avg", 2)),
        ({"kv_downsample_mode": "maxpool", "kv_downsample_ratio": 2}, ("max", 2)),
        ({"kv_downsample_mode": "ada_avgpool", "kv_per_win": 2}, ("ada_avg", 2)),
        ({"kv_downsample_mode": "ada_maxpool", "kv_per_win": 3}, ("ada_max", 3)),
        ({"kv_downsample_mode": "ada_avgpool", "kv_per_win": 1}, ("ada_avg", 1)),
    ],
    ids=str,
)
def test_pooled_keys_and_values(options, pool):
    check(small(topk=2, padding="project", **options), (9, 14), *pool)


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
