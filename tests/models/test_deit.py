"""DeiT: timm's outputs, position parameters at other sizes, depths, intermediates and options."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

import visattn  # noqa: F401
from tests.golden import fill
from tests.models.cases import PARAMETERS
from tests.models.golden import filter_fn, without_values
from tests.tolerances import MODEL_GOLDEN, SAME_MODEL, relative_error
from visattn.layers import TOKEN_MIXERS


@torch.no_grad()
def test_softmax_is_timms_deit():
    """With timm's keys unchanged; the maps of its blocks, too, and what its older method returns."""
    theirs, ours = timm.create_model("deit_tiny_patch16_224").eval(), timm.create_model("deit_tiny_va").eval()
    state = fill.fill({key: value.shape for key, value in theirs.state_dict().items()})
    theirs.load_state_dict(state)
    ours.load_state_dict(filter_fn(ours)(state, ours))
    image = fill.image((2, 3, 224, 224))
    assert relative_error(ours(image), theirs(image)) <= MODEL_GOLDEN
    args = {"indices": [3, 11], "norm": True, "return_prefix_tokens": True, "intermediates_only": True}
    for fmt in ("NCHW", "NLC"):
        got = ours.forward_intermediates(image, output_fmt=fmt, **args)
        for a, b in zip(got, theirs.forward_intermediates(image, output_fmt=fmt, **args), strict=True):
            assert relative_error(a[0], b[0]) <= MODEL_GOLDEN
            assert relative_error(a[1], b[1]) <= MODEL_GOLDEN
    got, expected = (model.get_intermediate_layers(image, 2, reshape=True) for model in (ours, theirs))
    assert relative_error(torch.stack(got), torch.stack(expected)) <= MODEL_GOLDEN


@pytest.mark.parametrize("name", [name for name in PARAMETERS if "deit" in name])
def test_positions_are_those_of_the_default_size(name):
    model = without_values(name)
    size = timm.data.resolve_model_data_config(model)["input_size"][1]
    assert model.feat_size == [size // 16] * 2


def test_agent_base_has_agents_in_the_first_four_blocks():
    model = timm.create_model("agent_deit_base", device="meta")
    assert [getattr(block.attn, "num_agents", 0) for block in model.blocks] == [81] * 4 + [0] * 8


def test_tag_of_another_size_sets_the_size():
    assert timm.create_model("deit_base_va.fb_in1k_384", device="meta").feat_size == [24, 24]
    assert timm.create_model("deit_base_va.fb_in1k_384", img_size=(97, 224), device="meta").feat_size == [7, 14]


@torch.no_grad()
def test_images_are_zero_padded_to_whole_patches():
    model = timm.create_model("test_agent_deit").eval()
    image = torch.randn(2, 3, 97, 131)
    assert torch.equal(model(image), model(F.pad(image, (0, 13, 0, 15))))


# A table of focused attention does not tell the height and width of as many patches.
RESIZED = [
    (a, s) for a in TOKEN_MIXERS for s in ((192, 256), (64, 400), (400, 64)) if a != "focused" or s == (192, 256)
]


@torch.no_grad()
@pytest.mark.parametrize(("attention", "size"), RESIZED, ids=str)
def test_weights_of_one_size_in_a_model_of_another(attention, size):
    """The model resizes its positions to an image as the filter does for a model of that size, also where the number
    of patches is that of the trained size."""
    model = timm.create_model("test_deit_va", attention=attention).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.trunc_normal_(parameter, std=0.1)
    other = timm.create_model("test_deit_va", attention=attention, img_size=size).eval()
    state = model.state_dict()
    other.load_state_dict(filter_fn(other)(state, other))
    grid = state["pos_embed"][:, 1:].mT.unflatten(2, (10, 10))
    grid = F.interpolate(grid, [n // 16 for n in size], mode="bicubic").flatten(2).mT
    assert relative_error(other.pos_embed[:, 1:], grid) <= SAME_MODEL
    assert torch.equal(other.pos_embed[:, :1], state["pos_embed"][:, :1])
    image = torch.randn(1, 3, *size)
    assert relative_error(model(image), other(image)) <= SAME_MODEL
    assert other.feat_size == [n // 16 for n in size]


@torch.no_grad()
def test_position_is_of_height_and_width():
    """A transposed image sees the transposed positions, not those of an image with as many patches."""
    model = timm.create_model("test_deit_va").eval()
    weight, table = model.patch_embed.proj.weight, model.pos_embed
    image = torch.randn(1, 3, 64, 400)
    expected = model(image)
    weight.copy_(weight.mT.clone())
    table[:, 1:] = table[:, 1:].unflatten(1, (10, 10)).transpose(1, 2).flatten(1, 2).clone()
    assert relative_error(model(image.mT), expected) <= SAME_MODEL


def test_attention_depths_and_arguments():
    args = {"attention_args": {"num_agents": 16}, "device": "meta"}
    model = timm.create_model("test_agent_deit", attention_depths=2, **args)
    assert [getattr(block.attn, "num_agents", 0) for block in model.blocks] == [16, 16, 0, 0]
    assert all(block.attn.num_prefix_tokens == 1 for block in model.blocks)
    model = timm.create_model("test_agent_deit", attention_depths=0, device="meta")
    assert not [block for block in model.blocks if hasattr(block.attn, "num_agents")]


@torch.no_grad()
def test_intermediates():
    model = timm.create_model("test_agent_deit").eval()
    image = torch.randn(2, 3, 97, 131)
    features, maps = model.forward_intermediates(image)
    assert torch.equal(features, model.forward_features(image))
    assert [level.shape for level in maps] == [(2, 96, 7, 9)] * 4
    (last,) = model.forward_intermediates(image, 1, norm=True, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(last, features[:, 1:])
    final, (early,) = model.forward_intermediates(image, [1], stop_early=True, output_fmt="NHWC")
    assert torch.equal(early.permute(0, 3, 1, 2), maps[1])
    assert torch.equal(final[:, 1:], model.norm(early).flatten(1, 2))
    with pytest.raises(ValueError, match="expected output_fmt 'NCHW', 'NHWC' or 'NLC', got 'NHCW'"):
        model.forward_intermediates(image, output_fmt="NHCW")
    with pytest.raises(ValueError, match="expected no attn_mask, got one"):
        model.forward_intermediates(image, attn_mask=torch.ones(64, 64))


@torch.no_grad()
def test_average_of_the_patches_in_place_of_the_class_token():
    model = timm.create_model("test_agent_deit", global_pool="avg").eval()
    image = torch.randn(2, 3, 64, 96)
    expected = model.head(model.fc_norm(model.forward_features(image)[:, 1:].mean(1)))
    assert relative_error(model(image), expected) <= SAME_MODEL


def test_weight_decay_and_layer_decay_are_timms():
    """As in the official classifiers, agents' biases decay; positions and the class token do not."""
    model = timm.create_model("test_agent_deit")
    optimizer = create_optimizer_v2(model, weight_decay=0.1, layer_decay=0.5)
    group = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    named = {name: group[id(p)] for name, p in model.named_parameters()}
    assert {named[name]["weight_decay"] for name in ("cls_token", "pos_embed", "norm.weight")} == {0}
    assert {named[f"blocks.1.attn.{name}"]["weight_decay"] for name in ("an_bias", "ah_bias", "qkv.weight")} == {0.1}
    scales = [named[f"blocks.{i}.attn.qkv.weight"]["lr_scale"] for i in range(4)]
    assert scales == sorted(set(scales))
    assert named["cls_token"]["lr_scale"] == named["patch_embed.proj.weight"]["lr_scale"] < scales[0]
