"""The CSWin backbone: official outputs and keys, any size and attention, resized checkpoints."""

import pytest
import timm
import torch
import torch.nn.functional as F

import visattn  # noqa: F401
from tests.golden import fill
from tests.models.golden import check_case, check_native_keys_pass, filter_fn, load, load_official, official_weights
from tests.tolerances import MODEL_GOLDEN, SAME_MODEL, relative_error
from visattn import layers

PARAMS = {
    "cswin_tiny": 22_320_552,
    "cswin_small": 34_643_304,
    "cswin_base": 77_382_184,
    "cswin_base_384": 77_382_184,
    "cswin_large": 173_262_664,
    "cswin_large_384": 173_262_664,
    "agent_cswin_tiny": 20_458_672,
    "agent_cswin_small": 32_814_100,
    "agent_cswin_base": 73_249_696,
    "agent_cswin_base_384": 73_328_416,
    "inline_cswin_tiny": 20_604_520,
    "inline_cswin_small": 33_032_872,
    "inline_cswin_base": 73_413_640,
    "efficient_cswin_tiny": 20_386_920,
    "efficient_cswin_small": 32_706_472,
    "efficient_cswin_base": 73_039_240,
    "focused_cswin_tiny": 21_195_368,
    "focused_cswin_small": 33_919_144,
    "focused_cswin_base": 74_852_632,
}
SIZES = ((224, 224), (256, 192), (97, 131), (32, 32), (1, 1))


def official_keys(embed_dim, depths, classes=1000):
    """Keys and shapes of the official classifier with stripes."""
    c = embed_dim
    keys = {"stage1_conv_embed.0.weight": [c, 3, 7, 7], "stage1_conv_embed.0.bias": [c]}
    linears, norms = {"head": (classes, 8 * c)}, {"stage1_conv_embed.2": c, "norm": 8 * c}
    for i, depth in enumerate(depths):
        dim = c * 2**i
        if i:
            keys |= {f"merge{i}.conv.weight": [dim, dim // 2, 3, 3], f"merge{i}.conv.bias": [dim]}
            norms[f"merge{i}.norm"] = dim
        for j in range(depth):
            block = f"stage{i + 1}.{j}"
            linears |= {f"{block}.qkv": (3 * dim, dim), f"{block}.proj": (dim, dim)}
            linears |= {f"{block}.mlp.fc1": (4 * dim, dim), f"{block}.mlp.fc2": (dim, 4 * dim)}
            norms |= {f"{block}.norm1": dim, f"{block}.norm2": dim}
            branches = 1 if i == len(depths) - 1 else 2
            for k in range(branches):
                conv = f"{block}.attns.{k}.get_v"
                keys |= {f"{conv}.weight": [dim // branches, 1, 3, 3], f"{conv}.bias": [dim // branches]}
    for name, shape in linears.items():
        keys |= {f"{name}.weight": list(shape), f"{name}.bias": [shape[0]]}
    return keys | {f"{name}.{leaf}": [dim] for name, dim in norms.items() for leaf in ("weight", "bias")}


def tokens(size, level):
    """Of the official networks: the stem has no token for one or two last pixels."""
    n = max(1, (size + 1) // 4)
    return -(-n // 2**level)


def check_maps(extractor, size):
    maps = extractor(torch.randn(1, 3, *size))
    for i, (level, channels) in enumerate(zip(maps, extractor.feature_info.channels(), strict=True)):
        assert level.shape == (1, channels, tokens(size[0], i), tokens(size[1], i))
        assert level.isfinite().all()
    return maps


@pytest.mark.parametrize("name", ["agent_cswin", "inline_cswin"])
def test_golden(name):
    golden = load(f"{name}_t")
    model = timm.create_model(f"{name}_tiny").eval()
    load_official(model, golden)
    shapes = [[1, tokens(224, i), tokens(224, i), 64 * 2**i] for i in range(4)]
    assert [[b, h * w, c] for b, h, w, c in shapes] == golden["stage_shapes"]
    check_case(model, {**golden, "stage_shapes": [[b, c, h, w] for b, h, w, c in shapes]})


@pytest.mark.parametrize("name", PARAMS)
def test_parameter_counts_norms_and_rates_are_the_official_ones(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name]
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
    rate = {"tiny": 0.2, "small": 0.4, "base": 0.5, "large": 0.2}[name.split("cswin_")[1].split("_")[0]]
    last = model.stages[-1].blocks[-1].drop_path2.drop_prob
    assert last == pytest.approx(0.7 if "base_384" in name else rate)


@pytest.mark.parametrize(
    ("name", "dim", "depths"), [("cswin_tiny", 64, (1, 2, 21, 1)), ("cswin_base_384", 96, (2, 4, 32, 2))]
)
def test_official_keys_load(name, dim, depths):
    """As the files hold them: averaged weights, the halves' convolutions apart."""
    official = {key: value.float() for key, value in fill.fill(official_keys(dim, depths)).items()}
    assert sum(v.numel() for v in official.values()) == PARAMS[name]
    model = timm.create_model(name)
    wrapped = {f"module.{key}": value for key, value in official.items()}
    others = {key: torch.zeros_like(value) for key, value in wrapped.items()}
    model.load_state_dict(filter_fn(model)({"state_dict": others, "state_dict_ema": wrapped}, model))
    lepe = model.stages[2].blocks[1].attn.lepe
    assert torch.equal(lepe.weight[: 2 * dim], official["stage3.1.attns.0.get_v.weight"])
    assert torch.equal(lepe.weight[2 * dim :], official["stage3.1.attns.1.get_v.weight"])
    assert torch.equal(lepe.bias[2 * dim :], official["stage3.1.attns.1.get_v.bias"])
    assert torch.equal(model.stages[3].downsample.reduction.weight, official["merge3.conv.weight"])
    assert torch.equal(model.patch_embed.norm.bias, official["stage1_conv_embed.2.bias"])
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 97, 64)).isfinite().all()


def test_backbone_of_an_official_segmenter_loads():
    """It has a norm for each map and none for a classifier."""
    official = official_keys(20, (1, 1, 2, 1))
    official = {k: v for k, v in official.items() if not k.startswith(("head.", "norm."))}
    official |= {f"norm{i + 1}.{leaf}": [20 * 2**i] for i in range(4) for leaf in ("weight", "bias")}
    official = {f"backbone.{key}": value for key, value in fill.fill(official).items()}
    model = timm.create_model("test_cswin", num_classes=0, out_norm="layer")
    detector = {"state_dict": {**official, "decode_head.conv_seg.weight": torch.ones(1)}}
    converted = filter_fn(model)(detector, model)
    missing, unexpected = model.load_state_dict(converted, strict=False)
    assert missing == ["norm.weight", "norm.bias"]
    assert not unexpected
    assert torch.equal(model.out_norms[3].weight, official["backbone.norm4.weight"])


@pytest.mark.parametrize("name", ["test_cswin", "agent_cswin_tiny", "inline_cswin_tiny", "focused_cswin_tiny"])
def test_filter_passes_native_keys(name):
    check_native_keys_pass(name)


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_cswin", "test_efficient_cswin"])
def test_any_input_size(name):
    model = timm.create_model(name, features_only=True).eval()
    for size in SIZES:
        check_maps(model, size)


@torch.no_grad()
def test_tiny_at_any_input_size():
    model = timm.create_model("agent_cswin_tiny", depths=(1, 1, 1, 1), attention_depths=(1, 1, 0, 0)).eval()
    before = model(torch.ones(1, 3, 224, 224))
    for size in SIZES:
        assert model(torch.randn(1, 3, *size)).isfinite().all()
    assert torch.equal(model(torch.ones(1, 3, 224, 224)), before)


@pytest.mark.parametrize("attention", layers.TOKEN_MIXERS)
def test_every_attention_trains_at_two_sizes(attention):
    args = {"lepe": True} if attention == "inline" else {}
    model = timm.create_model(
        "test_cswin", attention=attention, attention_depths=(1, 1, 1, 0), attention_args=args, img_size=64
    )
    mixers = [type(b.attn) for stage in model.stages for b in stage.blocks]
    stripes, other = layers.CrossShapedAttention, layers.TOKEN_MIXERS[attention]
    assert mixers == [other, other, other, stripes, stripes]
    for size in ((64, 64), (97, 40)):
        model.zero_grad()
        model(torch.randn(2, 3, *size)).square().mean().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def resized(name, key):
    """A random table of the model for 224 x 224, as the filter gives it to the same model and to one for 256 x 288."""
    args = {"depths": (1, 1, 1, 1), "attention_depths": (1, 1, 0, 0)}
    small = timm.create_model(name, **args)
    large = timm.create_model(name, img_size=(256, 288), **args).eval()
    state = {k: torch.randn(v.shape) if k == key else v for k, v in small.state_dict().items()}
    assert filter_fn(small)(state, small)[key] is state[key]
    converted = filter_fn(large)(state, large)
    large.load_state_dict(converted)
    assert large(torch.randn(1, 3, 256, 288)).isfinite().all()
    return state[key], converted[key]


@torch.no_grad()
@pytest.mark.parametrize(("table", "axis", "length"), [("ah", 3, 64), ("aw", 4, 72), ("ha", 2, 64), ("wa", 3, 72)])
def test_tables_of_agents_are_resized_linearly(table, axis, length):
    learned, got = resized("agent_cswin_tiny", f"stages.0.blocks.0.attn.{table}_bias")
    rows = learned.movedim(axis, -1).flatten(0, -2)
    expected = F.interpolate(rows[None], length, mode="linear")[0]
    assert relative_error(got.movedim(axis, -1).flatten(0, -2), expected) <= SAME_MODEL


@torch.no_grad()
def test_positional_encodings_are_resized_bicubically():
    learned, got = resized("focused_cswin_tiny", "stages.1.blocks.0.attn.positional_encoding")
    expected = F.interpolate(learned.permute(0, 3, 1, 2), (32, 36), mode="bicubic")
    assert relative_error(got.permute(0, 3, 1, 2), expected) <= SAME_MODEL


@torch.no_grad()
def test_a_stage_as_wide_as_its_stripes_attends_over_the_whole_map():
    assert [s.blocks[0].attn.split_size is None for s in timm.create_model("test_cswin").stages] == [
        False,
        False,
        False,
        True,
    ]
    model = timm.create_model("test_cswin", img_size=112).eval()
    assert [s.blocks[0].attn.split_size is None for s in model.stages] == [False, False, True, True]
    stripes = timm.create_model("test_cswin").eval()
    stripes.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 112, 112)
    assert relative_error(stripes(image), model(image)) <= SAME_MODEL
    image = torch.randn(1, 3, 224, 224)
    assert relative_error(stripes(image), model(image)) > 10 * SAME_MODEL


def test_configurations():
    for name in PARAMS:
        config = timm.models.get_pretrained_cfg(name).to_dict()
        size = 384 if "384" in name else 224
        squashed = name.startswith(("agent", "inline", "focused"))
        assert config["input_size"] == (3, size, size)
        assert config["crop_pct"] == (0.875 if squashed else 1.0 if size == 384 else 0.9)
        assert config.get("crop_mode", "center") == ("squash" if squashed else "center")
        assert config.get("url", "").startswith("https://") == (config["tag"] != "untrained")
    splits = {"cswin_base_384": [1, 2, 12], "agent_cswin_base_384": [12], "cswin_base": [1, 2, 7]}
    for name, split_sizes in splits.items():
        attn = [stage.blocks[-1].attn for stage in timm.create_model(name, device="meta").stages[:3]]
        assert [a.split_size for a in attn if isinstance(a, layers.CrossShapedAttention)] == split_sizes
    for args, sizes in (({}, [(96, 96), (48, 48)]), ({"img_size": (100, 97)}, [(25, 24), (13, 12)])):
        attn = [s.blocks[0].attn for s in timm.create_model("agent_cswin_base_384", device="meta", **args).stages[:2]]
        assert [(a.ah_bias.shape[3], a.wa_bias.shape[3]) for a in attn] == sizes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"attention": "cosine"}, "expected attention of 'softmax', .*, got 'cosine'"),
        ({"attention_depths": (1, 1)}, r"expected attention_depths of 0 to \[1, 1, 2, 1\] per stage, got \[1, 1\]"),
        ({"attention_depths": (1, 1, 3, 0)}, r"per stage, got \[1, 1, 3, 0\]"),
        ({"attention_args": [{}] * 3}, "expected attention_args, a dict or 4 of them, got 3"),
        ({"split_sizes": (1, 0, 7, 7)}, "expected split_size of at least 1"),
    ],
)
def test_arguments_that_do_not_fit(args, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_cswin", **args)


def test_official_checkpoint_file_loads_as_pretrained(tmp_path):
    golden = load("agent_cswin_t")
    torch.save({"model": official_weights(golden)}, tmp_path / "agent.pth")
    overlay = {"file": str(tmp_path / "agent.pth")}
    args = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    model = timm.create_model("agent_cswin_tiny", **args).eval()
    with torch.no_grad():
        logits = model(fill.image(**golden["input"]))
    assert logits.norm().item() == pytest.approx(golden["logits_norm"], rel=MODEL_GOLDEN)
    other = timm.create_model("agent_cswin_tiny", in_chans=1, num_classes=5, img_size=96, **args)
    torch.testing.assert_close(other.patch_embed.proj.weight, model.patch_embed.proj.weight.sum(1, keepdim=True))
    assert other.stages[0].blocks[1].attn.ah_bias.shape == (1, 2, 9, 24, 1)
    assert other.head.fc.out_features == 5


@torch.no_grad()
def test_inline_kernels_are_made_from_the_input_before_the_norm():
    """What tells the golden apart from the layer's default is the source: a constant added to x changes no norm."""
    model = timm.create_model("inline_cswin_tiny", depths=(1, 1, 1, 1), attention_depths=(1, 1, 0, 0)).eval()
    block = model.stages[0].blocks[0]
    x = torch.randn(1, 9, 7, 64)
    moved = block(x + 1) - block(x) - 1
    assert relative_error(block.norm1(x + 1), block.norm1(x)) <= SAME_MODEL
    assert moved.norm() > 100 * MODEL_GOLDEN
