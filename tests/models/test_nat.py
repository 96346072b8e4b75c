"""The NAT family: the official code's outputs, keys, variants, dilations and sizes."""

import pytest
import timm
import torch
from torch.nn import functional as F

import visattn  # noqa: F401
from tests.golden import fill
from tests.models.golden import (
    cases,
    check_case,
    check_levels,
    check_native_keys_pass,
    filter_fn,
    load,
    load_official,
    official_weights,
)
from tests.tolerances import MODEL_GOLDEN
from visattn.models.nat import resolve_dilations

PARAMS = {
    "nat_mini": 19_984_174,
    "dinat_mini": 19_984_174,
    "nat_tiny": 27_901_582,
    "dinat_tiny": 27_901_582,
    "nat_small": 50_743_297,
    "dinat_small": 50_719_681,
    "nat_base": 89_769_652,
    "dinat_base": 89_769_652,
    "dinat_large": 200_943_514,
    "dinat_s_tiny": 28_288_354,
    "dinat_s_small": 49_606_258,
    "dinat_s_base": 87_768_224,
    "nat_isotropic_small": 21_999_736,
    "dinat_isotropic_small": 21_999_736,
    "vitrpb_small": 22_080_376,
}


@pytest.mark.parametrize(
    "name", ["nat_mini", "dinat_mini", "dinat_small", "dinat_s_tiny", "dinat_isotropic_small", "vitrpb_small"]
)
def test_golden(name):
    golden = load(name)
    model = timm.create_model(name).eval()
    load_official(model, golden)
    for case in cases(golden):
        check_case(model, case, (2, 5, 8, 11) if "isotropic" in name or "vitrpb" in name else None)


@pytest.mark.parametrize("name", PARAMS)
def test_parameter_counts_are_the_official_ones(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name]


@pytest.mark.parametrize("name", ["dinat_s_tiny", "nat_small", "vitrpb_small", "test_dinat"])
def test_filter_passes_native_keys(name):
    check_native_keys_pass(name)


def test_official_checkpoint_file_loads_as_pretrained(tmp_path):
    """The whole way of `pretrained=True`, from a file of the official layout, also for grey images and 5 classes."""
    golden = load("nat_mini")
    torch.save(official_weights(golden), tmp_path / "nat_mini.pth")
    args = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "nat_mini.pth")}}
    model = timm.create_model("nat_mini", **args).eval()
    with torch.no_grad():
        logits = model(fill.image(**golden["input"]))
    assert logits.norm().item() == pytest.approx(golden["logits_norm"], rel=MODEL_GOLDEN)

    other = timm.create_model("nat_mini", in_chans=1, num_classes=5, **args)
    first = model.patch_embed.proj[0].weight
    torch.testing.assert_close(other.patch_embed.proj[0].weight, first.sum(1, keepdim=True))
    assert torch.equal(other.stages[2].blocks[1].attn.rpb, model.stages[2].blocks[1].attn.rpb)
    assert other.head.fc.out_features == 5


def test_layer_scale_keys_of_the_official_checkpoint():
    model = timm.create_model("nat_small", device="meta")
    official = {"levels.1.blocks.0.gamma1": torch.ones(192), "levels.0.downsample.reduction.weight": torch.ones(1)}
    assert list(filter_fn(model)(official, model)) == [
        "stages.1.blocks.0.ls1.gamma",
        "stages.1.downsample.reduction.weight",
    ]


def test_computed_indices_of_the_official_checkpoint_are_left_out():
    golden = load("vitrpb_small")
    assert golden["skip"]
    model = timm.create_model("vitrpb_small", device="meta")
    official = {
        "model": {key: torch.zeros(1) for key in [*golden["keys"], *golden["skip"]] if not key.endswith(".rpb")}
    }
    tables = {key for key in model.state_dict() if key.endswith(".rpb")}
    assert filter_fn(model)(official, model).keys() == model.state_dict().keys() - tables


def test_7x7_checkpoint_into_an_11x11_model():
    golden = load("dinat_mini")
    model = timm.create_model("dinat_mini", kernel_size=11)
    weights = official_weights(golden)
    model.load_state_dict(filter_fn(model)(dict(weights), model))
    table = weights["levels.0.blocks.0.attn.rpb"]
    expected = F.interpolate(table[None], size=(21, 21), mode="bicubic", align_corners=False)[0]
    assert torch.equal(model.stages[0].blocks[0].attn.rpb, expected.float())


@pytest.mark.parametrize(
    ("name", "preset", "expected"),
    [
        ("dinat_mini", "classification", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]),
        ("dinat_mini", "detection", [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]]),
        ("dinat_tiny", "segmentation", [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4] * 3, [1, 2, 1, 2, 1]]),
        ("dinat_s_tiny", "classification", [[1, 8], [1, 4], [1, 2] * 3, [1, 1]]),
        ("dinat_s_tiny", "detection", [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]]),
        ("dinat_s_tiny", "segmentation", [[1, 16], [1, 8], [1, 2, 1, 3, 1, 4], [1, 2]]),
        (
            "dinat_large",
            "segmentation_640",
            [
                [1, 20, 1],
                [1, 5, 1, 10],
                [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5],
                [1, 2, 1, 2, 1],
            ],
        ),
        (
            "dinat_large",
            "mask2former_k11",
            [[1, 14, 1], [1, 4, 1, 7], [1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 3], [1] * 5],
        ),
        ("dinat_large_384", None, [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]),
        ("dinat_s_large_384", None, [[1, 13], [1, 6], [1, 3] * 9, [1, 1]]),
        ("dinat_large_384_11x11", None, [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]),
        ("nat_mini", None, [[1] * 3, [1] * 4, [1] * 6, [1] * 5]),
    ],
)
def test_dilations_of_the_official_configs(name, preset, expected):
    model = timm.create_model(name, device="meta", dilations=preset)
    assert [[b.attn.dilation[0] for b in stage.blocks] for stage in model.stages] == expected


@pytest.mark.parametrize(
    ("dilations", "message"),
    [
        ("dense", "expected dilations of one of .*'detection'.*got 'dense'"),
        ([[1], [1], [1], [1]], r"expected dilations for depths \(2, 2, 2, 1\)"),
        ([[1, 2]], "one per block"),
    ],
)
def test_dilations_that_do_not_fit(dilations, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_dinat", dilations=dilations)


def test_isotropic_dilations_that_do_not_fit():
    with pytest.raises(ValueError, match="expected 4 dilations"):
        timm.create_model("test_dinat_isotropic", dilations=[1, 2])
    with pytest.raises(ValueError, match="got 'detection'"):
        timm.create_model("test_dinat_isotropic", dilations="detection")


def test_a_stage_with_a_single_block_has_no_dilation():
    assert resolve_dilations("detection", (1, 2, 2, 1)) == [[1], [1, 14], [1, 7], [1]]


SIZES = [(224, 224), (256, 192), (97, 131), (32, 32), (1, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["test_dinat", "test_dinat_isotropic", "test_isotropic_vitrpb", "dinat_s_tiny"])
def test_any_input_size(name, size):
    check_levels(timm.create_model(name, features_only=True), torch.randn(1, 3, *size))


@pytest.mark.parametrize("size", [*SIZES, (800, 1216)], ids=str)
def test_mini_at_any_input_size(size):
    with torch.inference_mode():
        assert timm.create_model("dinat_mini").eval()(torch.randn(1, 3, *size)).isfinite().all()
