"""The CSWin backbone: official keys, rates and configurations, resized tables, stripes as wide as the map."""

import pytest
import timm
import torch
import torch.nn.functional as F

import visattn  # noqa: F401
from tests.golden import fill
from tests.models.cases import PARAMETERS
from tests.models.golden import filter_fn, without_values
from tests.tolerances import MODEL_GOLDEN, SAME_MODEL, relative_error
from visattn import layers

NAMES = [name for name in PARAMETERS if "cswin" in name]


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


@pytest.mark.parametrize("name", NAMES)
def test_norms_and_rates_are_the_official_ones(name):
    model = without_values(name)
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
    assert sum(v.numel() for v in official.values()) == PARAMETERS[name]
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
    for name in NAMES:
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


@torch.no_grad()
def test_inline_kernels_are_made_from_the_input_before_the_norm():
    """What tells the golden apart from the layer's default is the source: a constant added to x changes no norm."""
    model = timm.create_model("inline_cswin_tiny", depths=(1, 1, 1, 1), attention_depths=(1, 1, 0, 0)).eval()
    block = model.stages[0].blocks[0]
    x = torch.randn(1, 9, 7, 64)
    moved = block(x + 1) - block(x) - 1
    assert relative_error(block.norm1(x + 1), block.norm1(x)) <= SAME_MODEL
    assert moved.norm() > 100 * MODEL_GOLDEN
