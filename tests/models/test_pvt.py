"""PVT: the official network by its formulas, position parameters at other sizes, class token and options."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

import visattn  # noqa: F401
from tests.golden import fill
from tests.models.cases import PARAMETERS
from tests.models.golden import filter_fn, without_values
from tests.tolerances import OP, SAME_MODEL, relative_error
from visattn.layers import TOKEN_MIXERS

VARIANTS = ("test_pvt", "test_inline_pvt")


def plain_pvt(w, image, heads, ratios):
    """PVT v1 by its formulas on official parameters `w`; positions are those of 224 x 224."""

    def norm(x, name, eps=1e-6):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def attention(x, name, heads, ratio, size):
        y = x
        if ratio > 1:
            y = F.conv2d(x.mT.unflatten(2, size), w[f"{name}.sr.weight"], w[f"{name}.sr.bias"], ratio)
            y = norm(y.flatten(2).mT, f"{name}.norm", 1e-5)
        q = linear(x, f"{name}.q").unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = linear(y, f"{name}.kv").unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.proj")

    x = image
    for i in range(1, 5):
        x = F.conv2d(x, w[f"patch_embed{i}.proj.weight"], w[f"patch_embed{i}.proj.bias"], 4 if i == 1 else 2)
        size, side = x.shape[2:], 112 // 2**i
        x = norm(x.flatten(2).mT, f"patch_embed{i}.norm", 1e-5)
        table = w[f"pos_embed{i}"]
        grid = F.interpolate(table[:, -side * side :].mT.unflatten(2, (side, side)), size, mode="bilinear")
        x = x + grid.flatten(2).mT
        if i == 4:
            x = torch.cat([(w["cls_token"] + table[:, :1]).expand(len(x), -1, -1), x], 1)
        j = 0
        while f"block{i}.{j}.norm1.weight" in w:
            name = f"block{i}.{j}"
            x = x + attention(norm(x, f"{name}.norm1"), f"{name}.attn", heads[i - 1], ratios[i - 1], size)
            x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
            j += 1
        if i < 4:
            x = x.mT.unflatten(2, size)
    return linear(norm(x, "norm")[:, 0], "head")


def official_layout(model):
    """Shapes of the official PVT's parameters for a model of ours with a class token and sr_ratios (8, 4, 2, 1)."""
    shapes = {}
    for key, value in model.state_dict().items():
        shape, stage = list(value.shape), int(key.split(".")[1]) + 1 if key.startswith("stages") else 1
        key = key.replace("patch_embed.", "patch_embed1.").replace("head.fc.", "head.")
        key = key.replace(f"stages.{stage - 1}.blocks.", f"block{stage}.")
        key = key.replace(f"stages.{stage - 1}.downsample.", f"patch_embed{stage}.")
        if key.endswith(".pos_embed"):
            key, shape = f"pos_embed{stage}", [1, shape[1] * shape[2] + (stage == 4), shape[3]]
        elif ".attn.qkv." in key:
            shapes[key.replace("qkv", "q")] = [shape[0] // 3, *shape[1:]]
            key, shape = key.replace("qkv", "kv"), [shape[0] // 3 * 2, *shape[1:]]
        elif "cls_pos_embed" in key:
            continue
        shapes[key.replace("stages.3.cls", "cls")] = shape
    return shapes


@torch.no_grad()
def test_softmax_is_the_official_pvt():
    """Also at other sizes, where no table of another shape with as many entries may pass."""
    model = timm.create_model("pvt_tiny", depths=(1, 2, 1, 1), dtype=torch.float64).eval()
    weights = {key: value.double() for key, value in fill.fill(official_layout(model)).items()}
    assert weights["pos_embed4"].shape == (1, 50, 512)
    assert "block4.0.attn.kv.weight" in weights
    model.load_state_dict(filter_fn(model)({"state_dict": weights}, model))
    for size in ((224, 224), (256, 192), (448, 112), (448, 448), (250, 197)):
        image = fill.image((1, 3, *size)).double()
        expected = plain_pvt(weights, image, (1, 2, 5, 8), (8, 4, 2, 1))
        assert relative_error(model(image), expected) <= OP[torch.float64]


@pytest.mark.parametrize("name", [name for name in PARAMETERS if "pvt" in name])
def test_positions_are_those_of_the_default_size(name):
    model = without_values(name)
    size = timm.data.resolve_model_data_config(model)["input_size"][1]
    tables = [model.patch_embed, *(stage.downsample for stage in model.stages[1:])]
    assert [list(t.pos_embed.shape[1:3]) for t in tables] == [[size // s] * 2 for s in (4, 8, 16, 32)]


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_rows_and_columns_that_no_patch_covers_are_cropped(name):
    model = timm.create_model(name).eval()
    image = torch.randn(2, 3, 97, 131)
    assert relative_error(model(image[:, :, :96, :130]), model(image)) <= SAME_MODEL


# A table of focused attention does not tell the height and width of as many patches.
RESIZED = [(a, s) for a in TOKEN_MIXERS for s in ((96, 256), (40, 640), (640, 40)) if a != "focused" or s == (96, 256)]


@torch.no_grad()
@pytest.mark.parametrize(("attention", "size"), RESIZED, ids=str)
def test_weights_of_one_size_in_a_model_of_another(attention, size):
    """The filter resizes positions bicubically, the model bilinearly, also for as many patches as at the trained size;
    other tables alike."""
    model = timm.create_model("test_pvt", attention=attention, class_token=False).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.trunc_normal_(parameter, std=0.1)
    other = timm.create_model("test_pvt", attention=attention, class_token=False, img_size=size).eval()
    state = model.state_dict()
    other.load_state_dict(filter_fn(other)(state, other))
    image = torch.randn(1, 3, *size)
    assert relative_error(model(image), other(image)) > SAME_MODEL
    for i in range(4):
        key = f"stages.{i}.downsample.pos_embed" if i else "patch_embed.pos_embed"
        table, grid = state[key].permute(0, 3, 1, 2), [n // 2 ** (i + 1) for n in size]
        expected = F.interpolate(table, grid, mode="bicubic").permute(0, 2, 3, 1)
        assert relative_error(other.get_parameter(key), expected) <= SAME_MODEL
        other.get_parameter(key).copy_(F.interpolate(table, grid, mode="bilinear").permute(0, 2, 3, 1))
    assert relative_error(model(image), other(image)) <= SAME_MODEL


def test_attention_depths_and_arguments():
    args = {"attention": "agent", "attention_args": [{"num_agents": n} for n in (4, 9, 16, 25)], "device": "meta"}
    model = timm.create_model("test_pvt", attention_depths=(1, 1, 0, 2), **args)
    found = [[getattr(block.attn, "num_agents", 0) for block in stage.blocks] for stage in model.stages]
    assert found == [[4], [9, 0], [0], [25, 25]]
    assert [stage.blocks[0].attn.sr_ratio[0] for stage in model.stages] == [8, 4, 2, 1]
    assert [stage.blocks[0].attn.num_prefix_tokens for stage in model.stages] == [0, 0, 0, 1]


@torch.no_grad()
def test_class_token_is_classified_and_left_out_of_the_maps():
    model = timm.create_model("test_pvt").eval()
    image = torch.randn(2, 3, 97, 131)
    tokens, maps = model.forward_intermediates(image, norm=True)
    assert torch.equal(tokens, model.forward_features(image))
    assert torch.equal(tokens[:, 1:], maps[3].flatten(2).mT)
    assert torch.equal(model(image), model.head.fc(tokens[:, 0]))
    model.reset_classifier(7, "avg")
    assert relative_error(model(image), model.head.fc(tokens[:, 1:].mean(1))) <= SAME_MODEL
    model.reset_classifier(0, "")
    assert torch.equal(model(image), tokens)
    final, maps = model.forward_intermediates(image, [1], stop_early=True)
    assert torch.equal(final.permute(0, 3, 1, 2), maps[0])
    model.prune_intermediate_layers([2])
    assert model(image).shape == (2, 12, 16, 72)


def test_weight_decay_is_the_official_one_and_a_class_token_learns_with_its_patches():
    model = timm.create_model("test_pvt")
    optimizer = create_optimizer_v2(model, weight_decay=0.1, layer_decay=0.5)
    group = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    named = {name: group[id(p)] for name, p in model.named_parameters()}
    stage, patches = "stages.3.", "stages.3.downsample."
    decays = [named[n]["weight_decay"] for n in (f"{stage}cls_token", f"{stage}cls_pos_embed", f"{patches}pos_embed")]
    assert decays == [0, 0.1, 0.1]
    assert named[f"{stage}cls_token"]["lr_scale"] == named[f"{patches}proj.weight"]["lr_scale"]
    assert named[f"{stage}cls_token"]["lr_scale"] < named[f"{stage}blocks.1.attn.qkv.weight"]["lr_scale"]
