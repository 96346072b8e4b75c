"""Window attention modules: the definition, maps that windows do not fill, tables at other windows, growing windows."""

import pytest
import torch
import torch.nn.functional as F

from tests import tolerances
from tests.layers.checks import assert_same_with_gradients, randomized
from tests.tolerances import relative_error
from visattn.layers import WindowAttention


def groups(length, size, grid):
    """The tokens of each window on one axis."""
    if grid:
        distance = -(-length // size)
        return [list(range(i, length, distance)) for i in range(distance)]
    return [list(range(i, min(i + size, length))) for i in range(0, length, size)]


def by_definition(module, x, window, table=None):
    """Softmax attention inside each group of tokens, one at a time; Google's index: displacement = key - query."""
    table = module.rpb if table is None else table
    b, h, w, c = x.shape
    q, k, v = module.qkv(x).reshape(b, h, w, 3, module.num_heads, -1).permute(3, 0, 4, 1, 2, 5)
    scale = q.shape[-1] ** -0.5 if module.scale is None else module.scale
    out = torch.zeros_like(v)
    for rows in groups(h, window[0], module.grid):
        for cols in groups(w, window[1], module.grid):
            y, x_ = (t.flatten() for t in torch.meshgrid(torch.tensor(rows), torch.tensor(cols), indexing="ij"))
            ry, rx = (t.flatten() for t in torch.meshgrid(*map(torch.arange, (len(rows), len(cols))), indexing="ij"))
            bias = table[:, ry - ry[:, None] + window[0] - 1, rx - rx[:, None] + window[1] - 1]
            scores = scale * q[:, :, y, x_] @ k[:, :, y, x_].mT + bias
            out = out.index_put((*_all(b, module.num_heads), y, x_), scores.softmax(-1) @ v[:, :, y, x_])
    return module.proj(out.permute(0, 2, 3, 1, 4).reshape(b, h, w, c))


def _all(b, n):
    return torch.arange(b)[:, None, None], torch.arange(n)[:, None]


def create(*args, **kwargs):
    return randomized(WindowAttention(*args, dtype=torch.float64, **kwargs))


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize(("window", "size"), [(3, (6, 9)), (4, (7, 10)), ((2, 5), (9, 7)), (3, (2, 8)), (2, (1, 1))])
def test_is_the_definition_with_all_gradients(grid, window, size):
    module = create(12, 3, window, grid=grid, scale=0.3 if grid else None)
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    expected = by_definition(module, x, module.window_size)
    assert_same_with_gradients(module(x), expected, [x, *module.parameters()])


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize(("size", "window"), [((16, 12), (8, 6)), ((9, 7), (5, 4)), ((1, 3), (1, 2))])
def test_growing_windows(grid, size, window):
    """Two windows per axis cover the map; the table of 3 x 3 windows is resized to them, bilinear."""
    module = create(8, 2, None, num_windows=2, table_size=3, grid=grid)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    table = F.interpolate(
        module.rpb[None], [2 * n - 1 for n in window], mode="bilinear", align_corners=False, antialias=False
    )
    assert relative_error(module(x), by_definition(module, x, window, table[0])) <= tolerances.OP[torch.float64]


def test_windows_change_and_parameters_stay():
    module = create(8, 2, 5)
    parameters, x = list(module.parameters()), torch.randn(1, 7, 9, 8, dtype=torch.float64)
    before = module(x)
    for window in ((3, 4), 7, None):
        module.set_window_size(window)
        out = module(x)
        assert out.shape == before.shape
        assert not torch.allclose(out, before)
        out.sum().backward()
        assert module.rpb.grad.isfinite().all()
    module.set_window_size(5)
    assert torch.equal(module(x), before)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
