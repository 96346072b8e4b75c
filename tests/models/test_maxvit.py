"""The MaxViT family: timm's outputs, windows, tables, sizes, dilation, stochastic depth."""

import pytest
import timm
import torch
from torch.nn import functional as F

import visattn  # noqa: F401
from tests.golden import fill
from tests.models.cases import REFUSED
from tests.tolerances import MODEL_GOLDEN, SAME_MODEL, relative_error
from visattn.layers import MBConv, WindowAttention
from visattn.models.maxvit import checkpoint_filter_fn


def windows(model):
    return [(m.window_size, m.rpb.shape[1:]) for m in model.modules() if isinstance(m, WindowAttention)]


def small(**kwargs):
    """The test variant with parameters that make position tables matter."""
    model = timm.create_model("test_maxvit_va", **kwargs).eval()
    state = model.state_dict()
    values = fill.fill({k: v.shape for k, v in state.items() if v.is_floating_point()})
    model.load_state_dict({**state, **{k: v * 4 if k.endswith(".rpb") else v for k, v in values.items()}})
    return model


@pytest.mark.parametrize(
    ("size", "reference", "ours"),
    [
        ((256, 192), {"img_size": (256, 192)}, {"img_size": (256, 192)}),
        ((256, 192), {"img_size": (256, 192)}, {"img_size": (256, 192), "window_size": "grow"}),
        ((448, 224), {}, {}),
    ],
    ids=["windows 8x6", "growing windows 8x6", "fixed windows 7x7"],
)
def test_equals_timm(size, reference, ours):
    depths = {"depths": (1, 2, 1, 1), "num_classes": 7}
    expected = timm.create_model("maxvit_tiny_tf_224", **depths, **reference).eval()
    weights = fill.fill({k: v.shape for k, v in expected.state_dict().items() if v.is_floating_point()})
    expected.load_state_dict(weights)
    if not reference:
        expected.set_input_size(img_size=size, window_size=(7, 7), grid_size=(7, 7))
    model = timm.create_model("maxvit_tiny_va", **depths, **ours).eval()
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    image = fill.image((2, 3, *size))
    with torch.no_grad():
        (features, maps), (_, their_maps) = model.forward_intermediates(image), expected.forward_intermediates(image)
        for got, want in zip(maps, their_maps, strict=True):
            assert relative_error(got, want) <= MODEL_GOLDEN
        for x in (features, 1e-3 * features):  # small enough for the norm's epsilon to matter
            assert relative_error(model.forward_head(x), expected.forward_head(x)) <= MODEL_GOLDEN


@pytest.mark.parametrize(
    ("tag", "args", "window", "table"),
    [
        ("", {}, [7, 7], (13, 13)),
        (".tf_384_in1k", {}, [12, 12], (23, 23)),
        (".tf_384_in1k", {"img_size": (256, 192)}, [8, 6], (15, 11)),
        (".tf_384_in1k", {"window_size": 7}, [7, 7], (13, 13)),
        (".tf_384_in1k", {"window_size": (7, 8), "table_size": 12}, [7, 8], (23, 23)),
        ("", {"img_size": 384, "table_size": 7}, [12, 12], (13, 13)),
        ("", {"img_size": (250, 230)}, [8, 8], (15, 15)),
        ("", {"pretrained_cfg_overlay": {"input_size": (3, 512, 512)}}, [16, 16], (31, 31)),
    ],
)
def test_windows_of_tags_and_sizes(tag, args, window, table):
    model = timm.create_model(f"maxvit_tiny_va{tag}", device="meta", depths=(1, 1, 1, 1), **args)
    assert windows(model) == [(window, table)] * 8


def test_checkpoint_files_load_as_pretrained(tmp_path):
    """The whole way of `pretrained=True` with timm's layout, also for grey images, other classes and another window."""
    reference = timm.create_model("maxvit_tiny_tf_384", depths=(1, 1, 1, 1)).eval()
    torch.save(reference.state_dict(), tmp_path / "384.pth")
    args = {"pretrained": True, "depths": (1, 1, 1, 1)}
    args["pretrained_cfg_overlay"] = {"file": str(tmp_path / "384.pth")}
    model = timm.create_model("maxvit_tiny_va.tf_384_in1k", **args).eval()
    image = torch.randn(1, 3, 384, 384)
    with torch.no_grad():
        assert relative_error(model(image), reference(image)) <= MODEL_GOLDEN

    other = timm.create_model("maxvit_tiny_va.tf_384_in1k", in_chans=1, num_classes=5, window_size=7, **args).eval()
    first = model.patch_embed.conv1.weight
    torch.testing.assert_close(other.patch_embed.conv1.weight, first.sum(1, keepdim=True))
    table, resized = (m.stages[2].blocks[0].attn_grid.attn.rpb for m in (model, other))
    assert torch.equal(resized, F.interpolate(table[None], (13, 13), mode="bilinear", align_corners=False)[0])
    kept = timm.create_model("maxvit_tiny_va.tf_384_in1k", num_classes=5, window_size=7, table_size=12, **args).eval()
    assert torch.equal(kept.stages[2].blocks[0].attn_grid.attn.rpb, table)
    with torch.no_grad():
        expected = model.forward_intermediates(image[..., :97, :131])[0]
        assert relative_error(kept.forward_features(image[..., :97, :131]), expected) > SAME_MODEL
        model.set_input_size(window_size=7)
        expected = model.forward_features(image[..., :97, :131])
        assert relative_error(kept.forward_features(image[..., :97, :131]), expected) <= SAME_MODEL


def test_torchvision_form_has_no_classifier_bias():
    model = timm.create_model("test_maxvit_va", form="torchvision")
    assert model.head.fc.bias is None
    model.reset_classifier(3)
    assert model.head.fc.bias is None
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 64)


@torch.no_grad()
def test_growing_windows_are_those_of_a_model_for_that_size():
    model = small(window_size="grow")
    for size in ((256, 192), (97, 131), (32, 32), (1, 1)):
        fixed = timm.create_model("test_maxvit_va", img_size=size, table_size=5).eval()
        fixed.load_state_dict(model.state_dict())
        image = torch.randn(1, 3, *size)
        assert relative_error(model(image), fixed(image)) <= SAME_MODEL


@torch.no_grad()
def test_set_input_size_keeps_parameters(tmp_path):
    model, image = small(), torch.randn(1, 3, 256, 192)
    parameters, before = list(model.parameters()), model(image)
    model.set_input_size((256, 192))
    assert windows(model) == [([8, 6], (9, 9))] * 10
    assert relative_error(model(image), before) > 1e-3
    grown = timm.create_model("test_maxvit_va", window_size="grow").eval()
    grown.load_state_dict(model.state_dict())
    assert relative_error(model(image), grown(image)) <= SAME_MODEL
    timm.models.save_for_hf(model, tmp_path)
    saved = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert windows(saved) == windows(model)
    assert torch.equal(saved(image), model(image))
    model.set_input_size(window_size=5)
    assert torch.equal(model(image), before)
    model.set_input_size(img_size=512)
    assert windows(model) == [([5, 5], (9, 9))] * 10
    model.set_input_size(window_size="image")
    assert windows(model) == [([16, 16], (9, 9))] * 10
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("args", [{"window_size": "grow", "output_stride": 8}, {"form": "torchvision"}], ids=str)
def test_options_trace_and_export(args):
    model, image = small(**args), torch.randn(1, 3, 97, 131)
    assert relative_error(torch.fx.symbolic_trace(model)(image), model(image)) <= SAME_MODEL
    height, width = (torch.export.Dim(n, min=33, max=1024) for n in ("height", "width"))
    program = torch.export.export(
        model, (torch.randn(1, 3, 160, 192),), dynamic_shapes={"x": {2: height, 3: width}}
    ).module()
    assert relative_error(program(image), model(image)) <= SAME_MODEL


@pytest.mark.parametrize(
    ("output_stride", "dilations", "numbers"),
    [
        (32, [[1], [1], [1, 1], [1]], [8, 4, 2, 1]),
        (16, [[1], [1], [1, 1], [1]], [8, 4, 2, 2]),
        (8, [[1], [1], [1, 2], [2]], [8, 4, 4, 4]),
    ],
)
def test_dilations_and_windows_of_an_output_stride(output_stride, dilations, numbers):
    args = {"window_size": "grow", "device": "meta"}
    model = timm.create_model("test_maxvit_va", output_stride=output_stride, **args)
    assert [
        [m.conv2.dilation[0] for m in stage.modules() if isinstance(m, MBConv)] for stage in model.stages
    ] == dilations
    per_stage = [[m.num_windows for m in stage.modules() if isinstance(m, WindowAttention)] for stage in model.stages]
    assert [{tuple(n) for n in stage} for stage in per_stage] == [{(n, n)} for n in numbers]


def test_dropped_branches_leave_the_shortcut():
    """Stochastic depth of 0.999: what is left of a block is its shortcut, pooled and projected where it strides."""
    model = timm.create_model("test_maxvit_va", drop_path_rate=0.999, depths=(1, 1, 2, 1)).train()
    same, strided = model.stages[2].blocks[1], model.stages[3].blocks[0]
    for block, rate in ((same, 0.999 * 3 / 4), (strided, 0.999)):
        drops = [m for m in block.modules() if isinstance(m, timm.layers.DropPath)]
        assert [m.drop_prob for m in drops] == pytest.approx([rate] * 5)
        for drop in drops:
            drop.drop_prob = 0.999
    x = torch.randn(2, 48, 6, 5)
    assert torch.equal(same(x), x)
    assert torch.equal(strided(x), strided.conv.shortcut(x))
    same.eval()
    assert not torch.allclose(same(x), x)


def test_init_is_the_official_one():
    model = timm.create_model("test_maxvit_va")
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.2)
            assert module.bias is None or not module.bias.any()
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-3, 0.01)


@pytest.mark.parametrize(
    ("name", "args", "message", "error"),
    [row for row in REFUSED if row[0] == "test_maxvit_va" and row[1].keys() <= {"img_size", "window_size"}],
    ids=str,
)
def test_set_input_size_refuses_what_the_constructor_does(name, args, message, error):
    model = timm.create_model(name)
    with pytest.raises(error, match=message):
        model.set_input_size(**args)
    assert (model.img_size, model.window_size) == ((160, 160), "image")
