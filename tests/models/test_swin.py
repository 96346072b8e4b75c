"""The Swin backbones: official and timm's outputs, keys, resized weights, options, every attention at any size."""

import pytest
import timm
import torch
import torch.nn.functional as F

import visattn  # noqa: F401
from tests.golden import fill
from tests.models.golden import (
    check_case,
    check_levels,
    check_native_keys_pass,
    filter_fn,
    load,
    load_official,
    official_weights,
)
from tests.tolerances import MODEL_GOLDEN, relative_error
from visattn.layers import TOKEN_MIXERS, AgentAttention, ShiftedWindowAttention, TokenMixer

PARAMS = {
    "swin_tiny_va": 28_288_354,
    "swin_small_va": 49_606_258,
    "swin_base_va": 87_768_224,
    "swin_base_va.ms_in1k_384": 87_903_584,
    "agent_swin_tiny": 28_902_964,
    "agent_swin_small": 49_666_684,
    "agent_swin_small_288": 49_707_964,
    "agent_swin_base": 88_095_096,
    "agent_swin_base_384": 88_305_016,
    "inline_swin_tiny": 29_223_544,
    "inline_swin_small": 49_793_296,
    "inline_swin_base": 88_350_120,
    # no official counts: the control's, less 169 table entries per head of a block without windows; "focused" has
    # (tokens + 1) * width + 26 * head width more
    "efficient_swin_tiny": 28_285_312,
    "efficient_swin_small": 49_603_216,
    "efficient_swin_base": 87_764_168,
    "focused_swin_tiny": 29_192_384,
    "focused_swin_small": 50_510_288,
    "focused_swin_base": 88_972_488,
}
DENSE_AGENTS = [{"num_agents": n, "agent_size": (p, p)} for n, p in zip((9, 16, 49, 49), (9, 12, 14, 7), strict=True)]
SMALL = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "num_classes": 7}


def timm_and_weights(name="swin_tiny_patch4_window7_224", **args):
    """timm's model and its state dict, which depends on keys and shapes alone."""
    model = timm.create_model(name, **args).eval()
    state = fill.fill({key: value.shape for key, value in model.state_dict().items()})
    model.load_state_dict(state)
    return model, state


def as_microsoft(state):
    """timm's keys as in the official checkpoints, integer and mask buffers included."""
    official = {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}
    for key, value in state.items():
        if ".downsample." in key:
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
        official[key.replace("head.fc.", "head.")] = value
        if key.endswith(".relative_position_bias_table"):
            official[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
    return official


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("agent_swin_tiny", "agent_swin_t"),
        ("agent_swin_base", "agent_swin_b"),
        ("inline_swin_tiny", "inline_swin_t"),
    ],
)
def test_golden(name, file):
    golden = load(file)
    model = timm.create_model(name).eval()
    load_official(model, golden)
    # the golden's maps are tokens
    shapes = [[b, c, int(n**0.5), int(n**0.5)] for b, n, c in golden["stage_shapes"]]
    check_case(model, {**golden, "stage_shapes": shapes})


@torch.no_grad()
def test_dense_golden():
    """One model at all sizes: every map of the official dense backbone, with the agents of the detectors."""
    golden = load("agent_swin_t_dense")
    args = {"out_norm": "layer", "always_shift": True, "attention_args": DENSE_AGENTS}
    model = timm.create_model("agent_swin_tiny", features_only=True, **args).eval()
    load_official(model.model, golden)
    assert [tuple(run["shape"][2:]) for run in golden["runs"]] == [(224, 224), (256, 192), (250, 197)]
    for run in golden["runs"]:
        maps = model(fill.image(run["shape"], golden["input"]["seed"]))
        for i, level in enumerate(maps):
            assert list(level.shape) == run["stage_shapes"][i]
            assert level.double().norm().item() == pytest.approx(run["stage_norms"][i], rel=MODEL_GOLDEN)
            for key, cut in (("stage_first16", slice(16)), ("stage_last16", slice(-16, None))):
                assert relative_error(level.flatten()[cut], torch.tensor(run[key][i])) <= MODEL_GOLDEN


@torch.no_grad()
def test_control_equals_timm_from_both_layouts():
    reference, state = timm_and_weights()
    model = timm.create_model("swin_tiny_va").eval()
    converted = filter_fn(model)({"model": as_microsoft(state)}, model)
    assert converted.keys() == model.state_dict().keys()
    for key, value in filter_fn(model)(state, model).items():
        assert torch.equal(value, converted[key])
    model.load_state_dict(converted)
    image = fill.image()
    (features, maps), (expected, their_maps) = (
        model.forward_intermediates(image),
        reference.forward_intermediates(image),
    )
    for got, want in zip(maps, their_maps, strict=True):
        assert relative_error(got, want) <= MODEL_GOLDEN
    for x in (features, 1e-3 * features):
        assert relative_error(model.forward_head(x), reference.forward_head(x)) <= MODEL_GOLDEN
    assert relative_error(features, expected) <= MODEL_GOLDEN


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "theirs", "ours"),
    [
        ((448, 224), {}, {}),
        ((224, 224), {"always_partition": True}, {"always_shift": True}),
        ((192, 256), {"window_size": (6, 8)}, {"window_size": None}),
    ],
    ids=["one axis of one window", "always shifted", "windows 6x8"],
)
def test_windows_equal_timm(size, theirs, ours):
    reference, state = timm_and_weights(img_size=size, **SMALL, **theirs)
    model = timm.create_model("swin_tiny_va", img_size=size, **{"window_size": 7, **ours}, **SMALL).eval()
    model.load_state_dict(filter_fn(model)(state, model))
    image = fill.image((2, 3, *size))
    assert relative_error(model(image), reference(image)) <= MODEL_GOLDEN


@pytest.mark.parametrize("name", PARAMS)
def test_parameter_counts(name):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == PARAMS[name]


@pytest.mark.parametrize(
    ("name", "window", "numbers"),
    [
        ("swin_small_va", 7, (0, 0, 0, 0)),
        ("swin_base_va.ms_in22k_ft_in1k_384", 12, (0, 0, 0, 0)),
        ("agent_swin_tiny", 7, (2, 2, 6, 0)),
        ("agent_swin_small_288", 9, (2, 2, 0, 0)),
        ("agent_swin_base_384", 12, (2, 2, 2, 0)),
        ("inline_swin_base", 7, (2, 2, 2, 0)),
        ("focused_swin_small", 7, (2, 2, 0, 0)),
        ("efficient_swin_tiny", 7, (2, 2, 0, 0)),
        ("test_agent_swin", 5, (2, 2, 1, 0)),
    ],
)
def test_blocks_and_windows_of_variants(name, window, numbers):
    model = timm.create_model(name, device="meta")
    for stage, number in zip(model.stages, numbers, strict=True):
        for j, block in enumerate(stage.blocks):
            assert isinstance(block.attn, TokenMixer) == (j < number)
            if j >= number:
                assert block.attn.window_size == [window, window]
                assert block.attn.shifted == (j % 2 == 1)
    agents = [m.num_agents for s in model.stages for m in s.modules() if isinstance(m, AgentAttention)]
    assert agents == [n for n, times in zip((9, 16, 49), numbers, strict=False) for _ in range(times)] * bool(agents)


def test_norms_and_stochastic_depth_are_the_official_ones():
    for size, rate in (("tiny", 0.2), ("small", 0.3), ("base", 0.5)):
        for name in timm.list_models(f"*swin_{size}*", module="swin_va"):
            blocks = timm.create_model(name, device="meta").stages[-1].blocks
            assert blocks[-1].drop_path2.drop_prob == pytest.approx(rate)
    for module in timm.create_model("agent_swin_tiny", out_norm="layer", device="meta").modules():
        assert not isinstance(module, torch.nn.LayerNorm) or module.eps == 1e-5


def test_tags_are_timms():
    names = [n for size in ("tiny", "small", "base") for n in timm.list_models(f"swin_{size}_*", include_tags=True)]
    theirs = {n: timm.get_pretrained_cfg(n) for n in names if "_va" not in n}
    ours = [timm.get_pretrained_cfg(n) for n in names if "_va" in n]
    assert {cfg.hf_hub_id.removeprefix("timm/") for cfg in ours} == theirs.keys()
    same = ("num_classes", "input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "license")
    for cfg in ours:
        other = theirs[cfg.hf_hub_id.removeprefix("timm/")]
        assert {k: getattr(cfg, k) for k in same} == {k: getattr(other, k) for k in same}
        assert cfg.pool_size == tuple(n // 32 for n in cfg.input_size[1:])


def test_published_files_are_named_and_evaluated_as_published():
    for name in timm.list_models(["agent_swin_*", "inline_swin_*"]):
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.url.startswith("https://cloud.tsinghua.edu.cn/f/")
        assert cfg.url.endswith("?dl=1")
        assert cfg.crop_mode == "squash"
        assert cfg.crop_pct == (1.0 if name.endswith(("288", "384")) else 0.875)


def test_official_file_loads_as_pretrained(tmp_path):
    """The whole way of `pretrained=True`, also for grey images and 5 classes."""
    golden = load("agent_swin_t")
    torch.save({"model": official_weights(golden)}, tmp_path / "agent.pth")
    args = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "agent.pth")}}
    model = timm.create_model("agent_swin_tiny", **args).eval()
    with torch.no_grad():
        assert model(fill.image()).norm().item() == pytest.approx(golden["logits_norm"], rel=MODEL_GOLDEN)
    other = timm.create_model("agent_swin_tiny", in_chans=1, num_classes=5, **args)
    first = model.patch_embed.proj.weight
    torch.testing.assert_close(other.patch_embed.proj.weight, first.sum(1, keepdim=True))
    assert torch.equal(other.stages[3].downsample.reduction.weight, model.stages[3].downsample.reduction.weight)
    assert other.head.fc.out_features == 5


def test_backbone_of_an_official_detector_loads(tmp_path):
    weights = official_weights(load("agent_swin_t_dense"))
    state = {f"backbone.{key}": value for key, value in weights.items()}
    torch.save({"state_dict": {**state, "neck.fpn_convs.0.conv.weight": torch.ones(1)}}, tmp_path / "detector.pth")
    args = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "detector.pth")}}
    own = timm.create_model("agent_swin_tiny", features_only=True, out_norm="layer", **args).model.state_dict()
    assert torch.equal(own["out_norms.2.weight"], weights["norm2.weight"])
    assert torch.equal(own["stages.1.downsample.norm.bias"], weights["layers.0.downsample.norm.bias"])


@pytest.mark.parametrize("name", ["test_swin_va", "test_agent_swin", "test_focused_swin", "inline_swin_tiny"])
def test_native_keys_pass_unchanged(name):
    check_native_keys_pass(name)


def test_weights_of_another_size_are_resized():
    """From 160 x 160 to 256 x 96: windows bicubic, rows and columns linear, positions of keys bicubic."""
    for name in ("test_agent_swin", "test_focused_swin"):
        model = timm.create_model(name, img_size=(256, 96))
        state = {key: torch.randn_like(value) for key, value in timm.create_model(name).state_dict().items()}
        converted = filter_fn(model)(state, model)
        model.load_state_dict(converted)
        assert model(torch.randn(1, 3, 97, 131)).isfinite().all()
        key = "stages.3.blocks.0.attn.rpb"
        expected = F.interpolate(state[key][None], (15, 5), mode="bicubic", align_corners=False)[0]
        assert torch.equal(converted[key], expected)
        if name == "test_agent_swin":
            for bias, size, axis in (("ah", 32, 3), ("aw", 12, 4), ("ha", 32, 2), ("wa", 12, 3)):
                key = f"stages.1.blocks.1.attn.{bias}_bias"
                lines = state[key].transpose(axis, -1).flatten(0, -2)[:, None]
                expected = F.interpolate(lines, size, mode="linear", align_corners=False)
                assert relative_error(converted[key].transpose(axis, -1).flatten(0, -2), expected[:, 0]) <= 1e-6
        else:
            key = "stages.1.blocks.1.attn.positional_encoding"
            expected = F.interpolate(state[key].permute(0, 3, 1, 2), (32, 12), mode="bicubic", align_corners=False)
            assert torch.equal(converted[key].permute(0, 3, 1, 2), expected)
            official = {**state, key: state[key].flatten(1, 2)}  # of a square map, in a row
            assert torch.equal(filter_fn(model)(official, model)[key], converted[key])
            same_number = timm.create_model(name, img_size=(80, 320))  # as many tokens on another map
            assert not torch.equal(filter_fn(same_number)(official, same_number)[key].flatten(), state[key].flatten())


@pytest.mark.parametrize("attention", TOKEN_MIXERS)
def test_every_attention_runs_and_trains(attention):
    model = timm.create_model("test_swin_va", attention=attention, attention_depths=(1, 2, 1, 1))
    mixers = [m for m in model.modules() if isinstance(m, TOKEN_MIXERS[attention])]
    assert len(mixers) == 5
    for size in ((96, 160), (97, 131)):
        model.zero_grad()
        model(torch.randn(2, 3, *size)).square().mean().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_where_the_chosen_attention_goes_by_default():
    def count(**args):
        modules = list(timm.create_model("test_swin_va", device="meta", **args).modules())
        return [sum(isinstance(m, kind) for m in modules) for kind in (TokenMixer, ShiftedWindowAttention)]

    assert count() == [0, 7]
    assert count(attention="agent") == [7, 0]
    assert count(attention="softmax", attention_depths=(0, 1, 2, 0)) == [3, 4]
    model = timm.create_model("agent_swin_tiny", attention_args={"num_agents": 4}, device="meta")
    assert {m.num_agents for m in model.modules() if isinstance(m, AgentAttention)} == {4}


def test_any_input_size():
    """One model after another size, with none of them told to it."""
    shifted = {"depths": (2, 2, 2, 2), "always_shift": True, "out_norm": "layer"}
    for name, args in (("swin_va", {}), ("swin_va", shifted), ("agent_swin", {}), ("focused_swin", {})):
        model = timm.create_model(f"test_{name}", features_only=True, **args)
        for size in ((224, 224), (256, 192), (97, 131), (32, 32), (1, 1)):
            check_levels(model, torch.randn(1, 3, *size))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"attention": "linear"}, "expected attention of 'softmax', 'agent', .*, got 'linear'"),
        ({"attention_depths": (1, 1)}, r"expected attention_depths of 0 to \[2, 2, 2, 1\] per stage, got \[1, 1\]"),
        ({"attention_depths": (0, 3, 0, 0)}, r"per stage, got \[0, 3, 0, 0\]"),
        ({"attention_args": [{}, {}]}, "expected attention_args, a dict or 4 of them, got 2"),
        ({"window_size": 0}, "expected window_size of one int or two, at least 1, got 0"),
        ({"out_norm": "batch"}, "expected out_norm None or one of"),
    ],
)
def test_arguments_that_do_not_fit(args, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_swin_va", **args)
