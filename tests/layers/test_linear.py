"""InLine, focused, ReLU and efficient attention as layers: the official modules, their forms, other maps, tracing."""

import torch
import torch.nn.functional as F

from tests import tolerances
from tests.layers.checks import golden_arrays, golden_cases, randomized
from tests.tolerances import OP, OP_GOLDEN_FORWARD, OP_GOLDEN_GRADIENT, relative_error
from visattn.layers import EfficientAttention2d, create_token_mixer
from visattn.ops import inline_attention

FILES = ["inline_attention_0", "inline_attention_2", "efficient_attention", "focused_linear_attention"]
TOLERANCE = tolerances.OP[torch.float64]
OPTIONS = ("kernel_func", "focusing_factor", "kernel_size", "sr_ratio")


def build(name, *args, **kwargs):
    """The layer with random parameters, in float64."""
    return randomized(create_token_mixer(name, *args, **kwargs, dtype=torch.float64), 0.4)


def build_official(file, case):
    if file == "efficient_attention":
        sizes = (case[key] for key in ("in_channels", "key_channels", "head_count", "value_channels"))
        return EfficientAttention2d(*sizes, dtype=torch.float64)
    options = {key: case[key] for key in OPTIONS if key in case}
    kind = case["kind"]
    options |= {"num_prefix_tokens": int(kind == "deit")} | ({"lepe": True} if kind == "cswin" else {})
    return build(file.split("_")[0], case["dim"], case["num_heads"], map_size(case), **options)


def map_size(case):
    size = case.get("hw") or case.get("window") or case["resolution"]
    return [size, size] if isinstance(size, int) else size


def joined(values, fused):
    """The official q and kv as one qkv."""
    if not fused or "q.weight" not in values:
        return values
    own = {key: value for key, value in values.items() if key.partition(".")[0] not in ("q", "kv")}
    return own | {f"qkv.{part}": torch.cat([values[f"q.{part}"], values[f"kv.{part}"]]) for part in ("weight", "bias")}


@golden_cases(*FILES)
def test_official_modules_with_all_gradients(file, prefix, case):
    data = golden_arrays(file, prefix)
    layer = build_official(file, case)
    own = dict(layer.named_parameters())
    official, gradients = (
        joined({k.removeprefix(kind): v for k, v in data.items() if k.startswith(kind)}, "qkv.weight" in own)
        for kind in ("param.", "pgrad.")
    )
    for name, value in official.items():
        with torch.no_grad():
            own[name].copy_(value.view_as(own[name]))
    inputs = [data[key].requires_grad_() for key in ("in0", "in1") if key in data]
    if case.get("kind") == "cswin":  # q, k, v and the mean come from the block, which also projects the output
        heads = [case["num_heads"], case["dim"] // case["num_heads"]]
        own = {name: p for name, p in own.items() if name.partition(".")[0] not in ("qkv", "proj")}
        size = map_size(case)
        out = layer._mix(*inputs[0].unflatten(-1, heads), inputs[1], size, size).flatten(2)
    else:
        out = layer(inputs[0]) if file == "efficient_attention" else layer(inputs[0], map_size(case))
    assert official.keys() == own.keys()
    assert relative_error(out, data["out"]) <= OP_GOLDEN_FORWARD
    out.backward(data["grad_out"])
    for i, x in enumerate(inputs):
        assert relative_error(x.grad, data[f"grad_in{i}"]) <= OP_GOLDEN_GRADIENT
    for name, expected in gradients.items():
        if name == "keys.bias":  # common to all positions: the softmax takes no notice, both gradients are rounding
            assert max(own[name].grad.norm(), expected.norm()) < TOLERANCE
        else:
            assert relative_error(own[name].grad.view_as(expected), expected) <= OP_GOLDEN_GRADIENT, name


def test_inline_by_hand():
    """Two prefix tokens, other map, another source: attention of all tokens, convolution of the map's values."""
    layer = build("inline", 6, 2, (4, 4), num_prefix_tokens=2, lepe=True, kernel_func="relu")
    x, source = torch.randn(2, 2, 2 + 3 * 5, 6, dtype=torch.float64)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 3)).unbind(2)
    pairs = torch.einsum("blnd,bmnd->blnm", q.relu(), k.relu()) / 3**0.5
    out = torch.einsum("blnm,bmnd->blnd", (pairs + 1 - pairs.mean(-1, keepdim=True)) / 17, v).flatten(2)
    kernels = layer.residual(source.mean(1)[..., None]).reshape(2, 6, 1, 3, 3)
    image = v.flatten(2)[:, 2:].mT.unflatten(2, (3, 5))
    for i in range(2):
        local = F.conv2d(image[i], kernels[i] + layer.get_v.weight, layer.get_v.bias, padding=1, groups=6)
        out[i, 2:] += local.flatten(1).T
    assert relative_error(layer(x, [3, 5], source), layer.proj(out)) <= TOLERANCE
    assert relative_error(layer(x, [3, 5]), layer.proj(out)) > 1e-3


def test_inline_reduced_keys():
    """Values at half the resolution are resized to the map before the convolution."""
    layer = build("inline", 6, 2, (4, 4), sr_ratio=2)
    x = torch.randn(2, 6, 8, 6, dtype=torch.float64)
    calls = []
    layer.residual.register_forward_hook(lambda *args: calls.append(args[2]))
    whole = layer(x)
    y = layer.norm(layer.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    k, v = layer.kv(y).flatten(1, 2).unflatten(-1, (2, 2, 3)).unbind(2)
    q = layer.q(x).flatten(1, 2).unflatten(-1, (2, 3))
    out = inline_attention(q, k, v, backend="reference").flatten(2).unflatten(1, (6, 8))
    values = F.interpolate(v.flatten(2).mT.unflatten(2, (3, 4)), (6, 8), mode="bilinear", align_corners=False)
    kernels = calls[0].reshape(2, 6, 1, 3, 3)
    local = torch.stack([F.conv2d(values[i], kernels[i], padding=1, groups=6) for i in range(2)])
    assert relative_error(whole, layer.proj(out + local.permute(0, 2, 3, 1))) <= TOLERANCE


def test_focused_positions_on_other_maps():
    """The table of 4 x 6 keys is resized with the map; prefix tokens have none."""
    layer = build("focused", 6, 2, (4, 6), num_prefix_tokens=1)
    table = layer.positional_encoding.permute(0, 3, 1, 2)
    for size in ((4, 6), (6, 4), (7, 3)):
        resized = F.interpolate(table, size, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
        expected = torch.cat([torch.zeros_like(resized[:, :1]), resized], 1).unflatten(-1, (2, 3))
        assert relative_error(layer._positions(list(size)), expected) <= TOLERANCE


def test_efficient_reads_descriptions_of_the_map():
    layer = build("efficient", 6, 2, (4, 4), num_prefix_tokens=1)
    x = torch.randn(2, 13, 6, dtype=torch.float64)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 3)).unbind(2)
    out = torch.einsum("blnd,bmnd,bmne->blne", q.softmax(-1), k.softmax(1), v)
    assert relative_error(layer(x, [3, 4]), layer.proj(out.flatten(2))) <= TOLERANCE


def test_relu_by_hand():
    """Two prefix tokens: attention of all tokens by the weights that are told, then convolutions of the map alone."""
    layer = build("relu_linear", 6, 2, (4, 4), num_prefix_tokens=2, floor=2.0, lcm=True).eval()
    x = torch.randn(2, 2 + 3 * 5, 6, dtype=torch.float64)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 3)).unbind(2)
    pairs = torch.einsum("blnd,bmnd->bnlm", q.relu(), k.relu())
    total = pairs.sum(-1, keepdim=True)
    assert (total < 2).any()
    assert (total > 2).any()
    weights = pairs / total.clamp(min=2) * layer.temperature
    assert relative_error(layer.attended(x, [3, 5])["weights"], weights) <= TOLERANCE
    out = layer.proj(torch.einsum("bnlm,bmnd->blnd", weights, v).flatten(2))
    lcm = layer.lcm
    local = F.conv2d(out[:, 2:].mT.unflatten(2, (3, 5)), lcm.conv1.weight, lcm.conv1.bias, padding=3, groups=6)
    local = lcm.bn(F.gelu(local))
    local = F.conv2d(local, lcm.conv2.weight, lcm.conv2.bias, padding=3, groups=6)
    out = torch.cat([out[:, :2], out[:, 2:] + local.flatten(2).mT], 1)
    assert relative_error(layer(x, [3, 5]), out) <= TOLERANCE


@torch.no_grad()
def test_relu_tells_of_sums_beyond_float16():
    layer = build("relu_linear", 6, 2, (4, 4))
    layer.qkv.weight.copy_(torch.eye(6).repeat(3, 1))
    layer.qkv.bias.zero_()
    x = torch.rand(2, 60, 60, 6, dtype=torch.float64) * 10
    expected = layer.attended(x)["weights"]
    layer, x = layer.half(), x.half()
    assert relative_error(layer.attended(x)["weights"], expected) <= OP[torch.float16]


def test_flow_is_conserved():
    """The values, weighed by competition and allocation as they are told, of tokens and of a map with reduced keys."""
    layer = build("flow", 6, 2, (4, 4), num_prefix_tokens=1)
    x = torch.randn(2, 13, 6, dtype=torch.float64)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 3)).unbind(2)
    competition, allocation = layer.attended(x, [3, 4]).values()
    weights = torch.einsum("blnd,bmnd->blnm", q.sigmoid(), k.sigmoid())
    weights = weights / weights.sum(-1, keepdim=True) * allocation[..., None]
    out = torch.einsum("blnm,bmnd->blnd", weights, competition[..., None] * v)
    assert relative_error(layer(x, [3, 4]), layer.proj(out.flatten(2))) <= 1e-5  # what is added to sums is left out
    assert relative_error(competition.mean(1), torch.ones(2, 2)) <= TOLERANCE

    told = build("flow", 6, 2, (4, 4), sr_ratio=2).attended(torch.randn(2, 7, 4, 6, dtype=torch.float64))
    assert {n: tuple(t.shape) for n, t in told.items()} == {"competition": (2, 3, 2, 2), "allocation": (2, 7, 4, 2)}


def test_padding_stays_as_it_is():
    """A padded batch gives what each image gives alone, and the padding, whatever it holds, comes out unchanged."""
    module = EfficientAttention2d(6, 8, 2, 4, dtype=torch.float64)
    x, mask = torch.randn(2, 6, 7, 9, dtype=torch.float64), torch.zeros(2, 7, 9, dtype=torch.bool)
    mask[0, :5, :4], mask[1, :7, :2] = True, True
    out = module(x, mask)
    assert torch.equal(out.movedim(1, -1)[~mask], x.movedim(1, -1)[~mask])
    for i, (h, w) in enumerate(((5, 4), (7, 2))):
        assert relative_error(out[i : i + 1, :, :h, :w], module(x[i : i + 1, :, :h, :w])) <= TOLERANCE


def test_starts_as_the_identity_and_trains():
    module = EfficientAttention2d(6, 8, 2, 4, zero_init=True)
    x = torch.randn(2, 6, 7, 9)
    assert torch.equal(module(x), x)
    module(x).square().sum().backward()
    assert module.reprojection.weight.grad.norm() > 0
    assert not torch.equal(EfficientAttention2d(6, 8, 2, 4)(x), x)
