"""Learning rates by layer, what does not decay, and the neck with efficient attention."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from visattn.mm import EfficientAttentionFPN, TimmBackbone


class Detector(nn.Module):
    def __init__(self, **backbone):
        super().__init__()
        self.backbone = TimmBackbone(**backbone)
        self.head = nn.Linear(4, 4)


def groups_of(model, weight_decay=0.05, **paramwise):
    """{parameter's name: (learning rate, weight decay)}, where the base learning rate is 1."""
    wrapper = build_optim_wrapper(
        model,
        {
            "constructor": "BackboneOptimWrapperConstructor",
            "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": weight_decay},
            "paramwise_cfg": paramwise,
        },
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(g["params"][0])]: (g["lr"], g["weight_decay"]) for g in wrapper.optimizer.param_groups}


def test_layers_learn_the_slower_the_lower():
    model = Detector(model_name="test_dinat", out_norm="layer")
    groups = groups_of(model, layer_decay=0.5)
    assert groups.keys() == dict(model.named_parameters()).keys()
    depths = [len(stage.blocks) for stage in model.backbone.model.stages]
    layers = sum(depths)
    for name, (lr, _) in groups.items():
        if name.startswith("head.") or ".out_norms." in name:
            assert lr == 1.0, name
        elif ".patch_embed." in name:
            assert lr == 0.5 ** (layers + 1), name
        elif ".blocks." in name:
            stage, block = (int(part) for part in (name.split(".")[3], name.split(".")[5]))
            assert lr == 0.5 ** (layers - sum(depths[:stage]) - block), name


@pytest.mark.parametrize(("name", "kept"), [("test_dinat", "rpb"), ("test_transnext", "query_embedding")])
def test_what_the_model_names_does_not_decay(name, kept):
    groups = groups_of(Detector(model_name=name), norm_decay_mult=0.0, custom_keys={"qkv": {"lr_mult": 0.1}})
    assert [decay for key, (_, decay) in groups.items() if key.endswith(kept)]
    for key, (lr, decay) in groups.items():
        if key.endswith(kept) or ".norm" in key:
            assert decay == 0, key
        elif key.endswith("mlp.fc1.weight") or key.startswith("head."):
            assert decay == 0.05, key
        assert lr == (0.1 if "qkv" in key else 1.0), key


@pytest.mark.parametrize("name", ["test_dinat", "test_vit"])  # output norms of the model, and of the adapter
def test_a_factor_for_the_backbone(name):
    model = Detector(model_name=name, out_norm="layer")
    groups = groups_of(model, backbone_lr_mult=0.1, norm_decay_mult=0.0, custom_keys={"qkv": {"lr_mult": 0.5}})
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert any("norms.3" in key for key in groups)
    for key, (lr, decay) in groups.items():
        assert lr == pytest.approx((0.1 if key.startswith("backbone.") else 1.0) * (0.5 if "qkv" in key else 1.0)), key
        if "norm" in key:
            assert decay == 0, key


@pytest.mark.parametrize("options", [*({"layer_decay": d} for d in (0.0, 1.1, -1)), {"backbone_lr_mult": -0.1}])
def test_another_factor_is_refused(options):
    with pytest.raises(ValueError, match=f"expected {next(iter(options))} "):
        groups_of(Detector(model_name="test_dinat"), **options)


@pytest.fixture
def mmdet_scope():
    with DefaultScope.overwrite_default_scope("mmdet"):
        import mmdet.models  # noqa: F401 - registers FPN

        yield


@pytest.mark.usefixtures("mmdet_scope")
def test_efficient_attention_over_a_pyramid():
    torch.manual_seed(0)
    fpn = {"in_channels": [8, 16, 32, 64], "out_channels": 24, "num_outs": 5}
    neck = MODELS.build({"type": "EfficientAttentionFPN", **fpn, "head_count": 2, "attended": [0, 3]})
    neck.init_weights()
    maps = [
        torch.randn(2, c, 97 // s + 1, 65 // s + 1) for c, s in zip(fpn["in_channels"], (4, 8, 16, 32), strict=True)
    ]
    plain = neck.fpn(maps)
    for got, want in zip(neck(maps), plain, strict=True):
        assert torch.equal(got, want)  # it starts as a plain FPN
    for parameter in neck.attention.parameters():
        nn.init.normal_(parameter)
    changed = [not torch.equal(got, want) for got, want in zip(neck(maps), plain, strict=True)]
    assert changed == [True, False, False, True, False]
    module = neck.attention["3"]
    key, query, value = (part(plain[3]).flatten(2) for part in (module.keys, module.queries, module.values))
    heads = []
    for k, q, v in zip(key.chunk(2, 1), query.chunk(2, 1), value.chunk(2, 1), strict=True):
        heads.append((k.softmax(2) @ v.mT).mT @ q.softmax(1))
    expected = plain[3] + module.reprojection(torch.cat(heads, 1).unflatten(2, plain[3].shape[2:]))
    torch.testing.assert_close(neck(maps)[3], expected)
    sum(m.sum() for m in neck(maps)).backward()
    assert all(parameter.grad is not None for parameter in neck.parameters())


@pytest.mark.usefixtures("mmdet_scope")
@pytest.mark.parametrize(
    ("options", "message"),
    [({"attended": [5]}, "expected attended outputs from 0 to 4"), ({"head_count": 5}, "divisible by head_count")],
)
def test_a_neck_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EfficientAttentionFPN(in_channels=[8, 8], out_channels=24, num_outs=5, **options)
