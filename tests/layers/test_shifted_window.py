"""Shifted window attention: the official roll, mask and padding; axes of one window; other windows."""

import pytest
import torch
import torch.nn.functional as F

from tests import tolerances
from tests.layers.checks import assert_same_with_gradients, randomized
from tests.tolerances import relative_error
from visattn.layers import ShiftedWindowAttention


def create(*args, **kwargs):
    return randomized(ShiftedWindowAttention(*args, dtype=torch.float64, **kwargs))


def regions(length, window, shift):
    """Of each place of a rolled axis the region that it came from: tokens of two regions are no neighbours."""
    region = torch.zeros(length)
    if shift:
        region[-window:-shift], region[-shift:] = 1, 2
    return region


def by_definition(module, x, shift, table=None):
    """As in the official dense code: pad, roll, attend within each window under the mask, roll back, crop."""
    h, w = x.shape[1:3]
    wh, ww = module.window_size
    if table is None:
        table = x.new_zeros(1, 2 * wh - 1, 2 * ww - 1) if module.rpb is None else module.rpb
    x = F.pad(x, (0, 0, 0, -w % ww, 0, -h % wh))
    x = x.roll((-shift[0], -shift[1]), (1, 2))
    region = 3 * regions(x.shape[1], wh, shift[0])[:, None] + regions(x.shape[2], ww, shift[1])
    y, x_ = (t.flatten() for t in torch.meshgrid(torch.arange(wh), torch.arange(ww), indexing="ij"))
    bias = table[:, y - y[:, None] + wh - 1, x_ - x_[:, None] + ww - 1]
    out = torch.zeros_like(x)
    for top in range(0, x.shape[1], wh):
        for left in range(0, x.shape[2], ww):
            cut = (slice(None), slice(top, top + wh), slice(left, left + ww))
            q, k, v = module.qkv(x[cut].flatten(1, 2)).unflatten(-1, (3, module.num_heads, -1)).unbind(2)
            scores = torch.einsum("bqnd,bknd->bnqk", q, k) * q.shape[-1] ** -0.5 + bias
            area = region[cut[1:]].flatten()
            scores = scores.masked_fill(area != area[:, None], float("-inf"))
            attended = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v).flatten(2)
            out[cut] = module.proj(attended).unflatten(1, (wh, ww))
    return out.roll(tuple(shift), (1, 2))[:, :h, :w]


@pytest.mark.parametrize(
    ("size", "window", "args", "shift"),
    [
        ((6, 9), 3, {}, (0, 0)),
        ((6, 9), 3, {"shifted": True}, (1, 1)),
        ((7, 10), 4, {"shifted": True}, (2, 2)),
        ((9, 7), (2, 5), {"shifted": True}, (1, 2)),
        ((5, 11), 5, {"shifted": True}, (0, 2)),
        ((11, 3), 5, {"shifted": True}, (2, 0)),
        ((5, 11), 5, {"shifted": True, "always_shift": True}, (2, 2)),
        ((3, 4), 5, {"always_shift": True}, (0, 0)),
        ((2, 4), 5, {"shifted": True, "always_shift": True}, (2, 2)),
        ((1, 1), 3, {"shifted": True}, (0, 0)),
        ((7, 10), 4, {"rel_pos": False}, (0, 0)),
        ((7, 10), 4, {"shifted": True, "rel_pos": False}, (2, 2)),
    ],
)
def test_is_the_official_one_with_all_gradients(size, window, args, shift):
    module = create(12, 3, window, **args)
    assert (module.rpb is not None) == args.get("rel_pos", True)
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(module(x), by_definition(module, x, shift), [x, *module.parameters()])


def test_windows_change_and_tables_are_resized():
    module = create(8, 2, 5, shifted=True)
    x = torch.randn(1, 7, 13, 8, dtype=torch.float64)
    before = module(x)
    module.set_window_size((7, 6))
    table = F.interpolate(module.rpb[None], (13, 11), mode="bicubic", align_corners=False)[0]
    assert relative_error(module(x), by_definition(module, x, (0, 3), table)) <= tolerances.OP[torch.float64]
    module.set_window_size(5)
    assert torch.equal(module(x), before)


@torch.no_grad()
@pytest.mark.parametrize(("window", "args"), [(4, {}), ((2, 5), {"shifted": True}), (4, {"rel_pos": False})])
def test_what_is_attended_are_the_weights_of_the_values(window, args):
    """Each token gives the sum of the values of its window, as they lie there, by the weights told."""
    module = create(12, 3, window, **args)
    x = torch.randn(2, 7, 9, 12, dtype=torch.float64)
    (weights,) = module.attended(x).values()  # [B, H, W, N, M]
    (h, w), (wh, ww) = x.shape[1:3], module.window_size
    shift = [0, 0] if not module.shifted else [wh // 2, ww // 2]
    values = F.pad(x, (0, 0, 0, -w % ww, 0, -h % wh))
    values = module.qkv(values).unflatten(-1, (3, 3, 4))[:, :, :, 2].roll((-shift[0], -shift[1]), (1, 2))
    out = torch.zeros_like(values[:, :h, :w])
    for i in range(h):
        for j in range(w):
            top, left = (i - shift[0]) % values.shape[1] // wh * wh, (j - shift[1]) % values.shape[2] // ww * ww
            tokens = values[:, top : top + wh, left : left + ww].flatten(1, 2)  # [B, M, N, D]
            out[:, i, j] = torch.einsum("bnm,bmnd->bnd", weights[:, i, j], tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert relative_error(module.proj(out.flatten(3)), module(x)) <= tolerances.OP[torch.float64]
