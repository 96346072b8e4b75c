"""What every model keeps beyond timm's own suite (scripts/run_timm_tests.py): tracing, saving, precision, memory."""

import copy
import pickle  # noqa: TID251 - bytes of this process

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._registry import _model_entrypoints
from timm.optim import create_optimizer_v2
from torch.utils.flop_counter import FlopCounterMode

import visattn
from tests.tolerances import SAME_MODEL, relative_error
from visattn.flops import forward_flops
from visattn.models import FAMILIES
from visattn.models.pvt import PVT
from visattn.ops import decompose

OURS = visattn.list_models()
SMALL = [n for n in OURS if n.startswith("test_")]
SIZE = (2, 3, 96, 128)
# Position tables, what makes position biases, and class tokens; those that decay in the official code are not here,
# nor are the positions of tokens, which decay in PVT's.
NOT_DECAYED = (
    "rpb",
    "rel_h",
    "rel_w",
    "query_embedding",
    "local_bias",
    "cpb_fc1.weight",
    "cpb_fc2.weight",
    "cls_token",
)
# PyTorch ties its convolutions to maps of more than one row and column: there are two from this size on, not from 33.
LEAST = {"test_cswin": 35, "test_efficient_cswin": 35, "test_shiftvit": 64}


@pytest.fixture(params=SMALL)
def model(request):
    return timm.create_model(request.param).eval()


@pytest.fixture
def image():
    return torch.randn(SIZE)


def test_names_and_modules_shadow_nothing_of_timm():
    shipped = {n: fn.__module__ for n, fn in _model_entrypoints.items() if fn.__module__.startswith("timm.")}
    assert len(shipped) > 1000
    assert not set(OURS) & set(shipped)
    assert not set(FAMILIES) & {module.rpartition(".")[2] for module in shipped.values()}


def test_small_variants_have_under_a_million_parameters():
    assert SMALL
    for name in SMALL:
        assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) < 1e6


@pytest.mark.parametrize("name", OURS)
def test_img_size_is_accepted(name):
    timm.create_model(name, img_size=(96, 160), device="meta")


def test_adapters_find_single_layers_by_their_names(model):
    """LoRA's usual targets: linear layers, and the convolutions of patches, PVT's merges and MBConv's shortcuts.

    Adapters make others of a layer's class, so that its constructor is PyTorch's.
    """
    convs = ("patch_embed.proj", "downsample.proj", "shortcut.proj")
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("qkv", "proj"):
            kind = torch.nn.Conv2d if name.endswith(convs) else torch.nn.Linear
            assert isinstance(module, kind), name
            assert type(module).__init__ is kind.__init__, name


@torch.no_grad()
def test_channels_last_is_the_same(model, image):
    expected = model(image)
    model = model.to(memory_format=torch.channels_last)
    assert relative_error(model(image.contiguous(memory_format=torch.channels_last)), expected) <= SAME_MODEL


class Stand(torch.nn.Module):
    """What adapters and quantisers put in the place of a linear layer: its weight is not to be had."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.in_features = linear, linear.in_features

    def forward(self, x):
        return self.linear(x)


ROUTED = {"param_routing": True, "diff_routing": True, "soft_routing": True}


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in SMALL), ("test_biformer", ROUTED), ("test_coatnet_va", {"rel_pos_dim": 8})],
)
def test_linear_layers_can_be_replaced(name, options):
    """They are called, and their weights trained, by whatever way they go into the model."""
    model, image = timm.create_model(name, **options).eval(), torch.randn(SIZE)
    other = copy.deepcopy(model)
    for parent in list(other.modules()):
        for child, module in parent.named_children():
            if isinstance(module, torch.nn.Linear):
                setattr(parent, child, Stand(module))
    expected, got = model(image), other(image)
    assert relative_error(got, expected) <= SAME_MODEL
    expected.square().sum().backward()
    got.square().sum().backward()
    own, others = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, other))
    assert relative_error(others, own) <= 10 * SAME_MODEL


def test_flops_are_those_of_the_cards_on_a_cpu_too(model, image):
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode(), FlopCounterMode(display=False) as counter:
            model(image[:1])
        assert counter.get_total_flops() == forward_flops(model, *SIZE[1:])


def test_every_parameter_trains_with_drop_path(model, image):
    model = timm.create_model(model.pretrained_cfg["architecture"], drop_path_rate=0.2).train()
    model(image).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_drop_path_rates_grow_to_the_given_one(model):
    model = timm.create_model(model.pretrained_cfg["architecture"], drop_path_rate=0.3)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.3)


@torch.no_grad()
def test_saved_model_is_the_same(model, image, tmp_path):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = timm.create_model(
        model.pretrained_cfg["architecture"], checkpoint_path=str(tmp_path / "model.safetensors")
    ).eval()
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    assert torch.equal(model(image), other(image))


@torch.no_grad()
def test_hub_folder_round_trip(model, image, tmp_path):
    timm.models.save_for_hf(model, tmp_path)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(image), model(image))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_close(model, image, dtype):
    expected = model(image)
    with torch.autocast("cpu", dtype):
        out = model(image)
    assert out.isfinite().all()
    assert torch.cosine_similarity(out.float(), expected).min() > 0.999


@torch.no_grad()
def test_attended_under_autocast_is_close(model, image):
    if not hasattr(model, "attended"):
        pytest.skip("nothing to tell")
    expected = model.attended(image)
    with torch.autocast("cpu", torch.bfloat16):
        told = model.attended(image)
    for name, found in told.items():
        for key, value in found.items():
            if value.is_floating_point():
                assert relative_error(value, expected[name][key]) <= 0.05, (name, key)


@torch.no_grad()
def test_synchronised_batch_norm_is_the_same_model(model, image):
    """Converted by PyTorch, which keeps nothing of a norm but its parameters."""
    expected = model(image)
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert relative_error(converted(image), expected) <= SAME_MODEL


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_other_ways_to_run_it(model, image):
    """A trace is for images of one size, any number of them."""
    images = (image[:1], image, torch.randn(3, *SIZE[1:]))
    expected = [model(x) for x in images]
    ways = {
        "trace": torch.jit.trace(model, image, check_trace=False),
        "fx": torch.fx.symbolic_trace(model),
        "copy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "functional": lambda x: torch.func.functional_call(model, dict(model.named_parameters()), (x,)),
    }
    for name, run in ways.items():
        for x, out in zip(images, expected, strict=True):
            assert relative_error(run(x), out) <= SAME_MODEL, name


def test_gradients_by_transforms_are_those_of_backward(model, image):

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (image[:1],)).square().mean()

    grads = torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})
    model(image[:1]).square().mean().backward()
    got = torch.cat([grad.flatten() for grad in grads.values()])
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert relative_error(got, expected) <= 10 * SAME_MODEL


@torch.no_grad()
def test_no_images(model):
    assert model(torch.zeros(0, *SIZE[1:])).shape == (0, 1000)


@torch.no_grad()
def test_compile_without_graph_breaks(model, image):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(image), model(image)) <= SAME_MODEL


def test_compiled_model_trains(model, image):
    grads = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(image).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative_error(grads[1], grads[0]) <= 10 * SAME_MODEL


@torch.no_grad()
def test_export_with_dynamic_batch_and_size(model):
    batch = torch.export.Dim("batch", min=1)
    least = LEAST.get(model.pretrained_cfg["architecture"], 35)
    height, width = (torch.export.Dim(n, min=least, max=1024) for n in ("height", "width"))
    program = torch.export.export(
        model, (torch.randn(3, 3, 160, 192),), dynamic_shapes={"x": {0: batch, 2: height, 3: width}}
    )
    for size in ((1, 3, least, least + 5), (2, 3, 97, 131), (4, 3, 256, 160)):
        image = torch.randn(size)
        assert relative_error(program.module()(image), model(image)) <= SAME_MODEL


@torch.no_grad()
def test_export_of_a_known_size_needs_no_visattn(model, image):
    program = torch.export.export(model, (image,)).run_decompositions()
    assert not [n for n in program.graph.nodes if "visattn" in str(n.target)]
    assert relative_error(program.module()(image), model(image)) <= SAME_MODEL


@torch.no_grad()
def test_export_with_a_dynamic_batch_needs_no_visattn(model, image):
    shapes = {"x": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(model, (image,), dynamic_shapes=shapes)
    assert not [n for n in program.graph.nodes if "visattn" in str(n.target)]
    for x in (image[:1], torch.randn(3, *SIZE[1:])):
        assert relative_error(program.module()(x), model(x)) <= SAME_MODEL


@torch.no_grad()
def test_output_formats_agree(model, image):
    nchw, nhwc, nlc = (
        model.forward_intermediates(image, intermediates_only=True, output_fmt=f) for f in ("NCHW", "NHWC", "NLC")
    )
    for a, b, c in zip(nchw, nhwc, nlc, strict=True):
        assert torch.equal(a, b.permute(0, 3, 1, 2))
        assert torch.equal(b.flatten(1, 2), c)
    with pytest.raises(ValueError, match="expected output_fmt"):
        model.forward_intermediates(image, output_fmt="NHCW")


@torch.no_grad()
@pytest.mark.parametrize("feature_cls", ["getter", "list", "hook", "dict"])
def test_features_are_the_intermediates(model, image, feature_cls):
    name = model.pretrained_cfg["architecture"]
    tokens = any(key.endswith("cls_token") and "head" not in key for key in model.state_dict())
    if feature_cls != "getter" and (tokens or name == "test_overlock"):
        pytest.skip("no chain of modules that return maps")
    number = len(model.feature_info)
    features = timm.create_model(
        name, features_only=True, feature_cls=feature_cls, out_indices=tuple(range(number))
    ).eval()
    state = model.state_dict()
    target = features.model if feature_cls == "getter" else features
    renamed = {k.replace("stages.", "stages_", 1) if feature_cls != "getter" else k: v for k, v in state.items()}
    target.load_state_dict({k: v for k, v in renamed.items() if k in target.state_dict()})
    maps = features(image)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    expected = model.forward_intermediates(image, intermediates_only=True)
    for got, want in zip(maps, expected, strict=True):
        got = got if got.shape == want.shape else got.permute(0, 3, 1, 2)
        assert torch.equal(got, want)


def test_init_after_to_empty(model):
    name = model.pretrained_cfg["architecture"]
    empty = timm.create_model(name, device="meta", dtype=torch.float64).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.fill_(float("nan"))
    empty.init_weights()
    assert empty(torch.randn(2, 3, 64, 64, dtype=torch.float64)).isfinite().all()


def test_weight_decay_spares_position_tables_and_layers_have_their_rates(model):
    optimizer = create_optimizer_v2(model, weight_decay=0.1, layer_decay=0.5)
    named = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = named[id(parameter)]
            positions = name.endswith("pos_embed") and not isinstance(model, PVT)
            spared = parameter.ndim <= 1 or name.endswith(NOT_DECAYED) or positions
            assert (group["weight_decay"] == 0) == spared, name
            if name.startswith("head."):
                assert group["lr_scale"] == 1
            if name.startswith("patch_embed."):
                assert group["lr_scale"] == min(g["lr_scale"] for g in optimizer.param_groups)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", OURS)
def test_every_variant_runs_on_a_ragged_image(name):
    if sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) > 1e9:
        pytest.skip("more memory than a small machine has")
    model = timm.create_model(name, features_only=True).eval()
    assert all(feature.isfinite().all() for feature in model(torch.randn(1, 3, 97, 131)))


# The others take half a minute each.
QUICK = (
    "biformer",
    "coatnet_va",
    "convit_va",
    "deit_va",
    "dinat",
    "halonet_va",
    "maxvit_va",
    "pvt",
    "resnest_va",
    "efficient_cswin",
)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n.removeprefix("test_") not in QUICK)) for n in SMALL]
)
def test_export_with_a_dynamic_height_and_width_decomposes_to_pytorch(name):
    """timm's coatnet: 'Guard failed: 49 == x.size()[3]*x.size()[2]'; halonet: not within minutes."""
    model, least = timm.create_model(name).eval().requires_grad_(False), LEAST.get(name, 33)
    sizes = {i: torch.export.Dim(n, min=m, max=2048) for i, n, m in ((0, "b", 1), (2, "h", least), (3, "w", least))}
    program = torch.export.export(model, (torch.randn(2, 3, 160, 192),), dynamic_shapes={"x": sizes})
    plain = decompose(program)
    assert not [node for node in plain.graph.nodes if "visattn" in str(node.target)]
    for run in (program.module(), plain.module()):
        for size in ((1, 3, least, least + 14), (2, 3, 97, 131), (1, 3, 256, 64), (3, 3, 224, 160), (2, 3, 64, 64)):
            image = torch.randn(size)
            assert relative_error(run(image), model(image)) <= SAME_MODEL
