"""The CoAtNet family: timm's networks and weights, blocks and strides of the paper's variants, options."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import visattn  # noqa: F401
from tests.golden import fill
from tests.tolerances import MODEL_GOLDEN, SAME_MODEL, relative_error
from visattn.models.coatnet import TIMM_OPTIONS, checkpoint_filter_fn, resolve_blocks

RW = {
    "coatnet_nano_rw_va": "coatnet_nano_rw_224",
    "coatnet_0_rw_va": "coatnet_0_rw_224",
    "coatnet_1_rw_va": "coatnet_1_rw_224",
    "coatnet_2_rw_va": "coatnet_2_rw_224",
    "coatnet_3_rw_va": "coatnet_3_rw_224",
    "coatnet_bn_0_rw_va": "coatnet_bn_0_rw_224",
    "coatnet_rmlp_nano_rw_va": "coatnet_rmlp_nano_rw_224",
    "coatnet_rmlp_1_rw_va": "coatnet_rmlp_1_rw_224",
    "coatnet_rmlp_1_rw2_va": "coatnet_rmlp_1_rw2_224",
    "coatnet_rmlp_2_rw_va": "coatnet_rmlp_2_rw_224",
}
TIMM_0 = {"head_hidden_size": 768, **TIMM_OPTIONS}


def randomise(model):
    skipped = {k for k, v in model.state_dict().items() if not v.is_floating_point()}
    shapes = {k: v.shape for k, v in model.state_dict().items() if k not in skipped}
    model.load_state_dict(fill.fill(shapes), strict=False)
    return model.eval()


def with_weights_of(model, theirs):
    model.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), model))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", RW)
def test_equals_timm_with_all_options(name):
    """Narrow and shallow, but every option of the variant, and a map that is not square."""
    shape = {"depths": (2, 1, 2, 2), "stem_width": (8, 16)}
    dims = (32, 64, 96, 128)
    theirs = randomise(timm.create_model(RW[name], img_size=(96, 64), embed_dim=dims, **shape))
    ours = with_weights_of(timm.create_model(name, img_size=(96, 64), embed_dims=dims, **shape), theirs)
    x = torch.randn(2, 3, 96, 64)
    assert relative_error(ours(x), theirs(x)) <= MODEL_GOLDEN
    maps = (model.forward_intermediates(x, intermediates_only=True) for model in (ours, theirs))
    for got, expected in zip(*maps, strict=True):
        assert relative_error(got, expected) <= MODEL_GOLDEN


@pytest.mark.parametrize("name", RW)
def test_timm_weights_fit(name):
    theirs = timm.create_model(RW[name], device="meta")
    ours = timm.create_model(name, device="meta")
    converted = checkpoint_filter_fn(theirs.state_dict(), ours)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in ours.state_dict().items()}


@torch.no_grad()
def test_equals_timm_at_256x192():
    theirs = randomise(timm.create_model("coatnet_0_224", img_size=(256, 192)))
    ours = with_weights_of(timm.create_model("coatnet_0_va", img_size=(256, 192), **TIMM_0), theirs)
    x = torch.randn(1, 3, 256, 192)
    assert relative_error(ours(x), theirs(x)) <= MODEL_GOLDEN


def test_timm_checkpoint_file_loads_as_pretrained(tmp_path):
    """The whole way of `pretrained=True`, also for grey images, 5 classes and tables of another size."""
    dims, depths = (32, 64, 96, 128), (1, 1, 1, 1)
    theirs = randomise(timm.create_model("coatnet_0_rw_224", embed_dim=dims, depths=depths))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    args = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "timm.pth")}}
    args.update(embed_dims=dims, depths=depths)
    model = timm.create_model("coatnet_0_rw_va", **args).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert relative_error(model(x), theirs(x)) <= MODEL_GOLDEN
    other = timm.create_model("coatnet_0_rw_va", in_chans=1, num_classes=5, img_size=(320, 192), **args)
    torch.testing.assert_close(other.patch_embed.conv1.weight, model.patch_embed.conv1.weight.sum(1, keepdim=True))
    table = model.stages[2].blocks[0].attn.rpb
    expected = F.interpolate(table[None], size=(39, 23), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(other.stages[2].blocks[0].attn.rpb, expected)


def test_printed_and_published_width_of_coatnet_6():
    model = timm.create_model("coatnet_6_va", device="meta", embed_dims=(192, 384, (768, 1536), 3072))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.47e9, rel=0.01)


def test_coatnet_6_changes_kind_and_width_within_a_stage():
    model = timm.create_model("coatnet_6_va", device="meta")
    blocks = model.stages[2].blocks
    assert [type(b).__name__ for b in blocks] == ["MBConv"] * 8 + ["PooledTransformerBlock"] * 42
    assert blocks[7].conv3.out_channels == 768
    assert (blocks[8].shortcut.in_features, blocks[8].shortcut.out_features) == (768, 1536)
    assert blocks[8].attn.num_heads == 1536 // 128
    assert model.feature_info[3] == {"num_chs": 1536, "reduction": 16, "module": "stages.2"}


@pytest.mark.parametrize(("mode", "strided"), [("conv1", "conv1"), ("dw", "conv2"), ("pool", None)])
def test_where_the_convolutional_stages_stride(mode, strided):
    block = timm.create_model("coatnet_0_va", device="meta", stride_mode=mode).stages[1].blocks[0]
    assert [n for n in ("conv1", "conv2", "conv3") if getattr(block, n).stride[0] == 2] == (
        [strided] if strided else []
    )


def test_defaults_are_the_papers():
    model = timm.create_model("coatnet_0_va", device="meta")
    conv, attention = model.stages[1].blocks[0], model.stages[2].blocks[0]
    assert conv.conv1.stride == (2, 2)
    assert conv.shortcut.pool.kind == attention.pool.kind == "max"
    assert [tuple(stage.blocks[1].attn.rpb.shape) for stage in model.stages[2:]] == [(12, 27, 27), (24, 13, 13)]


@torch.no_grad()
def test_run_time_resize_is_that_of_loading():
    model = randomise(timm.create_model("test_coatnet_va"))
    resized = timm.create_model("test_coatnet_va", img_size=(224, 96)).eval()
    resized.load_state_dict(checkpoint_filter_fn(model.state_dict(), resized))
    assert resized.stages[3].blocks[0].attn.rpb.shape == (6, 13, 5)
    x = torch.randn(1, 3, 224, 96)
    assert relative_error(model(x), resized(x)) <= SAME_MODEL


@pytest.mark.parametrize(("output_stride", "dilations"), [(16, [1, 1, 1]), (8, [1, 2, 2])])
def test_dilations_of_an_output_stride(output_stride, dilations):
    args = {"depths": (1, 1, (3, 1), 1), "device": "meta"}
    model = timm.create_model("test_coatnet_va", output_stride=output_stride, **args)
    assert [block.conv2.dilation[0] for block in model.stages[2].blocks[:3]] == dilations


def test_dropped_branches_leave_the_shortcuts():
    """At rate 0.999 all blocks but the first, whose rate is 0, are their shortcuts."""
    model = timm.create_model("test_coatnet_va", drop_path_rate=0.999, depths=(1, 1, (1, 1), 2)).train()
    for module in model.modules():
        if isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.999
    x = model.stages[0](model.patch_embed(torch.randn(2, 3, 64, 64)))
    expected = x
    for stage in list(model.stages)[1:]:
        for block in stage.blocks:
            if isinstance(block.shortcut, torch.nn.Sequential):
                expected = block.shortcut(expected)
            else:
                expected = block.shortcut(block.pool(expected).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    got = model.stages[3](model.stages[2](model.stages[1](x)))
    torch.testing.assert_close(got, expected)
    assert got.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("options", [{"rel_pos_dim": 8}, {"norm": "batch", "head_hidden_size": 64}], ids=str)
def test_options_trace(options):
    model = timm.create_model("test_coatnet_va", depths=(1, 1, (1, 1), 1), **options).eval()
    x = torch.randn(2, 3, 97, 64)
    assert relative_error(torch.fx.symbolic_trace(model)(x), model(x)) <= SAME_MODEL
    sizes = {i: torch.export.Dim(n, min=33, max=512) for i, n in ((2, "height"), (3, "width"))}
    program = torch.export.export(model, (torch.randn(2, 3, 160, 128),), dynamic_shapes=(sizes,))
    assert relative_error(program.module()(x), model(x)) <= SAME_MODEL


@torch.no_grad()
def test_compiled_once_for_all_sizes():
    model = timm.create_model("test_coatnet_va", depths=(1, 1, (1, 1), 1), rel_pos_dim=8).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for size in ((97, 64), (128, 160)):
        x = torch.randn(2, 3, *size)
        assert relative_error(compiled(x), model(x)) <= SAME_MODEL
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


def test_position_mlp_is_not_decayed():
    model = timm.create_model("test_coatnet_va", rel_pos_dim=8)
    groups = create_optimizer_v2(model, weight_decay=0.1).param_groups
    plain = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all(id(p) in plain for n, p in model.named_parameters() if ".rel_pos." in n)


def test_resolve_blocks():
    stages = resolve_blocks((1, (2, 1)), ("C", ("C", "T")), (8, (16, 32)))
    assert stages == [[("C", 8)], [("C", 16), ("C", 16), ("T", 32)]]
