"""The TransNeXt family: epsilons, detectors' weights, position bias, initialisation, export and what is attended."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import visattn  # noqa: F401
from tests.tolerances import SAME_MODEL, relative_error

RATIOS = (8, 4, 2, 1)


def test_norms_have_the_official_eps():
    """Too little for the goldens to tell."""
    model = timm.create_model("transnext_micro_aaaa", device="meta")
    eps = {name: m.eps for name, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert len(eps) == 1 + 3 + 3 + 3 * 21 + 1
    for name, value in eps.items():
        assert value == (1e-5 if name.endswith(("patch_embed.norm", "downsample.norm", "attn.norm")) else 1e-6), name


def test_weights_at_384_are_measured_by_224_and_evaluated_whole():
    for name in ("transnext_small", "transnext_base"):
        model = timm.create_model(f"{name}.in1k_384", device="meta")
        assert [stage.blocks[0].attn.pretrain_size for stage in model.stages] == [[56] * 2, [28] * 2, [14] * 2, [7] * 2]
        config = timm.data.resolve_model_data_config(model)
        assert (config["input_size"], config["crop_pct"], config["crop_mode"]) == ((3, 384, 384), 1.0, "squash")
        config = timm.data.resolve_model_data_config(timm.create_model(name, device="meta"))
        assert (config["input_size"], config["crop_pct"], config["crop_mode"]) == ((3, 224, 224), 0.875, "center")


def test_aggregated_attention_in_all_stages():
    model = timm.create_model("transnext_micro_aaaa", device="meta")
    attn = [stage.blocks[0].attn for stage in model.stages]
    assert [(a.pretrain_size[0], a.sr_ratio[0]) for a in attn] == [(64, 16), (32, 8), (16, 4), (8, 2)]


def test_interpolated_bias_is_computed_for_the_training_size():
    args = {"position_bias": "interpolate", "device": "meta"}
    sizes = [s.blocks[0].attn.bias_size for s in timm.create_model("transnext_tiny", bias_img_size=800, **args).stages]
    assert sizes == [[200, 200, 25, 25], [100, 100, 25, 25], [50, 50, 25, 25], [25, 25, 25, 25]]
    linear = timm.create_model("transnext_tiny", bias_img_size=512, pool_size=20, **args)
    sizes = [stage.blocks[0].attn.bias_size for stage in linear.stages]
    assert sizes == [[128, 128, 20, 20], [64, 64, 20, 20], [32, 32, 20, 20], [16, 16, 16, 16]]


@torch.no_grad()
def test_interpolated_bias_at_the_training_size_changes_nothing():
    model = timm.create_model("test_transnext").eval()
    dense = timm.create_model("test_transnext", position_bias="interpolate", bias_img_size=128).eval()
    dense.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 128, 128)
    assert relative_error(dense(image), model(image)) <= SAME_MODEL
    image = torch.randn(1, 3, 97, 260)
    assert dense(image).isfinite().all()
    assert relative_error(dense(image), model(image)) > SAME_MODEL


def test_weight_decay_and_layer_decay_are_the_official_ones():
    """Of what has several axes, queries' and position parameters are spared; stage norms learn as the last block."""
    model = timm.create_model("test_transnext")
    optimizer = create_optimizer_v2(model, weight_decay=0.1, layer_decay=0.5)
    group = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    named = {name: group[id(p)] for name, p in model.named_parameters()}
    attn = "stages.1.blocks.1.attn."
    for name in ("temperature", "query_embedding", "local_bias", "cpb_fc1.weight", "cpb_fc2.weight", "norm.weight"):
        assert named[attn + name]["weight_decay"] == 0
    for name in ("tokens", "token_bias", "q.weight", "sr.weight", "proj.weight"):
        assert named[attn + name]["weight_decay"] == 0.1
    assert named["stages.1.norm.weight"]["lr_scale"] == named[attn + "q.weight"]["lr_scale"]
    assert named["stages.1.norm.weight"]["lr_scale"] < named["stages.2.downsample.norm.weight"]["lr_scale"]


def test_initial_convolutions_are_normal_by_their_outputs():
    model = timm.create_model("transnext_micro")
    stage = model.stages[1]
    block = stage.blocks[0]
    variances = {stage.downsample.reduction: 2 / 9 / 96, block.mlp.dwconv: 2 / 9, block.attn.sr: 2 / 96}
    for module, variance in {**variances, block.attn.q: 0.02**2}.items():
        assert module.weight.var().item() == pytest.approx(variance, rel=0.1)
        assert not module.bias.any()


@torch.no_grad()
def test_export_with_dynamic_size_where_no_pooled_map_has_a_single_token():
    model = timm.create_model("test_transnext", sr_ratios=RATIOS).eval()
    sizes = {i: torch.export.Dim(name, min=61, max=1024) for i, name in ((2, "height"), (3, "width"))}
    program = torch.export.export(model, (torch.randn(1, 3, 160, 192),), dynamic_shapes={"x": sizes})
    for size in ((61, 64), (97, 131), (256, 160)):
        image = torch.randn(1, 3, *size)
        assert relative_error(program.module()(image), model(image)) <= SAME_MODEL


@torch.no_grad()
def test_what_is_attended_comes_on_request():
    model = timm.create_model("test_transnext", sr_ratios=RATIOS).eval()
    attended = model.attended(torch.randn(1, 3, 97, 64))
    assert len(attended) == 6
    assert attended["stages.0.blocks.0.attn"]["local"].shape == (1, 25, 16, 1, 9)
    assert attended["stages.0.blocks.0.attn"]["pooled"].shape == (1, 25, 16, 1, 3, 2)
    assert list(attended["stages.3.blocks.0.attn"]) == ["pooled"]
    assert attended["stages.3.blocks.0.attn"]["pooled"].shape == (1, 4, 2, 8, 4, 2)
