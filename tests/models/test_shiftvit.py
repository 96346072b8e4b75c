"""ShiftViT: what is shifted and when, norms over whole maps, initialisation, and shifts where strides are left out."""

import pytest
import timm
import torch
from torch import nn

import visattn
from tests.tolerances import SAME_MODEL, relative_error
from visattn.models.shiftvit import Downsample, SampleNorm, ShiftBlock


@torch.no_grad()
def test_stochastic_depth_drops_the_mlp_and_never_the_shift():
    block = ShiftBlock(24, 2, mlp_ratio=2.0, drop_path=1 - 1e-7).train()
    x = torch.randn(2, 5, 6, 24)
    assert torch.equal(block(x), visattn.ops.shift(x, 2))
    assert not torch.equal(block.eval()(x), visattn.ops.shift(x, 2))


@torch.no_grad()
def test_norm_is_of_the_whole_map_of_each_image():
    norm = SampleNorm(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = 3 * torch.randn(2, 4, 5, 6) + 1
    variance, mean = torch.var_mean(x, (1, 2, 3), correction=0, keepdim=True)
    expected = (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias
    assert relative_error(norm(x), expected) <= SAME_MODEL


def test_channels_that_move():
    """One of 12, in the larger models of 16, in each direction, rounded down."""
    for name, parts in (("shiftvit_r2_tiny", 12), ("shiftvit_r4_base", 16)):
        model = timm.create_model(name, device="meta")
        for stage, level in zip(model.stages, model.feature_info, strict=True):
            assert {(block.shifted, block.step) for block in stage.blocks} == {(level["num_chs"] // parts, 1)}
    assert timm.create_model("test_shiftvit", n_div=7).stages[1].blocks[0].shifted == 56 // 7


@torch.no_grad()
def test_shifts_and_patches_are_dilated_where_strides_are_left_out():
    model = timm.create_model("test_shiftvit", output_stride=8)
    assert [stage.blocks[0].step for stage in model.stages] == [1, 1, 2, 4]
    plain, dilated = Downsample(8), Downsample(8, 1, 2)
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 9, 7, 8)
    got, y = dilated(x), plain.norm(x)
    assert got.shape == (1, 9, 7, 16)
    expected = plain.reduction(torch.cat([y[0, i, j] for i in (3, 5) for j in (2, 4)]))
    assert relative_error(got[0, 3, 2], expected) <= SAME_MODEL
    zeros = torch.zeros(8)
    assert relative_error(got[0, 7, 6], plain.reduction(torch.cat([y[0, 7, 6], zeros, zeros, zeros]))) <= SAME_MODEL


@pytest.mark.parametrize("again", [False, True])
def test_init_weights(again):
    """Truncated normal for linear layers and convolutions, zero biases, whenever it is called."""
    model = timm.create_model("test_shiftvit", embed_dim=48)
    if again:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        model.init_weights()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.bias is None or not module.bias.any()
