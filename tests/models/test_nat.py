"""The NAT family: official keys, resized tables and dilations."""

import re

import pytest
import timm
import torch
from torch.nn import functional as F

import visattn  # noqa: F401
from tests.models import golden as goldens
from tests.models.golden import filter_fn, in_transformers, load, official_weights
from visattn.models.nat import resolve_dilations


def test_layer_scale_keys_of_the_official_checkpoint():
    model = timm.create_model("nat_small", device="meta")
    official = {"levels.1.blocks.0.gamma1": torch.ones(192), "levels.0.downsample.reduction.weight": torch.ones(1)}
    assert list(filter_fn(model)(official, model)) == [
        "stages.1.blocks.0.ls1.gamma",
        "stages.1.downsample.reduction.weight",
    ]


@pytest.mark.parametrize("name", ["nat_mini", "dinat_mini"])
def test_files_of_transformers_load_as_pretrained(name, tmp_path):
    """The authors' repositories of the hub have them; here with the golden's weights."""
    golden = load(name)
    weights = in_transformers(official_weights(golden), name.partition("_")[0])
    assert len(weights) == 325  # as transformers' own classifier has
    torch.save(weights, tmp_path / "pytorch_model.bin")
    overlay = {"file": str(tmp_path / "pytorch_model.bin")}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    goldens.check_case(model, golden)


def test_layer_scale_and_bare_models_of_transformers():
    """A base model's keys have no name before them, and there is no classifier."""
    model = timm.create_model("test_dinat", layer_scale=0.5, num_classes=0)
    official = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"stages\.(\d)\.downsample", lambda m: f"levels.{int(m[1]) - 1}.downsample", key)
        key = key.replace("stages.", "levels.").replace("patch_embed.conv.", "patch_embed.proj.")
        official[re.sub(r"ls(\d)\.gamma", r"gamma\1", key)] = torch.randn_like(value)
    expected = filter_fn(model)(official, model)
    assert expected.keys() == model.state_dict().keys()
    theirs = in_transformers(official)
    for weights in (theirs, {key.removeprefix("dinat."): value for key, value in theirs.items()}):
        converted = filter_fn(model)(weights, model)
        assert converted.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in converted.items())


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


def test_a_stage_with_a_single_block_has_no_dilation():
    assert resolve_dilations("detection", (1, 2, 2, 1)) == [[1], [1, 14], [1, 7], [1]]
