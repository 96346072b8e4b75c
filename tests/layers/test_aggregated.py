"""TransNeXt's modules: the official modules with all gradients, weights on request, errors; the gated MLP."""

import pytest
import torch
import torch.nn.functional as F

from tests.layers.checks import golden_arrays, golden_cases
from tests.tolerances import OP, OP_GOLDEN_FORWARD, OP_GOLDEN_GRADIENT, relative_error
from visattn.layers import AggregatedAttention, ConvGLU, CosineAttention, PatchTokenizer

FILES = [f"aggregated_attention_{name}" for name in ("0", "2", "4", "dense_0", "dense_2")]
NAMES = {"relative_pos_bias_local": "local_bias", "learnable_tokens": "tokens", "learnable_bias": "token_bias"}
TOLERANCE = OP[torch.float64]


def build(case):
    interpolated = not case.get("is_extrapolation", True)
    sizes = {
        "pretrain_size": tuple(case["pretrain_size"] or case["hw"]),
        "bias_size": tuple(case["trained_hw"]) if interpolated else None,
    }
    if case.get("sr_ratio", 1) == 1:
        return CosineAttention(case["dim"], case["num_heads"], **sizes, dtype=torch.float64)
    window = case.get("window_size", 3)
    return AggregatedAttention(case["dim"], case["num_heads"], window, case["sr_ratio"], **sizes, dtype=torch.float64)


@golden_cases(*FILES, "transnext_attention")
def test_official_modules_with_all_gradients(file, prefix, case):
    data = golden_arrays(file, prefix)
    module = build(case)
    parameters = dict(module.named_parameters())
    official = {k.removeprefix("param."): v for k, v in data.items() if k.startswith("param.")}
    assert {NAMES.get(name, name) for name in official} == parameters.keys()
    for name, value in official.items():
        own = parameters[NAMES.get(name, name)]
        own.data.copy_(value.reshape(own.shape))
    x = data["in0"].requires_grad_()
    out = module(x.unflatten(1, case["hw"]))
    assert relative_error(out.flatten(1, 2), data["out"]) <= OP_GOLDEN_FORWARD
    out.flatten(1, 2).backward(data["grad_out"])
    assert relative_error(x.grad, data["grad_in0"]) <= OP_GOLDEN_GRADIENT
    for name in official:
        grad = parameters[NAMES.get(name, name)].grad
        expected = data[f"pgrad.{name}"].reshape(grad.shape)
        if isinstance(module, CosineAttention) and name == "cpb_fc2.bias":
            # a bias common to all keys: the softmax takes no notice, and both gradients are rounding
            assert max(grad.norm(), expected.norm()) < TOLERANCE
        else:
            assert relative_error(grad, expected) <= OP_GOLDEN_GRADIENT, name


@torch.no_grad()
@pytest.mark.parametrize("size", [(5, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("bias_size", [None, 6], ids=str)
def test_the_output_is_made_of_what_is_attended(size, bias_size):
    """The weights sum to 1, and with the values and the query's own weights of its neighbours they give the output."""
    module = AggregatedAttention(12, 2, 3, 2, 4, bias_size, dtype=torch.float64)
    for parameter in module.parameters():
        parameter.normal_()
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    weights = module.attended(x)
    local, pooled = weights["local"], weights["pooled"]
    pool = [max(1, n // 2) for n in size]
    assert local.shape == (2, *size, 2, 9)
    assert pooled.shape == (2, *size, 2, *pool)
    torch.testing.assert_close(local.sum(-1) + pooled.sum((-1, -2)), torch.ones_like(local[..., 0]))
    assert (local[:, 0, :, :, :3] == 0).all()

    y = F.adaptive_avg_pool2d(F.gelu(module.sr(x)).permute(0, 3, 1, 2), pool).permute(0, 2, 3, 1)
    pool_v = module.kv(module.norm(y))[..., 12:].unflatten(-1, (2, 6))
    v = F.unfold(module.kv(x)[..., 12:].permute(0, 3, 1, 2), 3, padding=1).unflatten(1, (2, 6, 9)).unflatten(-1, size)
    q = F.normalize(module.q(x).unflatten(-1, (2, 6)), dim=-1)
    local = local + torch.einsum("bhwnd,ndk->bhwnk", q, module.tokens) + module.token_bias
    out = torch.einsum("bhwnk,bndkhw->bhwnd", local, v) + torch.einsum("bhwnij,bijnd->bhwnd", pooled, pool_v)
    assert relative_error(module(x), module.proj(out.flatten(3))) <= TOLERANCE


@torch.no_grad()
def test_attention_over_the_whole_map_has_one_kind_of_weights():
    module = CosineAttention(12, 2, 4, dtype=torch.float64)
    x = torch.randn(1, 3, 5, 12, dtype=torch.float64)
    weights = module.attended(x)
    assert list(weights) == ["pooled"]
    v = module.qkv(x)[..., 24:].unflatten(-1, (2, 6))
    out = torch.einsum("bhwnij,bijnd->bhwnd", weights["pooled"], v)
    assert relative_error(module(x), module.proj(out.flatten(3))) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(("pool_size", "pool"), [(None, (4, 1)), (3, (3, 2)), (20, (9, 2))])
def test_pooled_tokens(pool_size, pool):
    """Per ratio, at least one; or a fixed number, at most those of the map."""
    module = AggregatedAttention(12, 2, 3, 2, 4, pool_size=pool_size)
    assert module.attended(torch.randn(1, 9, 2, 12))["pooled"].shape[-2:] == pool


@pytest.mark.parametrize("pool_size", [None, 2, 9])
def test_the_interpolated_bias_is_the_computed_one_at_its_own_size(pool_size):
    plain = AggregatedAttention(12, 2, 3, 2, 4, pool_size=pool_size, dtype=torch.float64)
    resized = AggregatedAttention(12, 2, 3, 2, 4, (6, 5), pool_size, dtype=torch.float64)
    resized.load_state_dict(plain.state_dict())
    x = torch.randn(1, 6, 5, 12, dtype=torch.float64)
    assert relative_error(resized(x), plain(x)) <= TOLERANCE
    assert relative_error(resized(x[:, :, :4]), plain(x[:, :, :4])) > 1e-6


@torch.no_grad()
def test_initial_values_are_the_official_ones():
    module = AggregatedAttention(64, 4, 5, 2, 4)
    torch.testing.assert_close(F.softplus(module.temperature), torch.full((4,), 1 / 0.24))
    for name, std in (("query_embedding", 0.02), ("tokens", 0.02), ("local_bias", 0.0004)):
        assert 0.5 * std < getattr(module, name).std() < 1.5 * std
    assert not module.token_bias.any()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((10, 3, 3, 2, 4), "expected dim divisible by num_heads, got 10 and 3"),
        ((12, 2, 4, 2, 4), "expected an odd kernel_size, got 4"),
        ((12, 2, 3, 0, 4), "expected sr_ratio and pool_size of at least 1, got 0 and None"),
        ((12, 2, 3, 2, 4, None, 0), "expected sr_ratio and pool_size of at least 1, got 2 and 0"),
        ((12, 2, 3, 2, 1), r"expected pretrain_size of a map of at least 2 x 2 tokens, got \[1, 1\]"),
    ],
)
def test_arguments_that_do_not_fit(args, message):
    with pytest.raises(ValueError, match=message):
        AggregatedAttention(*args)


@torch.no_grad()
def test_gated_mlp():
    mlp = ConvGLU(6, 5, dtype=torch.float64)
    x = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    a, b = (x @ mlp.fc1.weight[i : i + 5].T + mlp.fc1.bias[i : i + 5] for i in (0, 5))
    windows = F.pad(a, (0, 0, 1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1)
    a = torch.einsum("bhwcij,cij->bhwc", windows, mlp.dwconv.weight[:, 0]) + mlp.dwconv.bias
    expected = (F.gelu(a) * b) @ mlp.fc2.weight.T + mlp.fc2.bias
    assert relative_error(mlp(x), expected) <= TOLERANCE


def test_gated_mlp_drops_before_and_after_the_last_layer():
    mlp = ConvGLU(4, 400, drop=0.5)
    x = torch.randn(1, 8, 8, 4)
    assert 0.4 < (mlp(x) == 0).float().mean() < 0.6
    mlp.fc2 = torch.nn.Identity()
    assert 0.7 < (mlp(x) == 0).float().mean() < 0.8


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (9, 12), (10, 7)], ids=str)
def test_overlapping_patches(size):
    patches = PatchTokenizer(2, 3, 4, kernel_size=7, dtype=torch.float64)
    image = torch.randn(1, 2, *size, dtype=torch.float64)
    out = patches(image)
    expected = F.conv2d(image, patches.proj.weight, patches.proj.bias, stride=4, padding=3).permute(0, 2, 3, 1)
    assert out.shape == (1, -(-size[0] // 4), -(-size[1] // 4), 3)
    assert relative_error(out, patches.norm(expected)) <= TOLERANCE
