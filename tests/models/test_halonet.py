"""The HaloNet family: timm's outputs, blocks of the paper, the final convolution, initialisation and options."""

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from tests.tolerances import MODEL_GOLDEN, relative_error
from visattn.layers import HaloAttention
from visattn.models.halonet import checkpoint_filter_fn


def timm_model(name, **options):
    """timm's network with statistics and norms that are not those of a new one."""
    model = timm.create_model(name, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("halonet50ts", (256, 256), {}),
        ("halonet50ts", (512, 256), {}),
        ("halonet26t", (256, 256), {"output_stride": 16}),
        ("halonet50ts", (256, 256), {"output_stride": 8}),
    ],
)
def test_equals_timm(name, size, options):
    official = timm_model(name, **options)
    model = timm.create_model(f"{name}_va", **options).eval()
    model.load_state_dict(checkpoint_filter_fn(official.state_dict(), model))
    image = torch.randn(1, 3, *size)
    assert relative_error(model(image), official(image)) <= MODEL_GOLDEN
    levels = model.forward_intermediates(image, intermediates_only=True)
    for got, expected in zip(levels, official.forward_intermediates(image, intermediates_only=True), strict=True):
        assert relative_error(got, expected) <= MODEL_GOLDEN
    keys = ("num_chs", "reduction")
    assert [[level[k] for k in keys] for level in model.feature_info] == [
        [level[k] for k in keys] for level in official.feature_info
    ]


def test_blocks_of_the_paper():
    """A row of the paper's table whose every setting differs from the defaults, and the strides inside it."""
    model = timm.create_model("halonet_h6_va", device="meta")
    assert [len(stage.blocks) for stage in model.stages] == [3, 3, 24, 3]
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            attn = block.mixer
            assert (attn.block_size, attn.halo_size, attn.mask_border) == (8, 4, True)
            assert attn.num_heads == (8 if i else 4)
            assert attn.kv_split == [64 * 2**i, 192 * 2**i]
            assert attn.stride == (2 if i and j == 0 else 1)
            assert block.conv3.conv.out_channels == 176 * 2**i
            assert isinstance(block.shortcut, nn.Identity) == (j > 0)


def test_conv12_has_convolutions_in_the_first_two_stages():
    model = timm.create_model("halonet_h4_base128_conv12_va", device="meta")
    kinds = [{type(block.mixer) for block in stage.blocks} for stage in model.stages]
    assert kinds == [{nn.Conv2d}, {nn.Conv2d}, {HaloAttention}, {HaloAttention}]
    assert model.stages[0].blocks[0].mixer.in_channels == 128


@torch.no_grad()
def test_final_convolution_is_no_part_of_the_levels():
    model = timm.create_model("test_halonet_va").eval()
    image = torch.randn(2, 3, 96, 128)
    features, maps = model.forward_intermediates(image)
    assert (model.num_features, model.head_hidden_size, features.shape[1]) == (96, 96, 96)
    assert torch.equal(features, model.norm(maps[-1]))
    assert torch.equal(features, model.forward_features(image))
    for level, same in zip(maps, model.forward_intermediates(image, norm=True, intermediates_only=True), strict=True):
        assert torch.equal(level, same)
    assert maps[-1].shape[1] == model.feature_info[-1]["num_chs"] == 256


@torch.no_grad()
@pytest.mark.parametrize(
    ("indices", "prune_norm", "prune_head", "width"),
    [([4], False, False, 96), ([4], True, False, 256), ([1, 4], False, True, 256), ([2], False, False, 64)],
)
def test_pruning_drops_the_final_convolution_with_the_head(indices, prune_norm, prune_head, width):
    model = timm.create_model("test_halonet_va").eval()
    image = torch.randn(1, 3, 96, 96)
    logits, maps = model(image), model.forward_intermediates(image, intermediates_only=True)
    assert model.prune_intermediate_layers(indices, prune_norm, prune_head) == indices
    assert model.num_features == model.head_hidden_size == width
    assert isinstance(model.norm, nn.Identity) == (width != 96)
    features, pruned = model.forward_intermediates(image, indices=indices)
    assert all(torch.equal(level, maps[i]) for level, i in zip(pruned, indices, strict=True))
    assert features.shape[1] == width
    expected = logits if width == 96 else features
    assert torch.equal(model(image), expected)


@pytest.mark.parametrize(("index", "width"), [(0, 64), (1, 128)])  # the first block has a convolution as shortcut
def test_drop_path_drops_the_branch_and_keeps_the_shortcut(index, width):
    block = timm.create_model("test_halonet_va", drop_path_rate=0.5).eval().stages[2].blocks[index]
    assert isinstance(block.shortcut, nn.Identity) == (index == 1)
    for module in block.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.999
            module.train()
    x = torch.randn(1, width, 8, 8)
    assert torch.equal(block(x), block.shortcut(x).relu())
    assert not torch.equal(block.eval()(x), block.shortcut(x).relu())


def test_mask_border_is_an_option_of_every_model():
    for mask_border in (True, False):
        model = timm.create_model("halonet50ts_va", device="meta", mask_border=mask_border, block_size=4, halo_size=1)
        found = [m for m in model.modules() if isinstance(m, HaloAttention)]
        assert len(found) == 5
        assert all(m.mask_border == mask_border and m.rel_h.shape[0] == 11 for m in found)


def test_dropout_before_the_classifier():
    model = timm.create_model("test_halonet_va", device="meta", drop_rate=0.3)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.3]


def test_initialisation():
    model = timm.create_model("halonet_h0_va")
    assert all((block.conv3.bn.weight == 0).all() for stage in model.stages for block in stage.blocks)
    conv = model.stages[3].blocks[1].conv1.conv.weight
    assert conv.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    attn = model.stages[3].blocks[1].mixer
    assert attn.q.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert attn.rel_h.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert model.no_weight_decay() == {"*.rel_h", "*.rel_w"}
