"""CSWin's stripes: the plain formula with its padding and gradients, and the arguments."""

import pytest
import torch
import torch.nn.functional as F

from tests import tolerances
from tests.layers.checks import assert_same_with_gradients, randomized
from tests.tolerances import relative_error
from visattn.layers import CrossShapedAttention


def convolved(stripe, weight, bias):
    """3x3 depthwise cross-correlation of one stripe [h, w, c], zeros around it, tap by tap."""
    h, w, _ = stripe.shape
    around = F.pad(stripe, (0, 0, 1, 1, 1, 1))
    taps = [around[i : i + h, j : j + w] * weight[:, 0, i, j] for i in range(3) for j in range(3)]
    return sum(taps) + bias


def padded(length, stripe):
    """Zeros before and after that bring a length to whole stripes, and the slices of these."""
    missing = -length % stripe
    before = missing // 2
    return before, missing - before, [slice(i, i + stripe) for i in range(0, length + missing, stripe)]


def branch(q, k, v, weight, bias, rows, cols, scale):
    """One image [H, W, N, D], stripe by stripe; a stripe is rows x cols of the padded map."""
    height, width, heads, channels = v.shape
    top, bottom, row_slices = padded(height, rows)
    left, right, col_slices = padded(width, cols)
    q, k, v = (F.pad(t, (0, 0, 0, 0, left, right, top, bottom)) for t in (q, k, v))
    out = torch.zeros_like(v)
    for r in row_slices:
        for c in col_slices:
            queries, keys, values = (t[r, c].reshape(rows * cols, heads, channels) for t in (q, k, v))
            scores = torch.einsum("qnd,knd->nqk", queries, keys) * scale
            attended = torch.einsum("nqk,knd->qnd", scores.softmax(-1), values)
            lepe = convolved(v[r, c].reshape(rows, cols, -1), weight, bias)
            out[r, c] = attended.reshape(rows, cols, heads, channels) + lepe.reshape(rows, cols, heads, channels)
    return out[top : top + height, left : left + width].flatten(2)


def by_formula(module, x, split_size):
    """The official segmentation code's rule, one image and one stripe at a time."""
    _, height, width, dim = x.shape
    weight, bias = module.lepe.weight, module.lepe.bias
    qkv = F.linear(x, module.qkv.weight, module.qkv.bias)
    q, k, v = (t.unflatten(-1, (module.num_heads, -1)) for t in qkv.split(dim, -1))
    scale = (dim // module.num_heads) ** -0.5
    half, n = dim // 2, module.num_heads // 2
    images = []
    for image in zip(q, k, v, strict=True):
        if split_size is None:
            images.append(branch(*image, weight, bias, height, width, scale))
            continue
        first, second = ([t[:, :, part] for t in image] for part in (slice(n), slice(n, None)))
        vertical = branch(*first, weight[:half], bias[:half], height, split_size, scale)
        horizontal = branch(*second, weight[half:], bias[half:], split_size, width, scale)
        images.append(torch.cat([vertical, horizontal], -1))
    return F.linear(torch.stack(images), module.proj.weight, module.proj.bias)


def create(*args, **kwargs):
    return randomized(CrossShapedAttention(*args, dtype=torch.float64, **kwargs), 0.3)


@pytest.mark.parametrize("split_size", [1, 2, 3, 7, None])
@pytest.mark.parametrize("size", [(6, 9), (7, 5), (14, 7), (1, 8), (1, 1)], ids=str)
def test_is_the_formula_with_all_gradients(split_size, size):
    module = create(12, 4, split_size)
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(module(x), by_formula(module, x, split_size), [x, *module.parameters()])


@torch.no_grad()
def test_one_branch_has_the_same_parameters():
    stripes, whole = create(8, 2, 3), create(8, 2, None, qkv_bias=True)
    whole.load_state_dict(stripes.state_dict())
    assert not create(8, 2, qkv_bias=False).qkv.bias
    x = torch.randn(1, 3, 3, 8, dtype=torch.float64)
    # a stripe as wide as the map is the map, but heads are the same: what differs is nothing
    assert relative_error(stripes(x), whole(x)) <= tolerances.OP[torch.float64]
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64)
    assert relative_error(stripes(x), whole(x)) > 0.1
