"""The base class of all families: attention on request, and a projection behind the last level."""

import pytest
import timm
import torch

import visattn  # noqa: F401
from tests.tolerances import SAME_MODEL, relative_error
from visattn.models._backbone import TellsAttended
from visattn.models.nat import NAT

NAMES = ["stages.0.blocks.1.attn", "stages.3.blocks.0.attn"]


class TellingNAT(TellsAttended, NAT):
    """NAT as a family whose layers can tell."""


@pytest.fixture
def model():
    """Two of its layers tell their input."""
    model = timm.create_model("test_dinat")
    model.__class__ = TellingNAT
    for name in NAMES:
        model.get_submodule(name).attended = lambda x: {"input": x, "sum": x.sum()}
    return model


def is_clean(model):
    return not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("training", [False, True])
def test_attended_asks_every_layer_with_its_own_input(model, training):
    model.train(training)
    image = torch.randn(2, 3, 64, 96)
    told = model.attended(image)
    assert list(told) == NAMES
    stage = model.stages[0]
    x = stage.blocks[0](stage.downsample(model.patch_embed(image)))
    assert torch.equal(told[NAMES[0]]["input"], stage.blocks[1].norm1(x))
    assert told[NAMES[1]]["input"].shape == (2, 2, 3, model.num_features)
    assert model.training == training
    assert is_clean(model)


def test_attended_has_gradients_as_the_caller_wants(model):
    image = torch.randn(1, 3, 64, 64)
    model.attended(image)[NAMES[1]]["sum"].backward()
    assert model.patch_embed.conv[0].weight.grad.isfinite().all()
    with torch.no_grad():
        assert not model.attended(image)[NAMES[1]]["sum"].requires_grad


def test_nothing_stays_behind_an_error(model):
    def fail(x):
        raise RuntimeError("no memory")

    model.get_submodule(NAMES[1]).attended = fail
    with pytest.raises(RuntimeError, match="no memory"):
        model.attended(torch.randn(1, 3, 64, 64))
    assert is_clean(model)
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_only_families_that_can_tell_have_it():
    models = [timm.create_model(name) for name in ("test_dinat", "test_biformer", "test_transnext", "test_overlock")]
    tell = [model.pretrained_cfg["architecture"] for model in models if hasattr(model, "attended")]
    assert tell == ["test_biformer", "test_transnext", "test_overlock"]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("test_dinat", "stages.0.blocks.0"),
        ("test_pvt", "stages.3.blocks.1"),
        ("test_agent_deit", "blocks.1"),
        ("test_overlock", "focus.1.blocks.0"),
        ("test_patchconvnet", "stages.1.blocks.0"),
    ],
)
def test_checkpointing_changes_no_module_and_no_gradient(name, block):
    model = timm.create_model(name)
    modules, image, grads, calls = list(model.modules()), torch.randn(1, 3, 64, 64), [], []
    model.get_submodule(block).register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        grads.append(torch.autograd.grad(model(image).square().sum(), list(model.parameters())))
        assert len(calls) == 1 + 2 * enable
    for a, b in zip(*grads, strict=True):
        assert relative_error(a, b) <= SAME_MODEL


@torch.no_grad()
def test_a_projection_as_wide_as_the_last_level_is_still_none_of_its_norms():
    model = timm.create_model("test_halonet_va", final_dim=256).eval()
    image = torch.randn(1, 3, 64, 64)
    features, maps = model.forward_intermediates(image, norm=True)
    assert torch.equal(features, model.norm(maps[-1]))
    assert torch.equal(maps[-1], model.stages(model.patch_embed(image)))
    model.prune_intermediate_layers([4])
    assert isinstance(model.norm, torch.nn.Identity)
