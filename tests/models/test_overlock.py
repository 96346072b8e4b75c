"""OverLoCK: the auxiliary classifier, large convolutions that become one, dense forms, pruning, and what is told."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils.model import reparameterize_model

from tests.models import golden as goldens
from tests.tolerances import SAME_MODEL, relative_error
from visattn import layers
from visattn.models.overlock import _DENSE, checkpoint_filter_fn
from visattn.weights import WeightsError


@pytest.fixture
def image():
    return torch.randn(2, 3, 96, 128)


def create(name="test_overlock", **args):
    """A model whose parameters and statistics all matter."""
    model = timm.create_model(name, **args).eval()
    shapes = {key: value.shape for key, value in model.state_dict().items() if value.is_floating_point()}
    model.load_state_dict({**model.state_dict(), **goldens.fill.fill(shapes)})
    return model


def test_auxiliary_classifier_trains_when_it_is_told_to(image):
    model = create(aux_head=True, num_classes=5).train()
    assert model(image).shape == (2, 5)
    assert not any(p.requires_grad for p in model.aux_head.parameters())
    model.set_aux_training()
    logits, auxiliary = model(image)
    assert logits.shape == auxiliary.shape == (2, 5)
    auxiliary.sum().backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"patch_embed", "stages", "aux_head"}  # the overview's own, whatever the focus makes of it
    assert model.eval()(image).shape == (2, 5)
    model.reset_classifier(7)
    assert [x.shape for x in model.train()(image)] == [(2, 7), (2, 7)]
    model.set_aux_training(False)
    assert model(image).shape == (2, 7)
    for without in (create(), create(aux_head=True, num_classes=0)):
        with pytest.raises(ValueError, match="expected a model with an auxiliary classifier, got none; try"):
            without.set_aux_training()


@torch.no_grad()
def test_large_convolutions_become_one(image):
    """By timm's function, by the model's method, and in files: of branches for one kernel, of one kernel as it is."""
    model = create()
    expected = model(image)
    fused = reparameterize_model(model)
    assert relative_error(fused(image), expected) <= SAME_MODEL
    deployed = timm.create_model("test_overlock", deploy=True).eval()
    assert {k: v.shape for k, v in deployed.state_dict().items()} == {k: v.shape for k, v in fused.state_dict().items()}
    for weights in (model.state_dict(), fused.state_dict()):
        deployed.load_state_dict(checkpoint_filter_fn(weights, deployed))
        assert torch.equal(deployed(image), fused(image))
    assert any(len(m.branches) for m in model.modules() if isinstance(m, layers.DilatedReparam))
    model.reparameterize()
    assert torch.equal(model(image), fused(image))
    assert not [key for key in model.state_dict() if "branches" in key]


def test_branches_that_do_not_fit_are_refused():
    deployed = timm.create_model("test_overlock", deploy=True)
    half = {key: value for key, value in create().state_dict().items() if "k5_1" not in key}
    with pytest.raises(WeightsError, match=r"expected weights of stages\.0\.blocks\.0\.conv, got others, which lacks"):
        checkpoint_filter_fn(half, deployed)
    wide = create(embed_dims=(24, 32, 32, 64)).state_dict()
    with pytest.raises(WeightsError, match=r"with a size mismatch at .*, \[24, 1, 7, 7\] in place of \[16, 1, 7, 7\]"):
        checkpoint_filter_fn(wide, deployed)


@torch.no_grad()
@pytest.mark.parametrize("out_norm", _DENSE)
@pytest.mark.parametrize("indices", [(0, 1), (2,), (3,), (0, 3)])
def test_pruning_keeps_what_the_levels_need(image, out_norm, indices):
    model = create(out_norm=out_norm, aux_head=True)
    expected = model.forward_intermediates(image, list(indices), intermediates_only=True)
    before = sum(p.numel() for p in model.parameters())
    assert model.prune_intermediate_layers(list(indices)) == list(indices)
    assert model.aux_head is None
    maps = model.forward_intermediates(image, list(indices), intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    assert len(model.focus) == max(0, indices[-1] - 1)
    assert sum(p.numel() for p in model.parameters()) < before


@torch.no_grad()
def test_stopping_early_leaves_the_last_stage_out(image):
    model, calls = create(), []
    model.focus[1].register_forward_hook(lambda *_: calls.append(1))
    for stop, number in ((True, 0), (False, 1)):
        maps = model.forward_intermediates(image, [2], stop_early=stop, intermediates_only=True)
        assert (len(maps), len(calls)) == (1, number)


def test_layers_have_their_rates_in_the_order_of_their_depth():
    model = timm.create_model("test_overlock")
    optimizer = create_optimizer_v2(model, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    of = {name: scales[id(p)] for name, p in model.named_parameters()}
    names = [
        *("patch_embed.0.conv.weight", "stages.0.blocks.0.norm1.weight", "stages.3.blocks.0.norm1.weight"),
        *("context_proj.weight", "focus.0.blocks.0.norm1.weight", "focus.1.blocks.0.norm1.weight", "head.fc.weight"),
    ]
    rates = [of[name] for name in names]
    assert rates == sorted(set(rates))
    assert of["norm.bn.weight"] == rates[-2]


@torch.no_grad()
def test_focus_blocks_tell_what_they_attend_to(image):
    model = create()
    attended = model.attended(image)
    assert {name: found["context"].shape for name, found in attended.items()} == {
        "focus.0.blocks.0.mix": (2, 7, 9, 2, 7, 7),  # 6 x 8, enlarged
        "focus.1.blocks.0.mix": (2, 5, 6, 4, 7, 7),
    }


@torch.no_grad()
def test_official_segmenters_load():
    """They have what detectors have, but for what is added to the last level."""
    golden = goldens.load("overlock_xt_det")
    model = timm.create_model("overlock_xt", features_only=True, out_norm="segmentation").eval().model
    official = goldens.official_weights(golden).items()
    official = {key: value for key, value in official if not key.startswith(("h_proj.", "extra_norm.4."))}
    model.load_state_dict(checkpoint_filter_fn(goldens.detector(official), model))
    case = golden["other_inputs"][0]
    maps = model.forward_intermediates(goldens.fill.image(**case["input"]), intermediates_only=True)
    norms = [level.norm().item() for level in maps]
    assert norms[:3] == pytest.approx(case["stage_norms"][:3], rel=1e-5)
    assert norms[3] != pytest.approx(case["stage_norms"][3], rel=1e-2)
