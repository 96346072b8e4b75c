"""PyTorch's own tools: quantisation, fusing of batch norms, compilation in other precisions and memory formats."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

import visattn
from tests.cams import CHANNELS_FIRST
from tests.tolerances import SAME_MODEL, relative_error

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SMALL = visattn.list_models("test_*")
ROUNDING = 0.02  # of bfloat16


@torch.no_grad()
def test_dynamic_quantisation(works):
    quantization = pytest.importorskip("torch.ao.quantization")
    errors = {}
    for name in SMALL:
        model, image = timm.create_model(name).eval(), torch.randn(2, 3, 96, 128)
        quantised = quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
        assert not [module for module in quantised.modules() if type(module) is nn.Linear]
        errors[name] = relative_error(quantised(image), model(image))
    assert max(errors.values()) <= 0.1, errors
    assert min(errors.values()) > 0
    worst = max(errors, key=errors.get)
    measured = f"{len(SMALL)} models: logits within {errors[worst]:.1%} (`{worst}`)"
    works("torch", "torch.ao.quantization.quantize_dynamic of linear layers", measured)


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


# Norms stay that begin a branch, follow an attention, or are the network's last.
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("test_resnest_va", 0),
        ("test_resnet_ea", 0),
        ("test_halonet_va", 4),
        ("test_biformer", 1),
        ("test_coatnet_va", 3),
        ("test_maxvit_va", 5),
    ],
)
def test_fused_batch_norms(works, name, left):
    model, image = timm.create_model(name).eval(), torch.randn(2, 3, 96, 128)
    for norm in batch_norms(model):
        nn.init.normal_(norm.weight, 1, 0.2)
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
    fused = fuse(model)
    before, after = len(batch_norms(model)), len(batch_norms(fused))
    error = relative_error(fused(image), model(image))
    assert error <= 1e-5
    assert after == left < before
    works("torch", f"fx fusing of batch norms, `{name}`", f"{before} batch norms to {after}, within {error:.0e}")


def compiled_error(model, image, **how):
    torch._dynamo.reset()
    expected = model(image)
    return relative_error(torch.compile(model, fullgraph=True, **how)(image), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "names"), [(torch.float32, CHANNELS_FIRST), (torch.bfloat16, SMALL)], ids=["float32", "bfloat16"]
)
def test_compiled_channels_last(works, dtype, names):
    """Without Inductor, whose C++ takes minutes for most models."""
    errors = {}
    image = torch.randn(2, 3, 64, 96).to(dtype, memory_format=torch.channels_last)
    for name in names:
        model = timm.create_model(name).eval().to(dtype, memory_format=torch.channels_last)
        errors[name] = compiled_error(model, image, backend="aot_eager")
    assert max(errors.values()) <= (SAME_MODEL if dtype == torch.float32 else ROUNDING), errors
    measured = f"{len(names)} models: within {max(errors.values()):.0e} of eager, one graph each"
    works("torch", f"torch.compile (aot_eager), {dtype}, channels_last", measured)


@torch.no_grad()
def test_inductor(works):
    model = timm.create_model("test_deit_va", depth=2).eval().to(torch.bfloat16, memory_format=torch.channels_last)
    image = torch.randn(2, 3, 64, 96).to(torch.bfloat16, memory_format=torch.channels_last)
    error = compiled_error(model, image)
    assert error <= ROUNDING
    works("torch", "torch.compile, torch.bfloat16, channels_last", f"`test_deit_va`: within {error:.0e} of eager")


@torch.no_grad()
def test_bfloat16(works):
    errors = {}
    for name in SMALL:
        model, image = timm.create_model(name).eval(), torch.randn(2, 3, 64, 96)
        errors[name] = relative_error(copy.deepcopy(model).bfloat16()(image.bfloat16()), model(image))
    assert max(errors.values()) <= 0.05, errors
    worst = max(errors, key=errors.get)
    works("torch", "bfloat16 weights", f"{len(SMALL)} models: within {errors[worst]:.1%} of float32 (`{worst}`)")
