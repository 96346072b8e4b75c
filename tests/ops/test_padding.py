"""Padding, cropping and table resizing."""

import pytest
import torch
from timm.layers.padding import pad_same

from visattn import ops


@pytest.mark.parametrize(
    ("op", "argument", "expected"),
    [
        (ops.pad_to_at_least, [4, 9], (5, 9)),
        (ops.pad_to_at_least, [5, 7], (5, 7)),
        (ops.pad_to_multiple, [4, 7], (8, 7)),
        (ops.floor_to_multiple, [2, 7], (4, 7)),
        (ops.floor_to_multiple, [9, 1], (9, 7)),
        (ops.fit, [3, 8], (3, 8)),
        (ops.fit, [2, 1], (2, 1)),
    ],
)
def test_sizes_zeros_and_gradient(op, argument, expected):
    x = torch.randn(2, 5, 7, 3, requires_grad=True)
    out = op(x, argument)
    assert out.shape == (2, *expected, 3)
    h, w = (min(a, b) for a, b in zip(expected, (5, 7), strict=True))
    assert torch.equal(out[:, :h, :w], x[:, :h, :w])
    assert out.count_nonzero() == x[:, :h, :w].numel(), "padding is zero"
    out.sum().backward()
    expected_grad = torch.zeros_like(x)
    expected_grad[:, :h, :w] = 1
    assert torch.equal(x.grad, expected_grad)


def test_nothing_is_copied_when_nothing_changes():
    x = torch.randn(1, 4, 6, 2)
    assert ops.pad_to_multiple(x, [2, 3]).data_ptr() == x.data_ptr()


def test_three_axes():
    assert ops.pad_to_multiple(torch.randn(1, 3, 4, 5, 2), [2, 2, 2]).shape == (1, 4, 4, 6, 2)


def test_resize_rel_pos_keeps_the_centre_and_symmetry():
    table = torch.randn(3, 13, 13)
    table = table + table.flip(1) + table.flip(2) + table.flip(1, 2)
    resized = ops.resize_rel_pos(table, [21, 21])
    assert resized.shape == (3, 21, 21)
    torch.testing.assert_close(resized, resized.flip(1, 2))
    torch.testing.assert_close(resized[:, 10, 10], table[:, 6, 6])
    assert ops.resize_rel_pos(table, [13, 13]) is table or torch.equal(ops.resize_rel_pos(table, [13, 13]), table)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (5, 3), (3, 1)])
@pytest.mark.parametrize("size", [(1, 2), (7, 8), (9, 12)], ids=str)
def test_pad_same_is_tensorflows_rule(kernel, stride, size):
    x = torch.randn(2, *size, 3, dtype=torch.float64, requires_grad=True)
    got = ops.pad_same(x, [kernel] * 2, [stride] * 2)
    expected = pad_same(x.permute(0, 3, 1, 2), [kernel] * 2, [stride] * 2).permute(0, 2, 3, 1)
    assert torch.equal(got, expected)
    got.square().sum().backward()
    assert torch.equal(x.grad, 2 * x)


def test_pad_same_needs_a_kernel_of_at_least_the_stride():
    with pytest.raises(ValueError, match="expected a kernel of at least the stride"):
        ops.pad_same(torch.randn(1, 4, 4, 1), [3, 1], [2, 2])


@pytest.mark.parametrize("multiple", [(1, 7), (4, 3), (7, 2)], ids=str)
@pytest.mark.parametrize("size", [(6, 9), (1, 1), (8, 21)], ids=str)
def test_centered_padding_and_its_undoing(size, multiple):
    """CSWin's rule, also with a further axis; the odd zero comes after the map."""
    x = torch.randn(2, *size, 3, 5, requires_grad=True)
    padded = ops.pad_centered_to_multiple(x, [*multiple, 1])
    missing = [-n % m for n, m in zip(size, multiple, strict=True)]
    top, left = (n // 2 for n in missing)
    inside = padded[:, top : top + size[0], left : left + size[1]]
    assert padded.shape == (2, *(n + m for n, m in zip(size, missing, strict=True)), 3, 5)
    assert torch.equal(inside, x)
    assert padded.count_nonzero() == x.numel(), "padding is zero"
    assert torch.equal(ops.fit_centered(padded, [*size, 3]), x)
    (2 * padded).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_centered_padding_of_nothing_copies_nothing():
    x = torch.randn(1, 4, 6, 2)
    assert ops.pad_centered_to_multiple(x, [2, 3]).data_ptr() == x.data_ptr()


def test_padding_that_the_range_of_a_size_rules_out_leaves_no_maximum_in_its_size():
    class Pad(torch.nn.Module):
        def forward(self, x):
            return ops.pad_to_at_least(x, [3]).flatten(1)

    for low in (2, 3):
        sizes = {"x": {1: torch.export.Dim("n", min=low, max=9)}}
        program = torch.export.export(Pad(), (torch.randn(1, 5, 2),), dynamic_shapes=sizes)
        assert ("Max" in str(list(program.graph.nodes)[-2].meta["val"].shape)) == (low < 3)
        assert program.module()(torch.randn(1, low, 2)).shape == (1, 6)
