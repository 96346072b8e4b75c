"""The agent attention layer: the official modules with all gradients, other sizes, prefix tokens, tracing, errors."""

import pytest
import torch
import torch.nn.functional as F

from tests.layers.checks import golden_arrays, golden_cases, randomized
from tests.tolerances import OP, OP_GOLDEN_FORWARD, OP_GOLDEN_GRADIENT, relative_error
from visattn.layers import AgentAttention, create_token_mixer, init_weights

TOLERANCE = OP[torch.float64]


def run(layer, x, case):
    """Tokens through the layer as in the official backbone; CSWin's has queries, keys and values of its own."""
    if case["kind"] != "cswin":
        return layer(x.unflatten(1, case.get("hw") or case["window"])).flatten(1, 2)
    size = [case["split_size"], case["resolution"]]  # windows of whole rows
    q, k, v = (t.reshape(-1, size[0] * size[1], layer.num_heads, layer.head_dim) for t in x)
    return layer._attend(q, k, v, size, size).reshape(x.shape[1:])


@golden_cases(*(f"agent_attention_{i}" for i in (0, 2, 4, 6)))
def test_official_modules_with_all_gradients(file, prefix, case):
    data = golden_arrays(file, prefix)
    official = {k.removeprefix("param."): v for k, v in data.items() if "param." in k}
    if case["kind"] == "cswin":
        feat_size = (case["split_size"], case["resolution"])
    else:
        feat_size = case.get("trained_hw") or case["window"]
    layer = AgentAttention(
        case["dim"],
        case["num_heads"],
        feat_size,
        num_agents=case["agent_num"],
        agent_size=case.get("downstream_agent_shape"),
        dtype=torch.float64,
    )
    grads = {k.removeprefix("pgrad."): v for k, v in data.items() if "pgrad." in k}
    for tensors in (official, grads):
        for kind in ("weight", "bias"):
            if f"get_v.{kind}" in tensors:
                tensors[f"dwc.{kind}"] = tensors.pop(f"get_v.{kind}")
            if f"kv.{kind}" in tensors:
                tensors[f"qkv.{kind}"] = torch.cat([tensors.pop(f"q.{kind}"), tensors.pop(f"kv.{kind}")])
    layer.load_state_dict(official, strict=case["kind"] != "cswin")
    x = data["in0"].requires_grad_()
    out = run(layer, x, case)
    assert relative_error(out, data["out"]) <= OP_GOLDEN_FORWARD
    out.backward(data["grad_out"])
    assert relative_error(x.grad, data["grad_in0"]) <= OP_GOLDEN_GRADIENT
    parameters = dict(layer.named_parameters())
    for name, expected in grads.items():
        assert relative_error(parameters[name].grad, expected) <= OP_GOLDEN_GRADIENT, name


def plain(layer, x, size):
    """The layer's formula, token by token as the papers write it, with PyTorch's own pooling and interpolation."""
    heads, prefix = layer.num_heads, layer.num_prefix_tokens
    image = x[:, prefix:].unflatten(1, size).permute(0, 3, 1, 2)
    kh, kw = size
    if layer.sr is None:
        q, k, v = layer.qkv(x).chunk(3, -1)
    else:
        reduced = layer.sr(image)
        kh, kw = reduced.shape[2:]
        q, (k, v) = layer.q(x), layer.kv(layer.norm(reduced.flatten(2).mT)).chunk(2, -1)
    to_map = q[:, prefix:].mT.unflatten(2, size)
    agents = F.adaptive_avg_pool2d(to_map, tuple(layer.agent_size)).flatten(2).mT
    value_map = v[:, prefix:].mT.unflatten(2, (kh, kw))
    q, k, v, agents = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v, agents))

    def bias(table, rows, columns, size):  # [N, A, h, w], [1, N, A, h0, 1], [1, N, A, 1, w0]
        terms = (F.interpolate(t, size, mode="bilinear") for t in (table, rows[0], columns[0]))
        side = round(layer.num_agents**0.5)
        total = sum(terms).flatten(2).mT.unflatten(2, (side, side))  # [N, tokens, side, side]
        return F.interpolate(total, tuple(layer.agent_size), mode="bilinear").flatten(2).mT

    to_agents = bias(layer.an_bias, layer.ah_bias, layer.aw_bias, (kh, kw))
    to_queries = bias(layer.na_bias, *(t.permute(0, 1, 4, 2, 3) for t in (layer.ha_bias, layer.wa_bias)), size).mT
    if prefix:
        to_agents = torch.cat([layer.ac_bias[0], to_agents], 2)
        to_queries = torch.cat([layer.ca_bias[0], to_queries], 1)
    scale = layer.head_dim**-0.5
    gathered = (scale * agents @ k.mT + to_agents).softmax(-1) @ v
    out = (scale * q @ agents.mT + to_queries).softmax(-1) @ gathered
    out = out.transpose(1, 2).flatten(2)
    if (kh, kw) != size:
        value_map = F.interpolate(value_map, size, mode="bilinear")
    local = F.conv2d(value_map, layer.dwc.weight, layer.dwc.bias, padding=1, groups=value_map.shape[1])
    local = local.flatten(2).mT
    return layer.proj(torch.cat([out[:, :prefix], out[:, prefix:] + local], 1))


FORMS = {
    "map": {"num_agents": 9},
    "class token": {"num_agents": 9, "num_prefix_tokens": 1},
    "two prefix tokens": {"num_agents": 4, "num_prefix_tokens": 2, "qkv_bias": False},
    "other agents": {"num_agents": 4, "agent_size": (3, 5)},
    "other agents and a class token": {"num_agents": 4, "num_prefix_tokens": 1, "agent_size": (2, 2)},
    "reduced keys": {"num_agents": 9, "sr_ratio": 2},
}


@pytest.mark.parametrize("size", [(6, 8), (8, 6), (5, 11), (2, 24), (2, 2)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_maps_of_any_size(form, size):
    """(8, 6) and (2, 24) have as many tokens as the tables' map, but not its shape; (2, 2) fewer than agents."""
    layer = create_token_mixer("agent", 12, 2, feat_size=(6, 8), dtype=torch.float64, **FORMS[form])
    randomized(layer, 0.5)
    x = torch.randn(2, layer.num_prefix_tokens + size[0] * size[1], 12, dtype=torch.float64, requires_grad=True)
    inputs, results = [x, *layer.parameters()], []
    for out in (layer(x, list(size)), plain(layer, x, size)):
        results.append([out, *torch.autograd.grad(out.sin().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= TOLERANCE * max(1, b.norm())
    if not layer.num_prefix_tokens:
        assert torch.equal(layer(x.unflatten(1, size)).flatten(1, 2), results[0][0])


def test_initial_values():
    """As set on construction, and again by `init_weights` for a layer whose memory was never written."""
    layer = AgentAttention(96, 3, (14, 14), num_prefix_tokens=1)
    empty = AgentAttention(96, 3, (14, 14), num_prefix_tokens=1, device="meta").to_empty(device="cpu")
    for parameter in empty.parameters():
        parameter.data.fill_(float("nan"))
    init_weights(empty)
    for module in (layer, empty):
        tables = {n: p for n, p in module.named_parameters() if n.endswith("_bias")}
        assert len(tables) == 8
        assert all(0.015 < p.std() < 0.025 and p.mean().abs() < 0.005 for p in tables.values())
        assert all(p.isfinite().all() for p in module.parameters())
