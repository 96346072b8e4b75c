"""pytorch-grad-cam: the picture is that of Grad-CAM computed by hand on [B, C, H, W]."""

import numpy as np
import pytest
import timm
import torch

import visattn
from tests.cams import CHANNELS_FIRST, TOKENS, grad_cam

pytest.importorskip("pytorch_grad_cam")
from pytorch_grad_cam import EigenCAM, GradCAM, LayerCAM
from pytorch_grad_cam.utils.image import scale_cam_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SMALL = visattn.list_models("test_*")
CLASSES = torch.tensor([1, 4])
TARGETS = [ClassifierOutputTarget(int(number)) for number in CLASSES]


def picture(method, model, image, **options):
    with method(model, visattn.cam_layers(model), **options) as cam:
        return cam(image, TARGETS)


@pytest.mark.parametrize("size", [(192, 192), (128, 288)], ids=str)
def test_grad_cam(works, size):
    """The second size has as many patches as the first."""
    worst, without = 0, []
    for name in SMALL:
        model, image = timm.create_model(name, num_classes=5).eval(), torch.randn(2, 3, *size)
        _, maps = grad_cam(model, image, CLASSES)
        expected = scale_cam_image(scale_cam_image(maps.clamp(min=0).numpy(), size[::-1]))
        got = picture(GradCAM, model, image, reshape_transform=visattn.reshape_transform(model))
        worst = max(worst, np.abs(got - expected).max())
        wrapped = visattn.NCHWFeatures(model)
        with GradCAM(wrapped, [wrapped.features]) as cam:
            worst = max(worst, np.abs(cam(image, TARGETS) - expected).max())
        if name not in (*CHANNELS_FIRST, *TOKENS):  # whose default call raises
            without.append(np.corrcoef(picture(GradCAM, model, image).ravel(), expected.ravel())[0, 1])
    assert worst <= 1e-4
    assert max(without) < 0.5  # or the test could not tell
    what = f"GradCAM with `visattn.reshape_transform`, images of {size[0]}x{size[1]}"
    measured = f"{len(SMALL)} models: within {worst:.0e} of the map by hand"
    without = f"{min(without):.2f} to {max(without):.2f}"
    works("grad-cam", what, f"{measured}; without it, channels-last ones correlate {without} with that")


@pytest.mark.parametrize("method", [EigenCAM, LayerCAM])
def test_other_methods(works, method):
    """The two ways to the features give one picture."""
    worst = 0
    for name in SMALL:
        model, image = timm.create_model(name, num_classes=5).eval(), torch.randn(2, 3, 64, 96)
        got = picture(method, model, image, reshape_transform=visattn.reshape_transform(model))
        assert got.shape == (2, 64, 96)
        wrapped = visattn.NCHWFeatures(model)
        with method(wrapped, [wrapped.features]) as cam:
            worst = max(worst, np.abs(cam(image, TARGETS) - got).max())
    assert worst <= 1e-4
    what = f"{method.__name__}, with `visattn.reshape_transform` and `visattn.NCHWFeatures`"
    works("grad-cam", what, f"{len(SMALL)} models: the same within {worst:.0e}")
