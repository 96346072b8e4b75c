"""Class attention: against its formulas, with and without class tokens among the keys; what it tells of itself."""

import pytest
import torch
import torch.nn.functional as F

from tests.layers.checks import assert_same_with_gradients, randomized
from tests.tolerances import OP, relative_error
from visattn.layers import ClassAttention, ClassAttentionBlock

FLOAT64 = OP[torch.float64]
OPTIONS = [
    {},
    {"attend_tokens": False},
    {"num_heads": 4, "attn_dim": 8, "qkv_bias": False, "eps": 1e-5, "mlp_ratio": 2.0},
    {"num_heads": 3, "attend_tokens": False, "mlp": torch.nn.Identity()},
]


def attention(module, tokens, keys):
    """Weights [B, n, L] of each head, and its values [B, L, D]."""
    queries = module.q(tokens).chunk(module.num_heads, -1)
    k, v = (x.chunk(module.num_heads, -1) for x in module.kv(keys).chunk(2, -1))
    scale = module.head_dim**-0.5
    weights = [torch.einsum("bnd,bld->bnl", a, b).mul(scale).softmax(-1) for a, b in zip(queries, k, strict=True)]
    return weights, v


def by_definition(block, tokens, x):
    """Equations of PatchConvNet's class block; the weights of all heads [B, N, n, L], too."""
    x = x.flatten(1, 2)
    both = torch.cat([tokens, x], 1)
    u = F.layer_norm(both, both.shape[-1:], block.norm1.weight, block.norm1.bias, block.norm1.eps)
    queries = u[:, : tokens.shape[1]]
    weights, values = attention(block.attn, queries, u if block.attend_tokens else u[:, tokens.shape[1] :])
    out = torch.cat([w @ v for w, v in zip(weights, values, strict=True)], -1)
    tokens = tokens + block.ls1.gamma * block.attn.proj(out)
    hidden = F.layer_norm(tokens, tokens.shape[-1:], block.norm2.weight, block.norm2.bias, block.norm2.eps)
    return tokens + block.ls2.gamma * block.mlp(hidden), torch.stack(weights, 1)


@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_its_definition_and_tells_its_weights(options, number):
    block = randomized(ClassAttentionBlock(12, **options, dtype=torch.float64), 0.5)
    tokens = torch.randn(2, number, 12, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 4, 12, dtype=torch.float64, requires_grad=True)
    expected, weights = by_definition(block, tokens, x)
    assert_same_with_gradients(block(tokens, x), expected, [tokens, x, *block.parameters()])
    told = block.attended(tokens, x)
    maps = weights[..., -12:].unflatten(-1, (3, 4))
    assert told["patches"].shape == (2, options.get("num_heads", 1), number, 3, 4)
    assert relative_error(told["patches"], maps) <= FLOAT64
    if block.attend_tokens:
        assert relative_error(told["tokens"], weights[..., :number]) <= FLOAT64
    else:
        assert "tokens" not in told
        torch.testing.assert_close(told["patches"].sum((-2, -1)), torch.ones_like(weights[..., 0]))


def test_projections():
    """Channels of all heads together, and no bias but that of the output, as Gramian attention heads have them."""
    module = ClassAttention(16, 8, qkv_bias=False, attn_dim=24)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {"q.weight": (24, 16), "kv.weight": (48, 16), "proj.weight": (16, 24), "proj.bias": (16,)}
    with pytest.raises(ValueError, match="expected dim divisible by num_heads, got 16 and 3"):
        ClassAttention(16, 3)
