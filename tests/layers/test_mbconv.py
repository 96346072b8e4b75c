"""Stem and MBConv against timm's and torchvision's, odd maps, dilation, stochastic depth, tracing."""

import math
from functools import partial

import pytest
import torch
from timm.models.maxxvit import MaxxVitConvCfg, MbConvBlock, Stem
from torch import nn
from torchvision.models.maxvit import MBConv as TorchvisionMBConv

from tests.tolerances import SAME_MODEL, relative_error
from visattn.layers import ConvStem, MBConv

# Name: options of timm's block, and of ours.
TIMM = {
    "google": ({"norm_eps": 1e-3, "act_layer": "gelu_tanh", "padding": "same"}, {"act": "gelu_tanh", "same_pad": True}),
    "dw": ({"norm_eps": 1e-3}, {}),
    "conv1": (
        {"norm_eps": 1e-3, "stride_mode": "1x1", "pool_type": "max2"},
        {"stride_mode": "conv1", "pool": "max2"},
    ),
    "rw": (
        {
            "norm_eps": 1e-3,
            "stride_mode": "pool",
            "pool_type": "max",
            "pre_norm_act": True,
            "expand_output": False,
            "output_bias": False,
            "attn_early": True,
            "attn_act_layer": "relu",
            "act_layer": "silu",
        },
        {
            "stride_mode": "pool",
            "pool": "max3",
            "pre_act": True,
            "expand_input": True,
            "bias": False,
            "se_early": True,
            "se_act": "relu",
            "act": "silu",
        },
    ),
}
TIMM_KEYS = {"conv1_1x1": "conv1", "conv2_kxk": "conv2", "conv3_1x1": "conv3", "shortcut.expand": "shortcut.proj"}
TORCHVISION_KEYS = {
    "layers.pre_norm": "pre_norm",
    "layers.conv_a.0": "conv1",
    "layers.conv_a.1": "norm1",
    "layers.conv_b.0": "conv2",
    "layers.conv_b.1": "norm2",
    "layers.squeeze_excitation": "se",
    "layers.conv_c": "conv3",
    "proj.1": "shortcut.proj",
}
WIDTHS = [(16, 24, 2), (16, 16, 2), (16, 16, 1)]


def randomise(module):
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    return module.eval()


def with_weights_of(ours, theirs, keys):
    state = {}
    for key, value in theirs.state_dict().items():
        for old, new in keys.items():
            key = key.replace(old, new)
        state[key] = value
    ours.load_state_dict(state)
    return ours.eval()


@torch.no_grad()
@pytest.mark.parametrize(("dim", "out_dim", "stride"), WIDTHS)
@pytest.mark.parametrize("name", TIMM)
def test_equals_timm(name, dim, out_dim, stride):
    theirs, ours = TIMM[name]
    block = randomise(MbConvBlock(dim, out_dim, stride, cfg=MaxxVitConvCfg(**theirs)))
    ours = with_weights_of(MBConv(dim, out_dim, stride, norm_eps=1e-3, **ours), block, TIMM_KEYS)
    x = torch.randn(2, dim, 8, 12)
    assert relative_error(ours(x), block(x)) <= SAME_MODEL


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 12), (7, 9)], ids=str)
@pytest.mark.parametrize(("dim", "out_dim", "stride"), WIDTHS)
def test_equals_torchvision(dim, out_dim, stride, size):
    norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    block = randomise(TorchvisionMBConv(dim, out_dim, 4, 0.25, stride, nn.GELU, norm))
    ours = MBConv(dim, out_dim, stride, pool="avg3", project_strided=True, norm_eps=1e-3, norm_momentum=0.01)
    with_weights_of(ours, block, TORCHVISION_KEYS)
    x = torch.randn(2, dim, *size)
    assert relative_error(ours(x), block(x)) <= SAME_MODEL
    ours.train()(x), block.train()(x)
    assert relative_error(ours.norm2.running_var, block.layers.conv_b[1].running_var) <= SAME_MODEL


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 18), (15, 17)], ids=str)
@pytest.mark.parametrize("padding", ["same", ""])
def test_stem_equals_timm(padding, size):
    stem = randomise(Stem(3, (8, 16), padding=padding, bias=True, act_layer="gelu_tanh", norm_eps=1e-3))
    ours = ConvStem(3, (8, 16), "gelu_tanh", bias=True, same_pad=padding == "same", norm_eps=1e-3)
    ours = with_weights_of(ours, stem, {})
    x = torch.randn(2, 3, *size)
    assert relative_error(ours(x), stem(x)) <= SAME_MODEL


@torch.no_grad()
@pytest.mark.parametrize("stride_mode", ["dw", "conv1", "pool"])
@pytest.mark.parametrize("pool", ["avg2", "avg3", "max2", "max3"])
def test_odd_maps_are_rounded_up_in_both_branches(pool, stride_mode):
    for same_pad in (False, True):
        block = MBConv(8, 16, 2, pool=pool, stride_mode=stride_mode, same_pad=same_pad).eval()
        for size in ((1, 1), (7, 8), (9, 5)):
            x = torch.randn(1, 8, *size)
            assert block(x).shape == (1, 16, *(math.ceil(n / 2) for n in size))
            x = x.contiguous(memory_format=torch.channels_last)
            assert block(x).is_contiguous(memory_format=torch.channels_last)


def branch(block, x):
    """The main branch without squeeze and excitation, which averages over the map."""
    return block.conv3(block.norm2(block.conv2(block.norm1(block.conv1(x)))))


@torch.no_grad()
def test_dilation_keeps_what_the_stride_would_have_shown():
    """Convolutions at half the stride and twice the dilation: every second pixel is what the strided ones give."""
    strided = randomise(nn.Sequential(MBConv(8, 16, 2), MBConv(16, 16)))
    dilated = nn.Sequential(MBConv(8, 16, 1), MBConv(16, 16, dilation=2)).eval()
    dilated.load_state_dict(strided.state_dict())
    x = torch.randn(1, 8, 12, 16)
    expected, got = (branch(net[1], branch(net[0], x)) for net in (strided, dilated))
    assert relative_error(got[:, :, ::2, ::2], expected) <= SAME_MODEL


def test_a_dropped_block_is_its_shortcut():
    block = MBConv(8, 16, 2, drop_path=0.999).train()
    x = torch.randn(4, 8, 6, 6)
    out = block(x)
    assert torch.equal(out, block.shortcut(x))
    assert out.abs().sum() > 0
