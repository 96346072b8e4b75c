"""The HaloNet family: timm's outputs and keys, the paper's variants, any size, options."""

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from tests.models.golden import cases, check_case, check_levels, check_native_keys_pass, load, load_official
from tests.tolerances import MODEL_GOLDEN, relative_error
from visattn.layers import HaloAttention
from visattn.models.halonet import checkpoint_filter_fn

PARAMS = {
    "halonet_h0_va": 5_502_248,
    "halonet_h1_va": 8_105_576,
    "halonet_h2_va": 9_405_608,
    "halonet_h3_va": 11_842_792,
    "halonet_h4_va": 19_103_464,
    "halonet_h5_va": 30_718_952,
    "halonet_h6_va": 43_458_280,
    "halonet_h7_va": 67_434_728,
    "halonet_h4_base128_va": 68_413_416,
    "halonet_h4_base128_conv12_va": 69_876_072,
    "halonet26t_va": 12_480_288,
    "halonet50ts_va": 22_733_280,
}
TIMM_H1 = {"num_heads": (8, 8, 8, 8), "mask_border": False, "project_first": False}


@pytest.mark.parametrize(("name", "options"), [("halonet26t", {}), ("halonet_h1", TIMM_H1)])
def test_golden(name, options):
    golden = load(f"timm_{name}")
    model = timm.create_model(f"{name}_va", **options).eval()
    load_official(model, golden)
    for case in cases(golden):
        repeats = len(case["stage_norms"]) // 4  # the second input's file entries stand there three times
        check_case(model, case, [level for level in (1, 2, 3, 4) for _ in range(repeats)])


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


@pytest.mark.parametrize("tag", ["halonet26t.a1h_in1k", "halonet50ts.a1h_in1k"])
def test_pretrained_configs_are_timms(tag):
    theirs = timm.get_pretrained_cfg(tag)
    ours = timm.get_pretrained_cfg(tag.replace(".", "_va."))
    assert ours.hf_hub_id == f"timm/{tag}"
    for key in ("num_classes", "input_size", "pool_size", "crop_pct", "interpolation", "mean", "std", "license"):
        assert getattr(ours, key) == getattr(theirs, key), key


@pytest.mark.parametrize("name", PARAMS)
def test_parameter_counts(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name]


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


@pytest.mark.parametrize("name", ["halonet26t_va", "test_halonet_va"])
def test_filter_passes_native_keys(name):
    check_native_keys_pass(name)


@torch.no_grad()
def test_timms_file_loads_as_pretrained(tmp_path):
    """The whole way of `pretrained=True`, also for grey images and 5 classes."""
    official = timm_model("halonet26t")
    torch.save(official.state_dict(), tmp_path / "halonet26t.pth")
    args = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "halonet26t.pth")}}
    image = torch.randn(1, 3, 256, 256)
    model = timm.create_model("halonet26t_va", **args).eval()
    assert relative_error(model(image), official(image)) <= MODEL_GOLDEN
    other = timm.create_model("halonet26t_va", in_chans=1, num_classes=5, **args)
    torch.testing.assert_close(other.patch_embed.conv1.conv.weight, official.stem.conv1.conv.weight.sum(1, True))
    assert other.head.fc.out_features == 5


@pytest.mark.parametrize("size", [(224, 224), (256, 192), (97, 131), (32, 32), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["test_halonet_va", "halonet26t_va", "halonet_h3_va"])
def test_any_input_size(name, size):
    model = timm.create_model(name, features_only=True)
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    check_levels(model, torch.randn(1, 3, *size))


@torch.inference_mode()
def test_detection_size():
    assert timm.create_model("halonet26t_va").eval()(torch.randn(1, 3, 800, 1216)).isfinite().all()


@torch.inference_mode()
@pytest.mark.parametrize("output_stride", [8, 16])
def test_output_stride(output_stride):
    model = timm.create_model("test_halonet_va", output_stride=output_stride).eval()
    assert [level["reduction"] for level in model.feature_info] == [min(2**i, output_stride) for i in range(1, 6)]
    for level, info in zip(model.forward_intermediates(torch.randn(1, 3, 97, 131))[1], model.feature_info, strict=True):
        assert level.shape[2:] == (-(-97 // info["reduction"]), -(-131 // info["reduction"]))
    model.load_state_dict(timm.create_model("test_halonet_va").state_dict())


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


@pytest.mark.parametrize("out_norm", ["layer", "batch"])
def test_out_norm(out_norm):
    model = timm.create_model("test_halonet_va", features_only=True, out_norm=out_norm)
    for level in model(torch.randn(2, 3, 96, 96)):
        assert level.mean().abs() < 1e-5
        assert level.square().mean().item() == pytest.approx(1, abs=0.01)


def test_drop_path_drops_the_branch_and_keeps_the_shortcut():
    model = timm.create_model("test_halonet_va", drop_path_rate=0.5).eval()
    block = model.stages[2].blocks[1]
    assert isinstance(block.shortcut, nn.Identity)
    for module in block.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.999
    x = torch.randn(1, 128, 8, 8)
    assert not torch.equal(block(x), x.relu())
    assert torch.equal(block.train()(x), x.relu())


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": ("aa", "aa", "aa")}, "expected blocks as one string of 'a' and 'c' for each of the 4 entries"),
        ({"blocks": ("aa", "aa", "ab", "aa")}, "got .*'ab'"),
        ({"blocks": ("aa", "", "aa", "aa")}, r"try \('ccc'"),
        ({"output_stride": 4}, "expected output_stride 8, 16 or 32, got 4"),
        ({"num_heads": (3, 3, 3, 3)}, "divisible by 3 heads, got 32 and 48"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_halonet_va", **options)
