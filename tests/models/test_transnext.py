"""The TransNeXt family: the official classifiers' and dense backbones' outputs, keys, options and sizes."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import visattn  # noqa: F401
from tests.golden import fill
from tests.models.golden import check_levels, check_native_keys_pass, filter_fn, load, load_official, official_weights
from tests.tolerances import MODEL_GOLDEN, SAME_MODEL, relative_error

PARAMS = {
    "transnext_micro": 12_809_304,
    "transnext_tiny": 28_258_960,
    "transnext_small": 49_741_564,
    "transnext_base": 89_721_496,
    "transnext_micro_aaaa": 13_114_008,
}
RATIOS = (8, 4, 2, 1)


def check_stages(maps, case):
    """Shapes and norms of the stages' maps, and what the golden has of their first and last values."""
    for level, shape, norm in zip(maps, case["stage_shapes"], case["stage_norms"], strict=True):
        assert list(level.shape) == shape
        assert level.double().norm().item() == pytest.approx(norm, rel=MODEL_GOLDEN)
    for key, cut in (("stage_first8", slice(8)), ("stage_first16", slice(16)), ("stage_last16", slice(-16, None))):
        for level, values in zip(maps, case.get(key, maps), strict=True):
            if key in case:
                assert relative_error(level.flatten()[cut], torch.tensor(values)) <= MODEL_GOLDEN


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "args"),
    [
        ("transnext_micro", {}),
        ("transnext_micro_256_pt224", {}),
        ("transnext_micro_384_linear7", {"pool_size": 7}),
    ],
)
def test_golden(file, args):
    golden = load(file)
    model = timm.create_model("transnext_micro", **args).eval()
    load_official(model, golden)
    features, maps = model.forward_intermediates(fill.image(**golden["input"]), norm=True, output_fmt="NLC")
    logits = model.forward_head(features)
    head = torch.tensor(golden["logits"])
    assert relative_error(logits[0, : len(head)], head) <= MODEL_GOLDEN
    assert logits.norm().item() == pytest.approx(golden["logits_norm"], rel=MODEL_GOLDEN)
    check_stages(maps, golden)


@torch.no_grad()
def test_dense_golden():
    """One model at all sizes: every map of the official dense backbone, which has no classifier."""
    golden = load("transnext_tiny_dense_extrap")
    model = timm.create_model("transnext_tiny", num_classes=0).eval()
    load_official(model, golden)
    assert len(golden["runs"]) == 4
    for run in golden["runs"]:
        image = fill.image(run["shape"], golden["input"]["seed"])
        check_stages(model.forward_intermediates(image, norm=True, intermediates_only=True), run)


def test_norms_have_the_official_eps():
    """Too little for the goldens to tell."""
    model = timm.create_model("transnext_micro_aaaa", device="meta")
    eps = {name: m.eps for name, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert len(eps) == 1 + 3 + 3 + 3 * 21 + 1
    for name, value in eps.items():
        assert value == (1e-5 if name.endswith(("patch_embed.norm", "downsample.norm", "attn.norm")) else 1e-6), name


@pytest.mark.parametrize("name", PARAMS)
def test_parameter_counts_are_the_official_ones(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name]


@pytest.mark.parametrize("name", ["test_transnext", "transnext_micro_aaaa"])
def test_filter_passes_native_keys(name):
    check_native_keys_pass(name)


def test_official_checkpoint_file_loads_as_pretrained(tmp_path):
    """The whole way of `pretrained=True`, from a file of the official layout, also for grey images and 5 classes."""
    golden = load("transnext_micro")
    torch.save({"model": official_weights(golden)}, tmp_path / "micro.pth")
    args = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "micro.pth")}}
    model = timm.create_model("transnext_micro", **args).eval()
    with torch.no_grad():
        logits = model(fill.image(**golden["input"]))
    assert logits.norm().item() == pytest.approx(golden["logits_norm"], rel=MODEL_GOLDEN)

    other = timm.create_model("transnext_micro", in_chans=1, num_classes=5, **args)
    first = model.patch_embed.proj.weight
    torch.testing.assert_close(other.patch_embed.proj.weight, first.sum(1, keepdim=True))
    assert torch.equal(other.stages[2].blocks[1].attn.tokens, model.stages[2].blocks[1].attn.tokens)
    assert other.head.fc.out_features == 5


def test_backbone_of_an_official_detector_loads(tmp_path):
    golden = load("transnext_tiny_dense_extrap")
    state = {f"backbone.{key}": value for key, value in official_weights(golden).items()}
    detector = {"state_dict": {**state, "neck.lateral_convs.0.weight": torch.ones(1)}}
    torch.save(detector, tmp_path / "detector.pth")
    args = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "detector.pth")}}
    model = timm.create_model("transnext_tiny", features_only=True, **args)
    own = model.model.state_dict()
    assert filter_fn(model.model)(detector, model.model).keys() == own.keys() | {"norm.weight", "norm.bias"}
    assert torch.equal(own["stages.0.norm.weight"], state["backbone.norm1.weight"])
    assert torch.equal(own["stages.3.blocks.1.attn.qkv.bias"], state["backbone.block4.1.attn.qkv.bias"])


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


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"position_bias": "linear"}, "expected position_bias 'extrapolate' or 'interpolate', got 'linear'"),
        ({"position_bias": "interpolate"}, "expected bias_img_size with position_bias 'interpolate'"),
        ({"bias_img_size": 512}, "and only then, got 512 with 'extrapolate'"),
        ({"pretrain_size": 63}, "expected pretrain_size of at least 64 .* for 4 stages, got 63"),
        ({"position_bias": "interpolate", "bias_img_size": 31}, "bias_img_size of at least 32 .* got 160 and 31"),
    ],
)
def test_arguments_that_do_not_fit(args, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_transnext", **args)


def test_any_input_size():
    """One model after another size, with none of them told to it."""
    for args in ({}, {"pool_size": 4}, {"position_bias": "interpolate", "bias_img_size": 96}):
        model = timm.create_model("test_transnext", features_only=True, sr_ratios=RATIOS, **args)
        for size in ((224, 224), (256, 192), (97, 131), (32, 32), (1, 1), (512, 512)):
            check_levels(model, torch.randn(1, 3, *size))


@torch.inference_mode()
def test_micro_at_any_input_size():
    model = timm.create_model("transnext_micro").eval()
    for size in ((97, 131), (1, 1), (512, 512), (800, 1216)):
        assert model(torch.randn(1, 3, *size)).isfinite().all()


def test_training_is_deterministic():
    def step():
        torch.manual_seed(0)
        model = timm.create_model("test_transnext", drop_path_rate=0.1)
        model(torch.randn(2, 3, 97, 64)).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(step(), step())
    finally:
        torch.use_deterministic_algorithms(False)


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
