"""Flowformer: positions of other maps, official files, what its attention tells."""

import timm
import torch
from torch import nn

import visattn  # noqa: F401
from tests.models import golden as goldens
from tests.tolerances import SAME_MODEL, relative_error
from visattn.models.flowformer import checkpoint_filter_fn


@torch.no_grad()
def test_positions_are_resized_alike_when_images_come_and_when_weights_are_loaded():
    model = timm.create_model("test_flowformer").eval()
    nn.init.normal_(model.patch_embed.pos_embed)
    other = timm.create_model("test_flowformer", img_size=(97, 131)).eval()
    assert other.patch_embed.pos_embed.shape == (1, 48, 65, 24)
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))
    table = model.patch_embed.pos_embed.permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(table, (48, 65), mode="bicubic").permute(0, 2, 3, 1)
    assert relative_error(other.patch_embed.pos_embed, expected) <= SAME_MODEL
    image = torch.randn(2, 3, 97, 131)
    assert relative_error(model(image), other(image)) <= SAME_MODEL
    assert relative_error(model(image[..., :96, :130]), model(image)) == 0  # the last row and column are no patch


def test_official_file_of_another_size_with_a_counters_entries():
    """The positions of a 256 x 256 model, which lie in a row."""
    model = timm.create_model("flowformer_small", device="meta")
    official = goldens.official_weights(goldens.load("flowformer_cv"))
    official["pos_embed"] = torch.randn(1, 64 * 64, 96)
    official |= {"total_ops": torch.zeros(1), "blocks.0.0.mlp.total_params": torch.zeros(1)}
    converted = checkpoint_filter_fn({"model": official}, model)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
    table = official["pos_embed"].mT.unflatten(2, (64, 64))
    expected = nn.functional.interpolate(table, (56, 56), mode="bicubic").permute(0, 2, 3, 1)
    assert relative_error(converted["patch_embed.pos_embed"], expected) <= SAME_MODEL


def test_scales_are_on_the_perceptrons_alone():
    scales = [n for n, _ in timm.create_model("test_flowformer").named_parameters() if n.endswith("gamma")]
    assert [n.partition("blocks.")[2] for n in scales] == ["0.ls2.gamma"] * 3 + ["1.ls2.gamma", "0.ls2.gamma"]


def test_attended_tells_what_takes_part():
    """Per stage a map of the weights of values, whose average is 1, and one of what queries take in."""
    model = timm.create_model("test_flowformer").eval()
    told = model.attended(torch.randn(2, 3, 40, 72))
    assert list(told) == [n for n, m in model.named_modules() if n.endswith(".attn")]
    for name, layer in told.items():
        size = {"0": (20, 36), "1": (10, 18), "2": (5, 9), "3": (2, 4)}[name.split(".")[1]]
        assert layer["competition"].shape == layer["allocation"].shape == (2, *size, 3)
        torch.testing.assert_close(layer["competition"].mean((1, 2)), torch.ones(2, 3))
        assert (layer["allocation"] > 0).all()
        assert (layer["allocation"] < 1).all()
