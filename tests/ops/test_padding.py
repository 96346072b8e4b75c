"""Padding, cropping and table resizing."""

import pytest
import torch

from visattn import ops


@pytest.mark.parametrize(
    ("op", "argument", "expected"),
    [
        (ops.pad_to_at_least, [4, 9], (5, 9)),
        (ops.pad_to_at_least, [5, 7], (5, 7)),
        (ops.pad_to_multiple, [4, 7], (8, 7)),
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
