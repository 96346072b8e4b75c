"""Pooling of 2 x 2 pixels: values at the border of odd maps, gradients, tracing."""

import pytest
import torch
import torch.nn.functional as F

from visattn import ops


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("size", [(1, 1), (4, 6), (5, 6), (7, 3)], ids=str)
def test_border_windows_hold_what_the_map_has(kind, size):
    x = torch.randn(2, *size, 3, dtype=torch.float64, requires_grad=True)
    repeated = F.pad(x.permute(0, 3, 1, 2), (0, size[1] % 2, 0, size[0] % 2), mode="replicate")
    pool = F.avg_pool2d if kind == "avg" else F.max_pool2d
    expected = pool(repeated, 2).permute(0, 2, 3, 1)
    got = ops.pool2x2(x, kind)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (got, expected)]
    torch.testing.assert_close(*grads)


def test_channels_last_maps_are_not_copied():
    x = torch.randn(1, 4, 6, 8)
    assert ops.pool2x2(x, "avg").is_contiguous()


def test_unknown_kind():
    with pytest.raises(ValueError, match="expected kind 'avg' or 'max', got 'min'"):
        ops.pool2x2(torch.randn(1, 2, 2, 1), "min")


@pytest.mark.parametrize(("ratio", "size"), [([2, 3], []), ([8, 8], []), ([4, 4], [3, 2]), ([1, 1], [99, 1])], ids=str)
@pytest.mark.parametrize("map_size", [(8, 12), (7, 5), (13, 1)], ids=str)
def test_grid_is_adaptive_pooling(map_size, ratio, size):
    x = torch.randn(2, *map_size, 3, dtype=torch.float64, requires_grad=True)
    got = ops.avg_pool_grid(x, ratio, size)
    if size:
        expected_size = [min(n, s) for n, s in zip(map_size, size, strict=True)]
    else:
        expected_size = [max(1, n // r) for n, r in zip(map_size, ratio, strict=True)]
    expected = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), expected_size).permute(0, 2, 3, 1)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (got, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("size", [(3, 3), (7, 7), (1, 4), (8, 12)], ids=str)
@pytest.mark.parametrize("map_size", [(8, 12), (7, 5), (3, 1)], ids=str)
def test_adaptive_pooling_to_any_size(map_size, size):
    """Also to more bins than there are pixels."""
    x = torch.randn(2, *map_size, 3, dtype=torch.float64, requires_grad=True)
    expected = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    got = ops.adaptive_avg_pool(x, size)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (got, expected)]
    torch.testing.assert_close(*grads)
