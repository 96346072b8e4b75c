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


@pytest.mark.parametrize("kind", ["avg", "max"])
def test_opaque(kind):
    x = torch.randn(2, 5, 6, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.visattn.pool2x2_opaque.default, (x, kind))
    assert torch.equal(torch.ops.visattn.pool2x2_opaque(x, kind), ops.pool2x2(x, kind))


def test_export_does_not_depend_on_parity():
    class Pool(torch.nn.Module):
        def forward(self, x):
            return ops.pool2x2(ops.pool2x2(x, "max"), "avg")

    shapes = {"x": {i: torch.export.Dim(n, min=5, max=64) for i, n in ((1, "h"), (2, "w"))}}
    program = torch.export.export(Pool(), (torch.randn(1, 12, 16, 3),), dynamic_shapes=shapes)
    for size in ((12, 16), (13, 14), (7, 9)):
        x = torch.randn(1, *size, 3)
        assert torch.equal(program.module()(x), Pool()(x))


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


def test_opaque_grid():
    x = torch.randn(2, 7, 6, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.visattn.avg_pool_grid_opaque.default, (x, [2, 2], []))
    with pytest.raises(ValueError, match="expected ratio of 2 ints"):
        ops.avg_pool_grid(x, [2], [])


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


def test_opaque_adaptive_pooling():
    x = torch.randn(2, 4, 6, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.visattn.adaptive_avg_pool_opaque.default, (x, [5, 2]))
    for call in ((x, [2]), (x, [0, 2]), (x[0], [2, 2])):
        with pytest.raises(ValueError, match=r"expected a map \[B, H, W, C\] and size of 2 ints >= 1"):
            ops.adaptive_avg_pool(*call)


def test_export_of_adaptive_pooling_to_more_or_fewer_bins():
    class Pool(torch.nn.Module):
        def forward(self, x):
            return ops.adaptive_avg_pool(x, [5, 6])

    shapes = {"x": {i: torch.export.Dim(n, min=1, max=64) for i, n in ((1, "h"), (2, "w"))}}
    program = torch.export.export(Pool(), (torch.randn(1, 10, 12, 3),), dynamic_shapes=shapes)
    for size in ((10, 12), (5, 6), (3, 17)):
        x = torch.randn(1, *size, 3)
        assert torch.equal(program.module()(x), Pool()(x))
