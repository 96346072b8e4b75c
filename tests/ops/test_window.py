"""Window attention: backends against the reference, and the reference against partitions as timm makes them."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.maxxvit import grid_partition, grid_reverse, window_partition, window_reverse
from timm.models.swin_transformer import SwinTransformerBlock

from tests import tolerances
from tests.ops.gradients import Recorder
from tests.tolerances import relative_error
from visattn.ops import window_attention
from visattn.ops.geometry import Partition

BACKENDS = ["eager", "reference"]  # Triton has tests of its own: no float64


@pytest.mark.parametrize("size", [(14, 21), (7, 14)])
@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_maxvit_partitions(backend, grid, size):
    """timm's partition, SDPA and reverse; queries and keys at distance (dy, dx) read the bias at (dy + 6, dx + 6)."""
    q, k, v = torch.randn(3, 2, *size, 3, 8, dtype=torch.float64)
    bias = torch.randn(3, 13, 13, dtype=torch.float64)
    cut, join = (grid_partition, grid_reverse) if grid else (window_partition, window_reverse)
    rank = torch.arange(49)
    dy, dx = rank // 7 - (rank // 7)[:, None], rank % 7 - (rank % 7)[:, None]
    parts = (cut(x.flatten(3), (7, 7)).reshape(-1, 49, 3, 8).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*parts, attn_mask=bias[:, dy + 6, dx + 6])
    expected = join(out.transpose(1, 2).reshape(-1, 7, 7, 24), (7, 7), size).reshape(q.shape)
    got = window_attention(q, k, v, 7, grid=grid, bias=bias, backend=backend)
    assert relative_error(got, expected) <= tolerances.OP[torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_swins_cyclic_shift(backend):
    """A Swin block's attention (roll, mask, roll back) with its own projections, whose table runs from query to key."""
    block = SwinTransformerBlock(24, (14, 21), num_heads=3, window_size=7, shift_size=3).double().eval()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(2, 14, 21, 24, dtype=torch.float64)
    q, k, v = block.attn.qkv(x).unflatten(-1, (3, 3, 8)).unbind(3)
    bias = block.attn.relative_position_bias_table.T.reshape(3, 13, 13).flip(1, 2)
    out = window_attention(q, k, v, 7, 3, bias=bias, backend=backend)
    expected = block._attn(x)
    assert relative_error(block.attn.proj(out.flatten(3)), expected) <= tolerances.OP[torch.float64]


@pytest.mark.parametrize("table", [None, torch.ones(2, 13, 13)], ids=["plain", "bias"])
def test_partial_windows_are_fused(table):
    q, k, v = torch.randn(3, 1, 16, 11, 2, 32)
    with torch.no_grad(), Recorder() as recorder:
        window_attention(q, k, v, 7, 3, bias=table)
    assert "_scaled_dot_product_flash_attention_for_cpu" in recorder.names
    assert "_softmax" not in recorder.names


def test_partitions_cover_an_axis():
    for length in range(1, 20):
        for window in range(1, 9):
            for axis in [
                *(Partition(length, window, shift) for shift in range(window)),
                Partition(length, window, is_grid=True),
            ]:
                group, rank = axis.place()
                windows, slots, _ = axis.layout()
                assert group.max() < windows
                assert slots <= window
                assert len({(g, r) for g, r in zip(group.tolist(), rank.tolist(), strict=True)}) == length
                assert axis.occupied().sum() == length
                assert axis.pairs() == (group[:, None] == group).sum()
                if axis.is_grid:
                    assert windows == -(-length // window)
                    assert (group == torch.arange(length) % windows).all()
                else:
                    edge = axis.shift or window
                    expected = [0 if i < edge else 1 + (i - edge) // window for i in range(length)]
                    assert group.tolist() == expected
                    assert (rank[1:] - rank[:-1])[group[1:] == group[:-1]].eq(1).all()
