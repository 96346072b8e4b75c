"""`swap_attention`: what stays, what is new, what is refused; the swapped model in timm's ways and in training."""

import copy

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from timm.layers import AttentionRope
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import nn

import visattn
from tests.tolerances import SAME_MODEL, relative_error
from visattn.layers import TOKEN_MIXERS, SoftmaxAttention

VIT = {"img_size": (64, 96), "depth": 3, "num_classes": 5}
SWIN = {"img_size": (64, 96), "depths": (2, 1), "embed_dim": 24, "num_heads": (1, 2), "num_classes": 5}
BACKBONES = {
    "vit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "vit_medium_patch16_reg4_gap_256": {**VIT, "embed_dim": 96, "num_heads": 3},
    "swin_tiny_patch4_window7_224": SWIN,
}


def create(name, **args):
    return timm.create_model(name, **{**BACKBONES[name], **args}).eval()


def count(entries):
    return sum(entry.number for entry in entries)


def image(height=64, width=96):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return request.param


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {"qkv_bias": False, "proj_bias": False}),
        ("vit_tiny_patch16_224", {"init_values": 0.1, "drop_path_rate": 0.5}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_medium_patch16_reg4_gap_256", {"dtype": torch.float64}),
        ("swin_tiny_patch4_window7_224", {"window_size": 24}),
    ],
)
def test_softmax_gives_the_logits_of_before(name, args):
    """In a Swin whose windows hold the whole map, and whose position bias, which is dropped, is zero."""
    model = create(name, **args)
    for key, parameter in model.named_parameters():
        if "relative_position" in key:
            parameter.zero_()
        elif ".attn." in key:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    x = image().to(next(model.parameters()).dtype)
    expected, keys = model(x), model.state_dict().keys()
    report = visattn.swap_attention(model, "softmax")
    assert any(isinstance(module, SoftmaxAttention) for module in model.modules())
    assert relative_error(model(x), expected) <= SAME_MODEL
    assert model.state_dict().keys() == {key for key in keys if "relative_position" not in key}
    assert not report.new


@pytest.mark.parametrize("attention", TOKEN_MIXERS)
def test_every_attention_runs_forward_and_backward(backbone, attention):
    model = create(backbone).train()
    before = {id(p): n for n, p in model.named_parameters()}
    total = sum(p.numel() for p in model.parameters())
    report = visattn.swap_attention(model, attention)
    assert all(module.training for module in model.modules())
    assert len(report.blocks) == len([m for m in model.modules() if type(m) is TOKEN_MIXERS[attention]])
    assert report.untouched + count(report.kept) + count(report.dropped) == total
    assert report.untouched + count(report.kept) + count(report.new) == sum(p.numel() for p in model.parameters())
    prefix = getattr(model, "num_prefix_tokens", 0)
    assert {m.num_prefix_tokens for m in model.modules() if type(m) is TOKEN_MIXERS[attention]} == {prefix}
    named = dict(model.named_parameters())
    assert all(before[id(named[entry.name])] == entry.name for entry in report.kept)
    assert not [entry for entry in report.new if id(named[entry.name]) in before]
    assert {entry.name for entry in report.dropped} == {n for n in before.values() if "relative_position" in n}
    assert ("windows nor shift" in str(report)) == backbone.startswith("swin")
    assert f"{count(report.kept):,}" in str(report)

    model(image()).square().mean().backward()
    assert not [n for n, p in named.items() if p.grad is None or not p.grad.isfinite().all()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(image()).square().mean().backward()
    assert not [n for n, p in named.items() if p.grad is None]


@torch.no_grad()
def test_ways_of_torch_and_timm(backbone, tmp_path):
    args = {"depths": (1, 1)} if backbone.startswith("swin") else {"depth": 1}
    model, fresh = create(backbone, **args), create(backbone, **args)
    visattn.swap_attention(model, "agent")
    expected = model(image())
    visattn.swap_attention(fresh, "agent")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh.load_state_dict(torch.load(tmp_path / "model.pt"))
    exported = torch.export.export(model, (image(),)).module()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for run in (fresh, copy.deepcopy(model), exported, compiled):
        assert relative_error(run(image()), expected) <= SAME_MODEL
    features, maps = model.forward_intermediates(image())
    assert torch.equal(model.forward_head(features), expected)
    assert all(m.ndim == 4 for m in maps)


def test_optimizer_goes_on_with_the_kept_parameters():
    model = create("vit_tiny_patch16_224").train()
    optimizer = torch.optim.AdamW(model.parameters())
    report = visattn.swap_attention(model, "agent")
    named = dict(model.named_parameters())
    optimizer.add_param_group({"params": [named[entry.name] for entry in report.new], "lr": 1e-2})
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in named.values()}


def test_depth_device_and_dtype():
    model = create("vit_tiny_patch16_224", device="meta", dtype=torch.bfloat16)
    report = visattn.swap_attention(model, "inline", depth=2)
    assert report.blocks == ["blocks.0", "blocks.1"]
    assert type(model.blocks[2].attn) is timm.layers.Attention
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    swin = create("swin_tiny_patch4_window7_224")
    assert visattn.swap_attention(swin, "agent", depth=(1, 1), num_agents=9).blocks == [
        "layers.0.blocks.0",
        "layers.1.blocks.0",
    ]
    assert swin(image()).shape == (2, 5)
    assert swin.layers[0].blocks[0].attn.an_bias.shape[1] == 9


@torch.no_grad()
def test_swapped_again():
    model = create("vit_tiny_patch16_224")
    expected = model(image())
    first = visattn.swap_attention(model, "agent")
    second = visattn.swap_attention(model, "softmax")
    assert [entry.name for entry in second.dropped] == [entry.name for entry in first.new]
    assert relative_error(model(image()), expected) <= SAME_MODEL
    assert not [module for module in model.modules() if module.training]


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_grid_follows_set_input_size(name):
    """Also to as many tokens in another layout, where a count of tokens would tell nothing."""
    model = create(name)
    visattn.swap_attention(model, "agent")
    sizes = []
    attn = next(m for m in model.modules() if type(m) is TOKEN_MIXERS["agent"])
    attn.register_forward_pre_hook(lambda module, args: sizes.append(args[1:] or args[0].shape[1:3]))
    model.set_input_size((48, 128))
    assert model(image(48, 128)).shape == (2, 5)
    assert list(sizes[0]) == ([[3, 8]] if name.startswith("vit") else [12, 32])


@torch.no_grad()
def test_swin_has_no_windows_and_takes_any_size():
    for strict in (True, False):
        model = create("swin_tiny_patch4_window7_224", strict_img_size=strict)
        assert any(any(block.shift_size) for block in model.layers[0].blocks)
        visattn.swap_attention(model, "focused")
        for block in (block for stage in model.layers for block in stage.blocks):
            assert block.shift_size == (0, 0)
            assert block.window_size == block.input_resolution
            assert block.attn_mask is None
    assert model(image(72, 52)).isfinite().all()


def test_wrong_use_of_a_swapped_vit():
    model = create("vit_tiny_patch16_224")
    visattn.swap_attention(model, "efficient")
    with pytest.raises(ValueError, match="1 prefix tokens and a grid of 4 x 6 tokens, got 17"):
        model.blocks[0](torch.randn(1, 17, 192))
    with pytest.raises(ValueError, match="no attn_mask"):
        model(image(), is_causal=True)


BAD_MODELS = {
    "expected a VisionTransformer or SwinTransformer of timm, got ResNet": lambda: timm.create_model("test_resnet"),
    "SwinTransformerV2: its cosine": lambda: timm.create_model("swinv2_tiny_window8_256", device="meta"),
    r"FeatureGetterNet around one; try swap_attention\(model.model": lambda: create(
        "vit_tiny_patch16_224", features_only=True
    ),
    "got DiffAttention: it is the difference": lambda: create("vit_tiny_patch16_224", attn_layer="diff"),
    "AttentionRope: it rotates": lambda: create("vit_tiny_patch16_224", attn_layer=AttentionRope),
    "ParallelScalingBlock: its attention and MLP": lambda: create(
        "vit_tiny_patch16_224", block_fn=ParallelScalingBlock
    ),
    "several attentions side by side": lambda: create("vit_tiny_patch16_224", block_fn=ParallelThingsBlock),
    "ResPostBlock: its norms come after": lambda: create("vit_tiny_patch16_224", block_fn=ResPostBlock),
    "without scale_attn_norm": lambda: create("vit_tiny_patch16_224", scale_attn_norm=True),
    "got dynamic_img_size=True": lambda: create("vit_tiny_patch16_224", dynamic_img_size=True),
    "got patch dropout": lambda: create("vit_tiny_patch16_224", patch_drop_rate=0.1),
    "together have the block's 24 channels": lambda: create("swin_tiny_patch4_window7_224", head_dim=16),
}
BAD_ARGUMENTS = {
    "expected attention of 'softmax'": {"attention": "linear"},
    "expected num_agents to be a square": {"num_agents": 5},
    "num_angels": {"num_angels": 9},
    "expected no sr_ratio": {"sr_ratio": 2},
    "expected depth from 1 to 3": {"depth": 4},
    "expected depth from 1 to 3 for a VisionTransformer, got": {"depth": (1, 1)},
}


@pytest.mark.parametrize("sentence", [*BAD_MODELS, *BAD_ARGUMENTS])
def test_a_refusal_says_why_and_changes_nothing(sentence):
    model = BAD_MODELS.get(sentence, lambda: create("vit_tiny_patch16_224"))()
    modules, parameters = dict(model.named_modules()), {n: id(p) for n, p in model.named_parameters()}
    types = {n: type(m) for n, m in modules.items()}
    with pytest.raises((TypeError, ValueError), match=sentence):
        visattn.swap_attention(model, **{"attention": "agent", **BAD_ARGUMENTS.get(sentence, {})})
    assert dict(model.named_modules()) == modules
    assert {n: type(m) for n, m in model.named_modules()} == types
    assert {n: id(p) for n, p in model.named_parameters()} == parameters


def test_failure_in_a_later_block_changes_nothing():
    model = create("vit_tiny_patch16_224")
    model.blocks[2].attn.proj = nn.Sequential(model.blocks[2].attn.proj)
    with pytest.raises(TypeError, match=r"a linear layer at blocks\.2\.attn\.proj"):
        visattn.swap_attention(model, "agent")
    assert {type(block.attn) for block in model.blocks} == {timm.layers.Attention}
    swin = create("swin_tiny_patch4_window7_224")
    for depth in (2, (0, 0), (0, 2), (1, 1, 0), (-1, 1), "11"):
        with pytest.raises(ValueError, match=r"expected depth of at most \[2, 1\]"):
            visattn.swap_attention(swin, "agent", depth=depth)


def test_lost_options_are_told():
    model = create("vit_tiny_patch16_224", qk_norm=True, attn_drop_rate=0.2, proj_drop_rate=0.1)
    report = visattn.swap_attention(model, "agent")
    assert {entry.name.split(".", 3)[3] for entry in report.dropped} == {
        f"{norm}_norm.{key}" for norm in "qk" for key in ("weight", "bias")
    }
    assert "qk_norm" in str(report)
    assert "dropout of attention weights (0.2)" in str(report)
    assert model.blocks[0].attn.proj_drop.p == 0.1
    pooled = create("vit_tiny_patch16_224", class_token=False, global_pool="map")
    assert "attention pool" in str(visattn.swap_attention(pooled, "agent"))
    assert pooled(image()).shape == (2, 5)


def test_vit_tiny_trains_on_after_the_swap():
    """Handwritten digits: a little training with softmax attention, then with agents in its place."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    args = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 96, "depth": 4}
    model = timm.create_model("vit_tiny_patch16_224", **args)

    def mean_losses(epochs):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        losses = []
        for _ in range(epochs):
            for batch in torch.randperm(1400).split(50):
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return torch.tensor(losses).view(epochs, -1).mean(1).tolist()

    before = mean_losses(4)
    visattn.swap_attention(model, "agent", num_agents=4)
    after = mean_losses(3)
    assert before[-1] > after[0] > 1.5 * after[2]
    with torch.no_grad():
        accuracy = (model.eval()(images[1400:]).argmax(1) == labels[1400:]).float().mean()
    assert accuracy > 0.6
