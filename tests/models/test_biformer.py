"""BiFormer: keys of options, heads, regions, padding rules, dense norms, determinism."""

import pytest
import timm
import torch
from timm.layers import LayerNorm2d

import visattn  # noqa: F401
from tests.golden import fill
from tests.models import golden as goldens
from tests.tolerances import SAME_MODEL, relative_error
from visattn.layers import BiLevelRoutingAttention, LePEAttention
from visattn.models.biformer import BiFormerBlock

STL = {"layout": "swin", "before_attn_dwconv": 0}
# Every option that changes the network, on the small variant; maps of a 96 x 128 image are 24 x 32 to 3 x 4.
OPTIONS = [
    {"topks": (1, 3, 4, -1), "mlp_dwconv": True, "layer_scale": 0.1},
    {"topks": (0, 2, 0, -3), "pre_norm": False, "side_dwconv": 0, "n_win": (3, 4, 2, 1)},
    {"topks": (2, 2, 100, 2), "soft_routing": True, "padding": "project", "qk_dims": (16, 16, 32, 48)},
    {"soft_routing": True, "diff_routing": True, "param_routing": True, "param_attention": "qkv"},
    {**STL, "padding": "zero", "topks": (1, 2, 4, -3), "qk_scale": 0.2},
    {"kv_downsample_mode": "avgpool", "padding": "project"},
    {"kv_downsample_mode": "ada_maxpool", "kv_per_wins": (3, 2, 2, 1), "padding": "project"},
]


def test_official_keys_of_options():
    args = {"soft_routing": True, "diff_routing": True, "param_routing": True, "mlp_dwconv": True, "layer_scale": 0.1}
    model = timm.create_model("test_biformer", topks=(1, 0, 1, -2), out_norm="layer", **args)
    block = "stages.1.blocks.0."
    expected = {
        "stages.0.0.attn.router.emb.weight": "stages.0.blocks.0.attn.router.weight",
        "stages.1.0.attn.1.weight": f"{block}attn.proj_in.weight",
        "stages.1.0.attn.2.weight": f"{block}attn.dwconv.weight",
        "stages.1.0.attn.3.weight": f"{block}attn.proj_out.weight",
        "stages.1.0.mlp.1.dwconv.weight": f"{block}mlp.dwconv.weight",
        "stages.1.0.mlp.0.bias": f"{block}mlp.fc1.bias",
        "stages.1.0.mlp.3.weight": f"{block}mlp.fc2.weight",
        "stages.1.0.gamma2": f"{block}ls2.gamma",
        "downsample_layers.2.1.running_mean": "stages.2.downsample.1.running_mean",
        "extra_norms.3.weight": "out_norms.3.weight",
    }
    own = model.state_dict()
    official = {key: own[name] for key, name in expected.items()}
    for linear in ("stages.1.0.attn.1.weight", "stages.1.0.attn.3.weight"):  # 1x1 convolutions there
        official[linear] = official[linear][..., None, None]
    converted = goldens.filter_fn(model)({"model": official}, model)
    assert list(converted) == list(expected.values())
    assert all(torch.equal(value, own[key]) for key, value in converted.items())


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("kernel", [0, 3])
def test_block_is_the_definition(pre_norm, kernel):
    block = BiFormerBlock(
        6, torch.nn.Linear(6, 6), kernel, pre_norm, layer_scale=0.5, device="cpu", dtype=torch.float64
    ).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = y = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    if kernel:
        y = x + torch.conv2d(x, block.pos_embed.weight, block.pos_embed.bias, padding=1, groups=6)
    y = y.permute(0, 2, 3, 1)
    norms = [
        lambda t, n=n: torch.nn.functional.layer_norm(t, (6,), n.weight, n.bias, 1e-6)
        for n in (block.norm1, block.norm2)
    ]
    for branch, norm, scale in zip((block.attn, block.mlp), norms, (block.ls1.gamma, block.ls2.gamma), strict=True):
        y = y + scale * branch(norm(y)) if pre_norm else norm(y + scale * branch(y))
    torch.testing.assert_close(block(x), y.permute(0, 3, 1, 2))


def attentions(model):
    return [stage.blocks[0].attn for stage in model.stages]


def settings(module):
    return {key: value for key, value in vars(module).items() if not key.startswith("_")}


def test_heads_and_mixers():
    """The trap: heads of the routing attention have 32 channels, those of full attention are 8."""
    tiny = attentions(timm.create_model("biformer_tiny", device="meta"))
    assert [type(a) for a in tiny] == [BiLevelRoutingAttention] * 3 + [LePEAttention]
    assert [a.num_heads for a in tiny] == [2, 4, 8, 8]
    assert [a.num_heads for a in attentions(timm.create_model("biformer_base", device="meta"))] == [3, 6, 12, 8]
    plain = attentions(timm.create_model("biformer_tiny", topks=(-1, -2, -3, 5), device="meta"))
    assert [a.lepe is not None for a in plain] == [False, True, True, True]
    assert [a.lepe_on for a in plain[:3]] == ["input", "input", "value"]
    assert (plain[3].topk, plain[3].num_heads) == (5, 16)


@pytest.mark.parametrize(
    ("n_win", "expected"),
    [
        (5, [5] * 4),
        ("classification", [7] * 4),
        ("detection", [16] * 4),
        ("segmentation", [8] * 4),
        ((4, 3, 2, 1),) * 2,
    ],
    ids=str,
)
def test_number_of_regions(n_win, expected):
    model = timm.create_model("biformer_tiny", n_win=n_win, topks=(1, 1, 1, 1), device="meta")
    assert [a.n_win for a in attentions(model)] == [[n, n] for n in expected]


def test_arguments_reach_the_layers():
    shared = {"qk_scale": 0.3, "side_dwconv": 3, "param_attention": "qkv", "padding": "project"}
    shared |= {"soft_routing": True, "diff_routing": True, "param_routing": True}
    for mode in ("avgpool", "ada_maxpool"):
        shared["kv_downsample_mode"] = mode
        args = {**shared, "topks": (4, 3, 2, 1), "qk_dims": (32, 64, 128, 192), "n_win": (4, 5, 6, 7)}
        pools = {"kv_downsample_ratios": (5, 4, 3, 2), "kv_per_wins": (1, 2, 3, 4)}
        for i, attn in enumerate(attentions(timm.create_model("test_biformer", **args, **pools))):
            dim, qk_dim = (16, 32, 64, 96)[i], args["qk_dims"][i]
            pool = {"kv_downsample_ratio": 5 - i, "kv_per_win": 1 + i}
            expected = BiLevelRoutingAttention(dim, qk_dim // 16, 4 + i, 4 - i, qk_dim, **pool, **shared)
            assert str(attn) == str(expected)
            assert settings(attn) == settings(expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_run_and_train(options):
    model = timm.create_model("test_biformer", **options, drop_path_rate=0.1).train()
    model(torch.randn(2, 3, 96, 128)).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_trace_and_export(options):
    model = timm.create_model("test_biformer", **options).eval()
    image = torch.randn(1, 3, 96, 128)
    assert relative_error(torch.fx.symbolic_trace(model)(image), model(image)) <= SAME_MODEL
    sides = {i: torch.export.Dim(n, min=64, max=1024) for i, n in ((2, "height"), (3, "width"))}
    program = torch.export.export(model, (torch.randn(1, 3, 128, 160),), dynamic_shapes={"x": sides})
    for size in ((96, 128), (97, 131)):
        image = torch.randn(1, 3, *size)
        assert relative_error(program.module()(image), model(image)) <= SAME_MODEL


@torch.no_grad()
def test_padding_rules_agree_at_multiples_of_112_and_only_there():
    models = [timm.create_model("test_biformer", n_win=7, padding=p).eval() for p in ("mask", "project", "zero")]
    for model in models:
        model.load_state_dict(models[0].state_dict())
        for name, parameter in model.named_parameters():
            parameter.copy_(fill.tensor_for(name, parameter.shape))
    for size, agree in (((112, 224), True), ((112, 192), False)):
        image = torch.randn(1, 3, *size)
        mask, *others = (model(image) for model in models)
        assert [relative_error(o, mask) <= SAME_MODEL for o in others] == [agree, agree]


@torch.no_grad()
def test_norms_of_the_official_dense_models():
    plain = timm.create_model("test_biformer").eval()
    model = timm.create_model("test_biformer", out_norm="layer").eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    image = torch.randn(2, 3, 64, 96) * 1e-2
    maps = (m.forward_intermediates(image, intermediates_only=True) for m in (model, plain))
    for index, (level, expected) in enumerate(zip(*maps, strict=True)):
        norm = LayerNorm2d(expected.shape[1])  # timm's default epsilon, 1e-6
        assert model.out_norms[index].eps == norm.eps == 1e-6
        torch.testing.assert_close(level, norm(expected))


def test_deterministic_mode_trains():
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.manual_seed(0)
            model = timm.create_model("test_biformer", soft_routing=True, diff_routing=True, drop_path_rate=0.1).train()
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.randn(2, 3, 97, 131)).square().mean().backward()
                optimizer.step()
            results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*results)


@torch.no_grad()
def test_attended_regions_of_every_routing_layer():
    model = timm.create_model("biformer_tiny", depths=(1, 1, 2, 1)).eval()
    found = model.attended(torch.randn(2, 3, 224, 112))
    assert list(found) == [f"stages.{i}.blocks.{j}.attn" for i, j in ((0, 0), (1, 0), (2, 0), (2, 1))]
    for (name, told), topk in zip(found.items(), (1, 4, 16, 16), strict=True):
        assert told["regions"].shape == told["weights"].shape == (2, 1, 49, topk), name
        torch.testing.assert_close(told["weights"].sum(-1), torch.ones(2, 1, 49))
        assert set(told["regions"].unique().tolist()) <= set(range(49))
