"""PatchConvNet: what classes look at, the head with and without class tokens, other classes, initialisation."""

import pytest
import timm
import torch
from torch import nn

import visattn  # noqa: F401
from tests.golden import fill
from tests.models import golden as goldens
from tests.tolerances import MODEL_GOLDEN, SAME_MODEL, relative_error
from visattn.models.patchconvnet import ConvBlock

SMALL = ("test_patchconvnet", "test_patchconvnet_multi")


@torch.no_grad()
def test_class_attention_is_the_official_one():
    golden = goldens.load("patchconvnet_s60_anysize")
    model = timm.create_model("patchconvnet_s60").eval()
    goldens.load_official(model, golden)
    told = model.attended(fill.image(**golden["input"]))
    assert list(told) == ["head.block"]
    told = told["head.block"]
    assert told["patches"].shape == (1, 1, 1, 14, 14)
    weights = torch.cat([told["tokens"], told["patches"].flatten(3)], -1)  # [1, 1, 1, 197]
    expected = golden["class_attention"]
    assert list(weights.shape) == expected["shape"]
    assert relative_error(weights.flatten()[:64], torch.tensor(expected["first64"])) <= MODEL_GOLDEN
    assert weights.norm().item() == pytest.approx(expected["norm"], rel=MODEL_GOLDEN)


@torch.no_grad()
def test_every_class_has_a_map_and_sees_it_alone():
    """Also of images that are not square: rows and columns where they belong."""
    model = timm.create_model("test_patchconvnet_multi", num_classes=5).eval()
    nn.init.normal_(model.head.cls_token)
    image = torch.randn(2, 3, 97, 160)
    (told,) = model.attended(image).values()
    assert list(told) == ["patches"]
    assert told["patches"].shape == (2, 1, 5, 7, 10)
    torch.testing.assert_close(told["patches"].sum((-2, -1)), torch.ones(2, 1, 5))
    x, block = model.forward_features(image), model.head.block
    values = block.attn.kv(block.norm1(x)).chunk(2, -1)[1]  # [B, H, W, C]
    tokens = model.head.cls_token + block.ls1.gamma * block.attn.proj(
        torch.einsum("bnhw,bhwc->bnc", told["patches"][:, 0], values)
    )
    tokens = model.head.norm(tokens + block.ls2.gamma * block.mlp(block.norm2(tokens)))
    expected = torch.stack([model.head.fc(tokens[:, i])[:, i] for i in range(5)], 1)
    assert relative_error(model(image), expected) <= SAME_MODEL


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_the_head_of_other_classes(name):
    """Tokens stay without a classifier, whose features are their mean; where there is one per class, new ones come."""
    model, image = timm.create_model(name, num_classes=5).eval(), torch.randn(2, 3, 64, 96)
    multi, tokens = name.endswith("multi"), model.head.cls_token
    features = model.forward_head(model.forward_features(image), pre_logits=True)
    model.reset_classifier(0)
    assert model.head.cls_token is tokens
    assert torch.equal(model(image), features)
    model.reset_classifier(7)
    assert (model.head.cls_token is tokens) != multi
    assert model.head.cls_token.shape == (1, 7 if multi else 1, 32)
    assert model(image).shape == (2, 7)
    model.reset_classifier(7, "avg")
    assert model.head.block is model.head.cls_token is None
    expected = model.head.fc(model.head.norm(model.forward_features(image).mean((1, 2))))
    assert relative_error(model(image), expected) <= SAME_MODEL
    assert model.attended(image) == {}
    model.reset_classifier(3, "token")
    assert not model.head.block.training
    assert all(p.isfinite().all() for p in model.parameters())
    assert model(image).shape == (2, 3)


@torch.no_grad()
def test_weights_of_other_classes_leave_class_tokens_out():
    weights = timm.create_model("test_patchconvnet_multi").state_dict()
    model = timm.create_model("test_patchconvnet_multi", num_classes=5)
    converted = goldens.filter_fn(model)(dict(weights), model)
    assert weights.keys() - converted.keys() == {"head.cls_token"}
    same = timm.create_model("test_patchconvnet_multi")
    assert goldens.filter_fn(same)(dict(weights), same).keys() == weights.keys()


@torch.no_grad()
@pytest.mark.parametrize("again", [False, True])
def test_init_weights(again):
    """The trunk as PyTorch's convolutions start, class attention and classifier truncated normal."""
    model = timm.create_model("test_patchconvnet_multi", embed_dim=64)
    if again:
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        model.init_weights()
    for module in model.modules():
        if isinstance(module, ConvBlock):
            for linear in (module.fc, module.proj):
                assert 0.9 / 8 < linear.weight.abs().max() <= 1 / 8
                assert linear.bias.any()
            assert (module.ls.gamma == 0.1).all()
    for tensor in (model.head.cls_token, model.head.fc.weight, model.head.block.attn.kv.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.1)


def test_drop_path_is_the_same_in_all_blocks():
    model = timm.create_model("test_patchconvnet", drop_path_rate=0.3)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert rates == [0.3] * 3
