"""CoAtNet's block by its formula, and the computed position table against timm's."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import RelPosMlp
from torch import nn

from tests.tolerances import OP, SAME_MODEL, relative_error
from visattn.layers import GlobalAttention, LogRelPos, PooledTransformerBlock, TransformerBlock, create_pool


def block(dim=8, out_dim=16, pool="max2", **kwargs):
    attn = GlobalAttention(dim, 2, (3, 4), attn_dim=out_dim, out_dim=out_dim, dtype=torch.float64)
    pool = create_pool(pool) if pool else None
    return PooledTransformerBlock(dim, out_dim, attn, pool, dtype=torch.float64, **kwargs)


def test_first_block_of_a_stage_pools_both_branches():
    """x = Proj(Pool(x)) + Attn(Pool(Norm(x))), then the MLP."""
    module = block()
    torch.nn.init.normal_(module.norm1.weight)
    x = torch.randn(2, 8, 6, 8, dtype=torch.float64)
    pooled = F.max_pool2d(module.norm1(x), 2).permute(0, 2, 3, 1)
    y = module.shortcut(F.max_pool2d(x, 2).permute(0, 2, 3, 1)) + module.attn(pooled)
    y = y + module.mlp(F.layer_norm(y, (16,), module.norm2.weight, module.norm2.bias, module.norm2.eps))
    assert relative_error(module(x), y.permute(0, 3, 1, 2)) <= OP[torch.float64]


def test_without_pool_it_is_the_transformer_block():
    module = block(8, 8, pool=None, layer_scale=0.1)
    plain = TransformerBlock(8, module.attn, layer_scale=0.1, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    plain.norm1.eps = plain.norm2.eps = module.norm1.eps
    x = torch.randn(1, 8, 3, 5, dtype=torch.float64)
    assert relative_error(module(x), plain(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)) <= OP[torch.float64]


def test_the_width_can_change_without_a_stride():
    assert block(8, 16, pool=None)(torch.randn(1, 8, 3, 5, dtype=torch.float64)).shape == (1, 16, 3, 5)


@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d])
def test_memory_stays_channels_last(norm_layer):
    module = block(**({"norm_layer": norm_layer} if norm_layer else {}))
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    assert module(x).shape == (2, 16, 3, 4)
    assert module(x).is_contiguous(memory_format=torch.channels_last)


def test_dropped_branches_leave_the_shortcut():
    module = block(drop_path=0.999).train()
    x = torch.randn(4, 8, 4, 4, dtype=torch.float64)
    expected = module.shortcut(F.max_pool2d(x, 2).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 6)], ids=str)
def test_log_rel_pos_is_timms(size):
    theirs = RelPosMlp(size, num_heads=3, hidden_dim=16).eval()
    ours = LogRelPos(3, 16).eval()
    ours.load_state_dict(theirs.state_dict())
    table = ours(torch.empty(1, *size, 3))
    assert table.shape == (3, 2 * size[0] - 1, 2 * size[1] - 1)
    rows, cols = (i.flatten() for i in torch.meshgrid(*map(torch.arange, size), indexing="ij"))
    dense = table[:, rows[None] - rows[:, None] + size[0] - 1, cols[None] - cols[:, None] + size[1] - 1]
    assert relative_error(dense, theirs.get_bias()[0]) <= SAME_MODEL
