"""Halo attention module: timm's module, the paper's definition at the border, sizes, errors."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn

from tests.tolerances import OP, relative_error
from visattn.layers import HaloAttention

TOLERANCE = OP[torch.float64]


def load_from_timm(module, official):
    d = official.dim_head_qk
    kv = official.kv.weight.unflatten(0, (official.num_heads, -1))
    module.q.weight = torch.nn.Parameter(official.q.weight.detach())
    module.kv.weight = torch.nn.Parameter(torch.cat([kv[:, :d].flatten(0, 1), kv[:, d:].flatten(0, 1)]).detach())
    module.rel_h = torch.nn.Parameter(official.pos_embed.height_rel.detach())
    module.rel_w = torch.nn.Parameter(official.pos_embed.width_rel.detach())


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"dim": 16, "num_heads": 2, "block_size": 4, "halo_size": 2}, (8, 12)),
        ({"dim": 16, "num_heads": 2, "block_size": 4, "halo_size": 2}, (7, 13)),  # partial blocks
        ({"dim": 16, "dim_out": 32, "num_heads": 4, "dim_head": 8, "stride": 2}, (16, 24)),
        ({"dim": 16, "dim_out": 48, "num_heads": 4, "dim_head": 8, "stride": 2}, (19, 9)),
        ({"dim": 16, "num_heads": 2, "block_size": 7, "halo_size": 2, "stride": 2}, (14, 14)),  # pooled
        ({"dim": 16, "num_heads": 2, "block_size": 7, "halo_size": 2, "stride": 2}, (10, 8)),
    ],
    ids=str,
)
def test_unmasked_is_timms_module_with_all_gradients(config, size):
    """Where blocks are partial, timm's module is given zeros at the bottom and right, and its output is cut."""
    official = HaloAttn(**config, dtype=torch.float64)
    module = HaloAttention(**config, mask_border=False, dtype=torch.float64)
    load_from_timm(module, official)
    x = torch.randn(2, 16, *size, dtype=torch.float64, requires_grad=True)
    (h, w), block, stride = size, official.block_size, config.get("stride", 1)
    expected = official(F.pad(x, (0, -w % block, 0, -h % block)))[..., : -(-h // stride), : -(-w // stride)]
    out = module(x)
    assert relative_error(out, expected) <= TOLERANCE
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), [x, module.q.weight, module.rel_h, module.rel_w])
    theirs = [x, official.q.weight, official.pos_embed.height_rel, official.pos_embed.width_rel]
    for got, want in zip(grads, torch.autograd.grad((expected * weight).sum(), theirs), strict=True):
        assert relative_error(got, want) <= TOLERANCE


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (5, 9), (1, 2)])
def test_masked_is_attention_over_the_windows_keys_inside_the_map(size, stride):
    """The paper's definition, query by query."""
    block, halo, heads, d, dv = 4, 3, 2, 5, 6
    module = HaloAttention(10, 12, heads, None, block, halo, stride, dtype=torch.float64)
    x = torch.randn(1, 10, *size, dtype=torch.float64)
    out = module(x)
    win, (h, w) = block + 2 * halo, size
    q = module.q(x)[0].unflatten(0, (heads, d))
    k, v = module.kv(x)[0].split([heads * d, heads * dv])
    k, v = k.unflatten(0, (heads, d)), v.unflatten(0, (heads, dv))
    for y in range(0, h, stride):
        for z in range(0, w, stride):
            top, left = y // block * block - halo, z // block * block - halo
            rows = torch.arange(max(top, 0), min(top + win, h))
            cols = torch.arange(max(left, 0), min(left + win, w))
            table_h = module.rel_h[rows - top - y % block // stride + win - 1]
            table_w = module.rel_w[cols - left - z % block // stride + win - 1]
            for n in range(heads):
                query = q[n, :, y // stride, z // stride]
                keys, values = (t[n][:, rows][:, :, cols] for t in (k, v))
                logits = torch.einsum("d,dij->ij", query, keys) * d**-0.5
                logits = logits + (table_h @ query)[:, None] + (table_w @ query)[None]
                expected = (logits.flatten().softmax(0) * values.flatten(1)).sum(1)
                got = out[0, n * dv : (n + 1) * dv, y // stride, z // stride]
                assert relative_error(got, expected) <= TOLERANCE


@pytest.mark.parametrize("mask_border", [True, False])
@pytest.mark.parametrize("block", [4, 5])
@pytest.mark.parametrize("size", [(1, 1), (2, 17), (9, 6), (16, 16)])
def test_maps_of_stride_two_have_the_size_of_a_strided_convolution(size, block, mask_border):
    module = HaloAttention(8, 12, 2, block_size=block, halo_size=1, stride=2, mask_border=mask_border)
    out = module(torch.randn(2, 8, *size))
    assert out.shape == F.conv2d(torch.randn(2, 8, *size), torch.randn(12, 8, 1, 1), stride=2).shape
    assert out.isfinite().all()


def test_odd_blocks_are_averaged_after_attention():
    """At the border of an odd map only pixels of the map are averaged."""
    strided = HaloAttention(8, num_heads=2, block_size=5, halo_size=1, stride=2)
    plain = HaloAttention(8, num_heads=2, block_size=5, halo_size=1)
    plain.load_state_dict(strided.state_dict())
    x = torch.randn(2, 8, 13, 9)
    expected = F.avg_pool2d(plain(x), 2, ceil_mode=True, count_include_pad=False)
    assert relative_error(strided(x), expected) <= OP[torch.float32]


def test_initialisation():
    module = HaloAttention(64, 128, 4, dim_head=16)
    for parameter, std in ((module.q.weight, 1 / 8), (module.kv.weight, 1 / 8), (module.rel_h, 1 / 4)):
        assert parameter.std().item() == pytest.approx(std, rel=0.1)


def test_heads_of_any_width():
    assert HaloAttention(10, 12, 4, dim_head=3)(torch.randn(1, 10, 8, 8)).shape == (1, 12, 8, 8)
