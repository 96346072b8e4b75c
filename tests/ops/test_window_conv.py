"""Convolution within windows: one window at a time, gradients, tracing, and the arguments."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.gradients import compare
from visattn import ops


def by_definition(x, weight, bias, window):
    """Every window cut out and convolved by itself."""
    (h, w), (kh, kw) = window, weight.shape[-2:]
    rows = []
    for i in range(0, x.shape[1], h):
        parts = [x[:, i : i + h, j : j + w].permute(0, 3, 1, 2) for j in range(0, x.shape[2], w)]
        parts = [F.conv2d(p, weight, bias, padding=(kh // 2, kw // 2), groups=len(weight)) for p in parts]
        rows.append(torch.cat(parts, 3))
    return torch.cat(rows, 2).permute(0, 2, 3, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (5, 1)], ids=str)
@pytest.mark.parametrize("window", [(1, 3), (6, 9), (4, 2), (8, 7)], ids=str)
def test_is_the_convolution_of_each_window(window, kernel, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 6, 9, 4), "weight": (4, 1, *kernel), "bias": (4,)}
    tensors = {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}
    compare(
        lambda x, weight, bias: ops.window_conv(x, weight, bias, list(window)),
        lambda x, weight, bias: by_definition(x, weight, bias, window),
        tensors,
    )


@pytest.mark.parametrize(("shape", "window"), [((3, 1, 3, 3), [0, 2]), ((3, 1, 2, 3), [2, 2]), ((4, 1, 3, 3), [2, 2])])
def test_arguments_that_do_not_fit(shape, window):
    with pytest.raises(ValueError, match=r"expected weight \[3, 1, kh, kw\] of odd kernels .* windows of at least 1"):
        ops.window_conv(torch.randn(1, 4, 4, 3), torch.randn(shape), None, window)
