"""The ResNeSt family: timm's outputs, official keys, stochastic depth, initialisation, dilation."""

import pytest
import timm
import torch
from torch import nn

import visattn  # noqa: F401
from tests.golden import fill
from tests.models.cases import PARAMETERS, PUBLISHED
from tests.tolerances import MODEL_GOLDEN, relative_error
from visattn.models.resnest_va import Bottleneck, checkpoint_filter_fn

TIMM = {
    "resnest50_va": "resnest50d",
    "resnest101_va": "resnest101e",
    "resnest14_va": "resnest14d",
    "resnest26_va": "resnest26d",
    "resnest50_fast_1s4x24d_va": "resnest50d_1s4x24d",
}


def random_weights(model):
    """A state dict with values that leave no layer without effect."""
    shapes = {key: value.shape for key, value in model.state_dict().items() if "num_batches" not in key}
    return fill.fill(shapes)


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_same_as_timm(name):
    theirs = timm.create_model(TIMM[name]).eval()
    weights = random_weights(theirs)
    theirs.load_state_dict(weights, strict=False)
    ours = timm.create_model(name).eval()
    ours.load_state_dict(checkpoint_filter_fn(weights, ours))
    for size in [(224, 192), (97, 131)]:
        image = fill.image((1, 3, *size))
        features, maps = ours.forward_intermediates(image)
        expected, expected_maps = theirs.forward_intermediates(image)
        assert relative_error(ours.forward_head(features), theirs.forward_head(expected)) <= MODEL_GOLDEN
        for feature, want in zip(maps, expected_maps, strict=True):
            assert relative_error(feature, want) <= MODEL_GOLDEN
    assert ours.feature_info[1:] == [
        {**info, "module": f"stages.{i}"} for i, info in enumerate(theirs.feature_info[1:])
    ]


def test_variants():
    listed = {name for name in (*PARAMETERS, *PUBLISHED) if "resnest" in name} | {"test_resnest_va"}
    assert listed == set(timm.list_models(module="resnest_va"))


@torch.no_grad()
@pytest.mark.parametrize("first", [True, False])
def test_stochastic_depth_drops_the_residual_and_keeps_the_shortcut(first):
    """timm 1.0.31 drops the shortcut where it has a convolution, and nothing where it is the identity."""
    block = Bottleneck(64, 16, 64, first=first, drop_path=0.999)
    block.load_state_dict(random_weights(block), strict=False)
    block.drop_path.scale_by_keep = False
    shortcut = nn.ReLU()(block.eval().downsample(x := torch.randn(16, 64, 7, 5)))
    assert relative_error(block(x), shortcut) > 0.1
    block.train()
    block.downsample.eval()
    torch.manual_seed(0)
    assert torch.equal(block(x), shortcut)

    block.drop_path.drop_prob = 0.0
    assert relative_error(block(x), shortcut) > 0.1


@torch.no_grad()
def test_stochastic_depth_per_sample_reaches_the_network():
    """With all residuals dropped, what is left is stem, max pool and the shortcuts' convolutions."""
    model = timm.create_model("test_resnest_va", drop_path_rate=0.5)
    rates = [
        block.drop_path.drop_prob for stage in model.stages for block in stage.blocks[-1:] if stage != model.stages[0]
    ]
    assert rates == pytest.approx([0.1, 0.3, 0.5])
    model.load_state_dict(random_weights(model), strict=False)
    for module in model.modules():
        if isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.999
    first = model.stages[0].blocks[0]
    expected = first(model.stages[0].downsample(model.eval().patch_embed(image := torch.randn(4, 3, 64, 64))))
    for stage in model.stages[1:]:
        for block in stage.blocks:
            block.drop_path.train()
            expected = nn.ReLU()(block.downsample(expected))
    torch.manual_seed(0)
    assert torch.equal(model.forward_features(image), expected)


@torch.no_grad()
def test_last_norms_start_at_zero():
    model = timm.create_model("resnest14_va").eval()
    norms = [block.bn3.weight for stage in model.stages for block in stage.blocks]
    assert len(norms) == 4
    assert not any(norm.any() for norm in norms)
    for other in (timm.create_model("resnest14_va", zero_init_last=False), timm.create_model("test_resnest_va")):
        assert all(block.bn3.weight.all() for stage in other.stages for block in stage.blocks)
    weight = model.stages[3].blocks[0].conv2.conv.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 1024)) ** 0.5, rel=0.01)

    empty = timm.create_model("resnest14_va", device="meta").to_empty(device="cpu")
    for tensor in empty.state_dict().values():
        tensor.fill_(7)
    empty.init_weights()
    for (name, got), want in zip(empty.state_dict().items(), model.state_dict().values(), strict=True):
        if "running" in name or "tracked" in name or "bn" in name:
            assert torch.equal(got, want), name
        else:
            assert got.float().std().item() == pytest.approx(want.float().std().item(), rel=0.2, abs=0.01), name


def official_dilated(model, x, output_stride):
    """The maps of an ordinary model's weights by the official rule, written out as a loop over the blocks."""
    maps, dilation, reduction = [], 1, 4
    x = nn.functional.max_pool2d(model.patch_embed(x), 3, 2, 1)
    for i, stage in enumerate(model.stages):
        dilated = i > 0 and reduction >= output_stride
        before, dilation = dilation, dilation * 2 if dilated else dilation
        reduction *= 2 if i and not dilated else 1
        for j, block in enumerate(stage.blocks):
            stride = 2 if i and j == 0 and not dilated else 1
            attention, rate = block.conv2, dilation if j else before
            attention.conv.dilation = attention.conv.padding = (rate, rate)
            y = attention(block.bn1(block.conv1(x)).relu())
            if i and j == 0:
                y = nn.functional.avg_pool2d(y, 3, stride, 1)
            y = block.bn3(block.conv3(y))
            if j == 0:
                if stride > 1:
                    x = nn.functional.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
                x = block.downsample[2](block.downsample[1](x))
            x = (y + x).relu()
        maps.append(x)
    return maps


@torch.no_grad()
@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_output_stride_dilates_as_the_official_code(output_stride):
    plain, dilated = (timm.create_model("test_resnest_va", output_stride=s).eval() for s in (32, output_stride))
    weights = random_weights(plain)
    plain.load_state_dict(weights, strict=False)
    dilated.load_state_dict(weights, strict=False)
    image = fill.image((1, 3, 97, 131))
    maps = dilated.forward_intermediates(image, intermediates_only=True)
    for feature, expected in zip(maps[1:], official_dilated(plain, image, output_stride), strict=True):
        assert relative_error(feature, expected) <= MODEL_GOLDEN


def test_dilated_pools_have_no_stride():
    model = timm.create_model("resnest50_fast_2s1x64d_va", device="meta", output_stride=8)
    assert isinstance(model.stages[0].blocks[0].avd_first, nn.Identity)
    assert [stage.blocks[0].avd_first.stride for stage in model.stages[1:]] == [2, 1, 1]
    assert [[block.conv2.conv.dilation[0] for block in stage.blocks] for stage in model.stages] == [
        [1] * 3,
        [1] * 4,
        [1] + [2] * 5,
        [2, 4, 4],
    ]
