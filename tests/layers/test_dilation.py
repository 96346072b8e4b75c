"""Convolutions and downsamplers without their strides: the same values as before, at more positions."""

import copy

import pytest
import torch
from torch import nn

from tests.tolerances import SAME_MODEL, relative_error
from visattn import layers
from visattn.layers.focused import _SharedConv

X = torch.randn(2, 9, 14, 12)


@torch.no_grad()
@pytest.mark.parametrize("conv", [layers.DepthwiseConv(12, 5), _SharedConv(6, 3, 2)], ids=["depthwise", "shared"])
def test_dilated_convolutions(conv):
    dilated = nn.Sequential(copy.deepcopy(conv))
    layers.dilate_convs(dilated, 2)
    assert relative_error(dilated(X)[:, ::2, ::2], conv(X[:, ::2, ::2])) <= SAME_MODEL


def test_strided_convolutions_stay():
    conv = nn.Conv2d(3, 4, 3, stride=2)
    layers.dilate_convs(conv, 2)
    assert (conv.dilation, conv.padding) == ((1, 1), (0, 0))


@torch.no_grad()
@pytest.mark.parametrize("kind", [layers.PatchMerging, layers.ConvDownsampler])
def test_downsamplers(kind):
    """Stride 1 after no stride, and dilated after one that was left out."""
    plain, kept, dilated = kind(12), kind(12, stride=1), kind(12, stride=1, dilation=2)
    for other in (kept, dilated):
        other.load_state_dict(plain.state_dict())
    assert relative_error(kept(X)[:, ::2, ::2], plain(X)) <= SAME_MODEL
    assert relative_error(dilated(X)[:, ::4, ::4], plain(X[:, ::2, ::2])) <= SAME_MODEL
    assert relative_error(dilated(X)[:, 1::2, 1::2], kept(X[:, 1::2, 1::2])) <= SAME_MODEL


@torch.no_grad()
def test_patches():
    plain, kept = layers.PatchConv(12, 8, 2, 2), layers.PatchConv(12, 8, 2, 1)
    kept.load_state_dict(plain.state_dict())
    x = X.permute(0, 3, 1, 2)  # [B, C, H, W]
    assert relative_error(kept(x)[:, :, :8:2, ::2], plain(x)) <= SAME_MODEL
    assert kept(x).shape[2:] == x.shape[2:]
