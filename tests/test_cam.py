"""Features for class activation maps: [B, C, H, W] in every family, from the layer that the scores depend on."""

import copy

import pytest
import timm
import torch

import visattn
from tests.cams import TOKENS, grad_cam
from tests.tolerances import SAME_MODEL, relative_error

SMALL = visattn.list_models("test_*")
SIZES = ((96, 128), (64, 64), (32, 128))  # the last two have as many patches


@pytest.fixture(params=SMALL)
def model(request):
    return timm.create_model(request.param, num_classes=5).eval()


def test_features_are_channels_first(model):
    (layer,), to_nchw = visattn.cam_layers(model), visattn.reshape_transform(model)
    wrapped, found = visattn.NCHWFeatures(model), []
    wrapped.features.register_forward_hook(lambda module, args, output: found.append(output))
    layer.register_forward_hook(lambda module, args, output: found.append(to_nchw(output)))
    for size in SIZES:
        image = torch.randn(2, 3, *size)
        expected, _ = grad_cam(model, image, torch.tensor([1, 4]))
        found.clear()
        assert torch.equal(wrapped(image), model(image))
        assert len(found) == 3  # with the wrapper both hooks
        assert all(torch.equal(features, expected) for features in found)


def test_maps_add_up_to_the_scores(model):
    """Behind the last map there is only an average and a linear layer; those with more there need not add up."""
    image, classes = torch.randn(2, 3, 96, 128), torch.tensor([1, 4])
    _, maps = grad_cam(model, image, classes)
    assert maps.flatten(1).std(1).min() > 0
    wrapped = visattn.NCHWFeatures(model)
    wrapped.features.register_forward_hook(lambda module, args, output: output * 0)
    missing = model(image) - wrapped(image)
    more = ("test_maxvit_va", "test_patchconvnet", "test_patchconvnet_multi")  # a norm, class attention
    if model.pretrained_cfg["architecture"] not in (*TOKENS, *more):
        assert relative_error(maps.sum((1, 2)), missing.gather(1, classes[:, None])[:, 0]) <= SAME_MODEL


def test_nothing_stays_behind_an_error():
    model = timm.create_model("test_deit_va")
    with pytest.raises(RuntimeError):
        visattn.NCHWFeatures(model)(torch.randn(1, 5, 32, 32))
    assert not any(module._forward_hooks for module in model.modules())


def test_tokens_of_another_model_or_size_are_refused():
    model = timm.create_model("test_deit_va").eval()
    to_nchw = visattn.reshape_transform(model)
    model(torch.randn(1, 3, 64, 96))
    assert to_nchw(torch.randn(1, 1 + 24, 5)).shape == (1, 5, 4, 6)
    with pytest.raises(ValueError, match=r"expected a class token and those of the last map \[4, 6\], got 17; try"):
        to_nchw(torch.randn(1, 1 + 16, 5))


def test_asking_again_adds_no_hook():
    model = timm.create_model("test_deit_va").eval()
    transforms = [visattn.reshape_transform(model) for _ in range(3)]
    assert sum(len(module._forward_hooks) for module in model.modules()) == 1
    copied = visattn.reshape_transform(copy.deepcopy(model))  # which keeps the hook, of its own
    model(torch.randn(1, 3, 64, 96))
    assert all(to_nchw(torch.randn(1, 1 + 24, 5)).shape == (1, 5, 4, 6) for to_nchw in transforms)
    with pytest.raises(ValueError, match="try reshape_transform of the model that ran"):
        copied(torch.randn(1, 1 + 24, 5))


@pytest.mark.parametrize("ask", [visattn.cam_layers, visattn.reshape_transform, visattn.NCHWFeatures])
def test_other_models_are_refused(ask):
    with pytest.raises(TypeError, match="expected a model of visattn, got ResNet; try"):
        ask(timm.create_model("resnet10t"))
