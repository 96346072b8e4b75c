"""Whole models with the Triton kernels, on a CPU in their interpreter, against the eager backend."""

from collections import Counter

import pytest
import timm
import torch

from tests.golden import fill
from tests.models.test_contract import SMALL
from tests.ops.gradients import Recorder
from tests.tolerances import SAME_MODEL, relative_error
from visattn.ops import explain, use_backend

# Attention to the whole map and of class tokens is PyTorch's; ResNeSt and ShiftViT have none.
WITHOUT_OPS = {
    *("test_coatnet_va", "test_deit_va", "test_isotropic_vitrpb", "test_patchconvnet", "test_patchconvnet_multi"),
    *("test_pvt", "test_resnest_va", "test_shiftvit"),
}
# What stands for the kernels where operations are counted.
KERNELS = {"fused_forward", "linear_outer", "depthwise"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMAGE, TWO_IMAGES = (1, 3, 70, 96), (2, 3, 40, 56)
# One of each kind of gradient: position tables, what queries add to keys, extra keys.
TRAINED = {"test_dinat", "test_halonet_va", "test_transnext"}

zoo = [name for name in SMALL if name not in WITHOUT_OPS]


def create(name):
    """With parameters that all matter: fresh position tables and scales of layers are nearly nothing."""
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(fill.tensor_for(name, parameter.shape))
    return model.to(DEVICE)


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch):
    """On a GPU: convolutions and products of both backends in full precision."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def calls(decisions):
    return Counter(decision.op for decision in decisions)


@torch.no_grad()
@pytest.mark.parametrize("name", zoo)
def test_outputs_are_those_of_eager(name):
    found, image, model = {}, fill.image(IMAGE).to(DEVICE), create(name)
    for backend in ("eager", "triton"):
        with use_backend(backend), explain() as decisions, Recorder() as recorder:
            features = model.forward_features(image)
        assert {decision.backend for decision in decisions} == {backend}
        assert bool(recorder.names & KERNELS) == (backend == "triton")
        found[backend] = features, model.forward_head(features), calls(decisions)
    (features, logits, ran), (expected, expected_logits, expected_calls) = found["triton"], found["eager"]
    assert ran == expected_calls
    assert relative_error(features, expected) <= SAME_MODEL
    assert relative_error(logits, expected_logits) <= SAME_MODEL


@pytest.mark.parametrize("name", [n if n in TRAINED else pytest.param(n, marks=pytest.mark.slow) for n in zoo])
def test_gradients_are_those_of_eager(name):
    found, image, model = {}, fill.image(TWO_IMAGES).to(DEVICE), create(name)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for backend in ("eager", "triton"):
        with use_backend(backend):
            logits = model(image)
            cotangent = torch.linspace(-1, 1, logits.numel(), device=DEVICE).view_as(logits)
            found[backend] = torch.autograd.grad(logits, parameters, cotangent)
    total = torch.cat([grad.flatten() for grad in found["eager"]]).norm()
    for parameter, got, expected in zip(names, found["triton"], found["eager"], strict=True):
        # Some are zero but for rounding, like that of a bias before a normalisation: those relative to all others.
        close = (got - expected).norm() <= 1e-2 * SAME_MODEL * total
        assert close or relative_error(got, expected) <= 10 * SAME_MODEL, parameter


def test_models_without_ops_have_none():
    """So that a model that gains an op is tested here."""
    for name in WITHOUT_OPS:
        with torch.no_grad(), explain() as decisions:
            timm.create_model(name).eval()(fill.image((1, 3, 64, 64)))
        assert not decisions, name
