"""captum: attributions of features, by a wrapper that shows them as [B, C, H, W], and of pixels."""

import pytest
import timm
import torch
import torch.nn.functional as F

import visattn
from tests.cams import grad_cam
from tests.tolerances import SAME_MODEL, relative_error

pytest.importorskip("captum")
from captum.attr import IntegratedGradients, LayerAttribution, LayerGradCam

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SMALL = visattn.list_models("test_*")


def test_layer_grad_cam(works):
    worst, classes = 0, torch.tensor([1, 4])
    for name in SMALL:
        model, image = timm.create_model(name, num_classes=5).eval(), torch.randn(2, 3, 96, 128)
        wrapped = visattn.NCHWFeatures(model)
        _, maps = grad_cam(model, image, classes)
        got = LayerGradCam(wrapped, wrapped.features).attribute(image, classes)
        worst = max(worst, relative_error(got[:, 0], maps))
        assert LayerAttribution.interpolate(got, (96, 128)).shape == (2, 1, 96, 128)
    assert worst <= SAME_MODEL
    works("captum", "LayerGradCam with `visattn.NCHWFeatures`", f"{len(SMALL)} models: within {worst:.0e} of the map")


def test_integrated_gradients(works):
    """From the blurred image: a constant one is where normalisation jumps. Routing, max pooling and ReLU do, too."""
    worst = 0
    for name in SMALL:
        model, image = timm.create_model(name, num_classes=5).eval(), torch.randn(1, 3, 64, 96)
        blurred = F.avg_pool2d(image, 9, 1, 4)
        with torch.no_grad():
            change = (model(image) - model(blurred))[0, 1]
        how = {"n_steps": 50, "internal_batch_size": 50, "return_convergence_delta": True}
        pixels, delta = IntegratedGradients(model).attribute(image, blurred, 1, **how)
        assert pixels.shape == image.shape
        worst = max(worst, (delta / change).abs().item())
    assert worst <= 0.05
    works("captum", "IntegratedGradients, 50 steps", f"{len(SMALL)} models: adds up within {worst:.1%}")
