"""Attention modules: the padding of natten 0.14, tables at other sizes, gradients."""

import pytest
import torch
import torch.nn.functional as F

from tests import tolerances
from tests.layers.checks import assert_same_with_gradients
from tests.tolerances import relative_error
from visattn.layers import GlobalAttention, NeighborhoodAttention
from visattn.ops import neighborhood_attention


def natten_014(module, x):
    """The official module: pad to kernel x dilation before the projection, attend by definition, crop, project."""
    _, h, w, c = x.shape
    kernel, dilation = module.kernel_size[0], module.dilation[0]
    x = F.pad(x, (0, 0, 0, max(kernel * dilation - w, 0), 0, max(kernel * dilation - h, 0)))
    qkv = module.qkv(x).reshape(*x.shape[:3], 3, module.num_heads, c // module.num_heads)
    out = neighborhood_attention(*qkv.unbind(3), kernel, dilation, bias=module.rpb, backend="reference")
    return module.proj(out.flatten(3)[:, :h, :w])


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (7, 1), (3, 2), (5, 3)])
@pytest.mark.parametrize("size", [(1, 1), (4, 17), (17, 4), (15, 15), (21, 16)])
def test_any_size_with_all_gradients(kernel, dilation, size):
    module = NeighborhoodAttention(24, 3, kernel, dilation, dtype=torch.float64)
    torch.nn.init.normal_(module.rpb)
    torch.nn.init.normal_(module.qkv.bias)
    x = torch.randn(2, *size, 24, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(module(x), natten_014(module, x), [x, *module.parameters()])


def test_padding_tokens_carry_the_projection_bias():
    """The trap: padding comes before qkv, so a border token sees qkv.bias, not zeros."""
    module = NeighborhoodAttention(8, 2, 3, dtype=torch.float64)
    x = torch.randn(1, 2, 2, 8, dtype=torch.float64)
    before = module(x)
    with torch.no_grad():
        module.qkv.bias[16:] += 1.0  # values: every neighbour moves by one, padding included
    shift = module.proj.weight.sum(1)
    torch.testing.assert_close(module(x) - before, shift.expand(1, 2, 2, 8))


@pytest.mark.parametrize("widths", [{}, {"attn_dim": 20, "out_dim": 16}], ids=str)
def test_global_attention_is_softmax_over_the_map_with_the_swin_index(widths):
    module = GlobalAttention(12, 2, (3, 4), **widths, dtype=torch.float64)
    torch.nn.init.normal_(module.rpb)
    x = torch.randn(2, 3, 4, 12, dtype=torch.float64)
    q, k, v = module.qkv(x).reshape(2, 12, 3, 2, -1).permute(2, 0, 3, 1, 4)
    rows, cols = torch.arange(12) // 4, torch.arange(12) % 4
    bias = module.rpb[:, rows[None] - rows[:, None] + 2, cols[None] - cols[:, None] + 3]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(2, 3, 4, -1)
    assert module(x).shape[-1] == widths.get("out_dim", 12)
    assert relative_error(module(x), module.proj(expected)) <= tolerances.OP[torch.float64]


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_global_attention_resizes_its_table(mode):
    small, large = GlobalAttention(12, 2, 4, resize=mode), GlobalAttention(12, 2, (5, 9))
    torch.nn.init.normal_(small.rpb)
    table = F.interpolate(small.rpb[None], size=(9, 17), mode=mode, align_corners=False)[0]
    large.load_state_dict({**small.state_dict(), "rpb": table})
    x = torch.randn(1, 5, 9, 12)
    assert relative_error(small(x), large(x)) <= tolerances.OP[torch.float32]
