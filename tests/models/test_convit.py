"""ConViT: timm's outputs, what heads attend to, how it starts, and where the class token joins."""

import pytest
import timm
import torch
from torch.nn import functional as F

import visattn  # noqa: F401
from tests.golden import fill
from tests.models import golden as goldens
from tests.models.golden import filter_fn
from tests.tolerances import MODEL_GOLDEN, SAME_MODEL, relative_error


def official(name, **args):
    """timm's model, its weights as the goldens' are filled, and ours with the same."""
    theirs = timm.create_model(name, **args).eval()
    theirs.load_state_dict(fill.fill({key: value.shape for key, value in theirs.state_dict().items()}))
    ours = timm.create_model(f"{name}_va", **args).eval()
    ours.load_state_dict(filter_fn(ours)(theirs.state_dict(), ours))
    return theirs, ours


@torch.no_grad()
def test_is_timms_convit():
    """Also the maps of its blocks, local and not."""
    theirs, ours = official("convit_tiny")
    image = fill.image((2, 3, 224, 224))
    assert relative_error(ours(image), theirs(image)) <= MODEL_GOLDEN
    args = {"indices": [0, 9, 11], "norm": True, "intermediates_only": True}
    for got, expected in zip(*(m.forward_intermediates(image, **args) for m in (ours, theirs)), strict=True):
        assert relative_error(got, expected) <= MODEL_GOLDEN


def test_gradients_are_timms():
    """But for the bias of positions, which cancels."""
    theirs, ours = official("convit_tiny", num_classes=3)
    image = fill.image((1, 3, 224, 224))
    for model in (theirs, ours):
        model(image).square().sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if name.endswith("pos_proj.bias"):
            assert parameter.grad.norm() <= 1e-6 * expected[name.replace("bias", "weight")].norm()
            continue
        if name not in expected:
            parts = (expected[name.replace("qkv", part)] for part in ("qk", "v"))
            expected[name] = torch.cat(list(parts))
        assert relative_error(parameter.grad, expected[name]) <= 10 * MODEL_GOLDEN, name


@torch.no_grad()
def test_golden_readout():
    golden, readout = goldens.load("convit_tiny"), goldens.load("convit_tiny_readout")["readout"]
    model = timm.create_model("convit_tiny_va").eval()
    goldens.load_official(model, golden)
    attended = model.attended(fill.image(**golden["input"]))
    assert list(attended) == [f"blocks.{i}.attn" for i in range(10)]
    for found, expected in zip(attended.values(), readout, strict=True):
        assert relative_error(found["gate"], torch.tensor(expected["gate"])) <= MODEL_GOLDEN
        assert relative_error(found["distance"][0], torch.tensor(expected["mean_distance"])) <= MODEL_GOLDEN


@torch.no_grad()
def test_attended_at_another_size():
    model = timm.create_model("test_convit_va").eval()
    attended = model.attended(torch.randn(2, 3, 97, 131))
    assert list(attended) == ["blocks.0.attn", "blocks.1.attn"]
    for found in attended.values():
        content, positional, gate = found["content"], found["positional"], found["gate"]
        assert content.shape == (2, 7, 9, 4, 7, 9)
        assert positional.shape == (7, 9, 4, 7, 9)
        gate = gate[:, None, None]
        weights = ((1 - gate) * content + gate * positional).flatten(-2)  # [B, H, W, N, S]
        assert relative_error(weights.sum(-1), torch.ones(2, 7, 9, 4)) <= SAME_MODEL
        place = torch.cartesian_prod(torch.arange(7.0), torch.arange(9.0))
        far = torch.cdist(place, place, compute_mode="donot_use_mm_for_euclid_dist").view(7, 9, 1, 63)
        assert relative_error(found["distance"], (weights * far).sum(-1).mean((1, 2))) <= SAME_MODEL


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", ["convit_tiny", "convit_small", "convit_base"])
def test_starts_as_timms_does(name, again):
    """Local heads and values that are the tokens, exactly; others like theirs."""
    torch.manual_seed(0)
    theirs = timm.create_model(name, depth=2, local_up_to_layer=1, num_classes=9)
    ours = timm.create_model(f"{name}_va", depth=2, local_up_to=1, num_classes=9)
    if again:
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.fill_(torch.nan)
        ours.init_weights()
    state = ours.state_dict()
    queries_and_keys, values = state.pop("blocks.0.attn.qkv.weight").tensor_split([2 * ours.embed_dim])
    state |= {"blocks.0.attn.qk.weight": queries_and_keys, "blocks.0.attn.v.weight": values}
    for key, value in theirs.state_dict().items():
        if 0.015 < value.std() < 0.025:  # random
            assert state[key].std().item() == pytest.approx(value.std().item(), rel=0.2), key
        else:
            assert torch.equal(state[key], value), key


@torch.no_grad()
def test_class_token_joins_after_the_local_blocks():
    model = timm.create_model("test_convit_va").eval()
    image = torch.randn(2, 3, 97, 131)
    args = {"return_prefix_tokens": True, "output_fmt": "NLC"}
    features, ((level, token),) = model.forward_intermediates(image, 1, **args)
    assert torch.equal(model.norm(torch.cat([token, level], 1)), features)
    with pytest.raises(ValueError, match=r"expected blocks from 2, before which .* got \[0, 1, 2\]; try without it"):
        model.forward_intermediates(image, **args)
    early = model.forward_intermediates(image, [1], stop_early=True)
    assert early[0].shape == (2, 63, 32)
    model.prune_intermediate_layers([1], prune_head=False)
    assert model.cls_token is None
    assert torch.equal(model.forward_features(image), early[0])
    assert torch.equal(model(image), early[0])


@torch.no_grad()
def test_weights_of_one_size_in_a_model_of_another():
    model, other = (timm.create_model("test_convit_va", img_size=size).eval() for size in (160, (64, 400)))
    state = model.state_dict()
    other.load_state_dict(filter_fn(other)(state, other))
    grid = F.interpolate(state["pos_embed"].mT.unflatten(2, (10, 10)), (4, 25), mode="bicubic").flatten(2).mT
    assert relative_error(other.pos_embed, grid) <= SAME_MODEL
    image = torch.randn(1, 3, 64, 400)
    assert relative_error(model(image), other(image)) <= SAME_MODEL
