"""ResNet with efficient attention: plain weights and outputs, where the attention sits, what it does, options."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import visattn  # noqa: F401
from tests.golden import fill
from tests.tolerances import MODEL_GOLDEN, relative_error
from visattn.layers import EfficientAttention2d
from visattn.models.resnet_ea import checkpoint_filter_fn
from visattn.weights import WeightsError


def plain(**args):
    """timm's ResNet of the layers and widths of `test_resnet_ea`, no layer of it without effect."""
    args = {"layers": (1, 2, 1, 1), "channels": (8, 12, 20, 28), "num_classes": 7, **args}
    model = timm.create_model("resnet50", **args).eval()
    model.load_state_dict(fill.fill({k: v.shape for k, v in model.state_dict().items() if "num_b" not in k}), False)
    return model


def ea(**args):
    return timm.create_model("test_resnet_ea", **{"num_classes": 7, **args}).eval()


def attention(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, EfficientAttention2d)}


@torch.no_grad()
@pytest.mark.parametrize("zero_init_last", [False, True])
@pytest.mark.parametrize("size", [(96, 128), (97, 131)])
def test_plain_weights_give_the_plain_network(zero_init_last, size):
    """Through the filter always, and with `strict=False` where branches start at zero."""
    theirs, ours = plain(), ea(zero_init_last=zero_init_last)
    weights = theirs.state_dict()
    if zero_init_last:
        missing, unexpected = ours.load_state_dict(weights, strict=False)
        assert {key.rsplit(".", 2)[0] for key in missing} == set(attention(ours))
        assert not unexpected
    else:
        ours.load_state_dict(checkpoint_filter_fn({"state_dict": weights}, ours))
    x = torch.randn(2, 3, *size)
    features, maps = ours.forward_intermediates(x)
    expected, expected_maps = theirs.forward_intermediates(x)
    assert relative_error(ours.forward_head(features), theirs.forward_head(expected)) <= MODEL_GOLDEN
    for got, want in zip(maps, expected_maps, strict=True):
        assert relative_error(got, want) <= MODEL_GOLDEN
    assert ours.feature_info == theirs.feature_info


@torch.no_grad()
def test_resnet50_of_timm_loads_as_pretrained(tmp_path):
    """The whole way of `pretrained=True`, from a file of a plain ResNet-50, also for grey images and 5 classes."""
    theirs = timm.create_model("resnet50", zero_init_last=False).eval()
    save_file(theirs.state_dict(), tmp_path / "resnet50.safetensors")
    args = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "resnet50.safetensors")}}
    ours = timm.create_model("resnet50_ea", **args).eval()
    x = torch.randn(1, 3, 64, 96)
    assert relative_error(ours(x), theirs(x)) <= MODEL_GOLDEN
    other = timm.create_model("resnet50_ea", in_chans=1, num_classes=5, **args)
    assert torch.equal(other.layer3[2].conv2.weight, theirs.layer3[2].conv2.weight)
    assert other.fc.out_features == 5
    assert timm.get_pretrained_cfg("resnet50_ea").hf_hub_id == "timm/resnet50.a1_in1k"


def test_attention_follows_res3_and_res4():
    """One head, values as wide as the map, keys half of it."""
    model = timm.create_model("resnet50_ea", device="meta")
    found = attention(model)
    assert list(found) == ["layer2.4", "layer3.6"]
    for module, width in zip(found.values(), (512, 1024), strict=True):
        assert module.head_count == 1
        assert module.keys.weight.shape == module.queries.weight.shape == (width // 2, width, 1, 1)
        assert module.values.weight.shape == module.reprojection.weight.shape == (width, width, 1, 1)
    plain_keys = timm.create_model("resnet50", device="meta").state_dict().keys()
    assert plain_keys == {k for k in model.state_dict() if not k.startswith(tuple(f"{name}." for name in found))}
    assert sum(p.numel() for p in model.parameters()) == 25_557_032 + 3 * (512**2 + 1024**2) + 3 * (512 + 1024)


@torch.no_grad()
def test_a_stage_ends_with_its_attention():
    """`layer2` gives x + attention(x), of all positions: another pixel changes all of the map."""
    model = ea()
    x = model.maxpool(model.act1(model.bn1(model.conv1(torch.randn(1, 3, 64, 64)))))
    x = model.layer1(x)
    y = model.layer2[:2](x)
    module = model.layer2[2]
    assert torch.equal(model.layer2(x), module(y))
    q, k, v = module.queries(y).flatten(2), module.keys(y).flatten(2), module.values(y).flatten(2)
    heads = []
    for a, b, c in zip(q.chunk(2, 1), k.chunk(2, 1), v.chunk(2, 1), strict=True):
        heads.append((b.softmax(2) @ c.mT).mT @ a.softmax(1))
    expected = y + module.reprojection(torch.cat(heads, 1).unflatten(2, y.shape[2:]))
    assert relative_error(module(y), expected) <= MODEL_GOLDEN
    y[..., 0, 0] += 1
    assert (module(y) - expected)[0, :, -1, -1].abs().min() > 0


def test_options():
    model = ea(ea_stages=(4, 1), ea_key_channels=6, ea_value_channels=4, ea_heads=2)
    found = attention(model)
    assert list(found) == ["layer1.1", "layer4.1"]
    assert {(m.keys.out_channels, m.values.out_channels, m.head_count) for m in found.values()} == {(6, 4, 2)}
    assert not attention(ea(ea_stages=()))


def test_init_weights():
    """Attention as PyTorch's convolutions start, its reprojection at zero if residual branches are; norms reset too."""
    for zero in (True, False):
        model = ea(zero_init_last=zero)
        for run in range(2):
            for module in attention(model).values():
                assert bool(module.reprojection.weight.any()) != zero
                bound = module.keys.in_channels**-0.5
                assert 0.5 * bound < module.keys.weight.abs().max() <= bound
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))
            if run == 0:
                model.init_weights(zero_init_last=zero)
                assert all(p.isfinite().all() for p in model.parameters())
    assert bool(ea().layer1[0].bn3.weight.any())
    assert not ea(zero_init_last=True).layer1[0].bn3.weight.any()


def test_the_attention_learns_from_the_identity():
    model = ea(zero_init_last=True).train()
    model.layer1[0].bn3.weight.data.fill_(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 3, 64, 64)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
    module = model.layer2[2]
    assert all(p.grad.any() for p in (module.keys.weight, module.values.weight, module.reprojection.weight))


def test_filter_tells_of_missing_keys():
    model = ea()
    state = {key: value for key, value in model.state_dict().items() if key != "layer3.1.values.weight"}
    with pytest.raises(WeightsError, match=r"which lacks \['layer3\.1\.values\.weight'\]"):
        model.load_state_dict(checkpoint_filter_fn(state, model))


def test_variants():
    assert set(timm.list_models(module="resnet_ea")) == {"resnet50_ea", "test_resnet_ea"}
