"""The Swin backbones: timm's outputs, detectors' weights, resized tables, blocks and windows of the variants."""

import pytest
import timm
import torch
import torch.nn.functional as F

import visattn  # noqa: F401
from tests.golden import fill
from tests.models.golden import filter_fn, load, official_weights
from tests.tolerances import MODEL_GOLDEN, relative_error
from visattn.layers import AgentAttention, ShiftedWindowAttention, TokenMixer

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


def test_published_files_are_named_and_evaluated_as_published():
    for name in timm.list_models(["agent_swin_*", "inline_swin_*"]):
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.url.startswith("https://cloud.tsinghua.edu.cn/f/")
        assert cfg.url.endswith("?dl=1")
        assert cfg.crop_mode == "squash"
        assert cfg.crop_pct == (1.0 if name.endswith(("288", "384")) else 0.875)


def test_backbone_of_an_official_detector_loads(tmp_path):
    weights = official_weights(load("agent_swin_t_dense"))
    state = {f"backbone.{key}": value for key, value in weights.items()}
    torch.save({"state_dict": {**state, "neck.fpn_convs.0.conv.weight": torch.ones(1)}}, tmp_path / "detector.pth")
    args = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "detector.pth")}}
    own = timm.create_model("agent_swin_tiny", features_only=True, out_norm="layer", **args).model.state_dict()
    assert torch.equal(own["out_norms.2.weight"], weights["norm2.weight"])
    assert torch.equal(own["stages.1.downsample.norm.bias"], weights["layers.0.downsample.norm.bias"])


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


def test_where_the_chosen_attention_goes_by_default():
    def count(**args):
        modules = list(timm.create_model("test_swin_va", device="meta", **args).modules())
        return [sum(isinstance(m, kind) for m in modules) for kind in (TokenMixer, ShiftedWindowAttention)]

    assert count() == [0, 7]
    assert count(attention="agent") == [7, 0]
    assert count(attention="softmax", attention_depths=(0, 1, 2, 0)) == [3, 4]
    model = timm.create_model("agent_swin_tiny", attention_args={"num_agents": 4}, device="meta")
    assert {m.num_agents for m in model.modules() if isinstance(m, AgentAttention)} == {4}
