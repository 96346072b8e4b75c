"""The L2ViT family: official dense weights, averaged weights, windows, initialisation, what is attended, memory."""

import pytest
import timm
import torch
from bench_device import peak_bytes

import visattn  # noqa: F401
from tests.golden import fill
from tests.models import golden as goldens
from tests.tolerances import SAME_MODEL, relative_error
from visattn.weights import WeightsError


@torch.no_grad()
def test_official_dense_weights_give_the_normed_maps():
    """A detector's file has a norm for each level in place of the last norm and the head."""
    golden = goldens.load("l2vit_tiny")
    weights, model = goldens.official_weights(golden), timm.create_model("l2vit_tiny").eval()
    model.load_state_dict(goldens.filter_fn(model)(weights, model))
    body = {key: value for key, value in weights.items() if not key.startswith(("norm.", "head."))}
    dims = (96, 192, 384, 768)
    norms = fill.fill({f"norm{i}.{part}": [dim] for i, dim in enumerate(dims) for part in ("weight", "bias")})
    dense = timm.create_model("l2vit_tiny", features_only=True, out_norm="layer").eval().model
    dense.load_state_dict(goldens.filter_fn(dense)(goldens.detector({**body, **norms}), dense))
    image = torch.randn(1, 3, 97, 131)
    maps = model.forward_intermediates(image, intermediates_only=True, output_fmt="NHWC")
    got = dense.forward_intermediates(image, intermediates_only=True, output_fmt="NHWC")
    for i, (x, y) in enumerate(zip(maps, got, strict=True)):
        expected = torch.nn.functional.layer_norm(x, x.shape[3:], norms[f"norm{i}.weight"], norms[f"norm{i}.bias"])
        assert relative_error(y, expected) <= SAME_MODEL


@pytest.mark.parametrize(("name", "part"), [("l2vit_tiny", "model_ema"), ("l2vit_base", "model_ema"),
                                            ("l2vit_base.in22k_ft_in1k", "model")])  # fmt: skip
def test_of_files_of_averages_the_average_is_taken(name, part):
    model = timm.create_model(name, device="meta")
    file = {"model": {"norm.bias": torch.zeros(1)}, "model_ema": {"norm.bias": torch.ones(1)}}
    converted = goldens.filter_fn(model)(file, model)
    assert converted["norm.bias"] is file[part]["norm.bias"]
    with pytest.raises(WeightsError, match="expected a state dict"):
        goldens.filter_fn(model)([file], model)


def test_windows_are_larger_at_384_and_images_whole():
    model = timm.create_model("l2vit_base_384", device="meta")
    assert {stage.blocks[0].attn.window_size[0] for stage in model.stages} == {12}
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["crop_pct"], config["crop_mode"]) == ((3, 384, 384), 1.0, "squash")


def test_norms_have_the_official_eps():
    """Too little for the goldens to tell."""
    model = timm.create_model("l2vit_small", device="meta")
    eps = [m.eps for m in model.modules() if isinstance(m, (torch.nn.LayerNorm, torch.nn.BatchNorm2d))]
    assert len(eps) == 3 + 3 + 12 * 2 + 12 * 4 + 1
    assert set(eps) == {1e-5}


def test_initial_weights_are_the_official_ones():
    model = timm.create_model("l2vit_tiny")
    local, distant = model.stages[3].blocks
    for module in (model.patch_embed.conv[3], local.cpe1, distant.lcm.conv1, distant.attn.qkv):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not module.bias.any()
    assert torch.equal(distant.attn.temperature, torch.full((24, 1, 1), 32**-0.5))


@torch.no_grad()
def test_what_is_attended_comes_on_request():
    model = timm.create_model("test_l2vit").eval()
    image = torch.randn(2, 3, 97, 64)
    attended = model.attended(image)
    assert list(attended) == [f"stages.{i}.blocks.{j}.attn" for i in range(4) for j in range(2)]
    assert attended["stages.0.blocks.0.attn"]["window"].shape == (2, 25, 16, 2, 49)
    assert attended["stages.0.blocks.1.attn"]["weights"].shape == (2, 2, 400, 400)


@torch.inference_mode()
def test_memory_is_linear_in_the_pixels():
    model, per_pixel = timm.create_model("test_l2vit").eval(), []
    for height, width in ((200, 304), (400, 304), (400, 608)):
        image = torch.randn(1, 3, height, width)
        per_pixel.append(peak_bytes(lambda image=image: model(image)) / (height * width))
    assert max(per_pixel) <= 1.02 * min(per_pixel)
