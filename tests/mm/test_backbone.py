"""The adapter: maps of every model, official layouts of weights, norms, freezing, and what it refuses."""

import os
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

import visattn
from tests.golden import fill
from tests.models import golden as goldens
from tests.models.cases import DENSE_PVT, DENSE_SWIN
from tests.models.golden import load, official_weights
from tests.tolerances import MODEL_GOLDEN, relative_error
from visattn.mm import TimmBackbone
from visattn.weights import WeightsError

# The first of every family and its test models in every run, all others in the slow one.
QUICK = {name for family in visattn.models.FAMILIES for name in visattn.list_models(family=family)[:1]}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK or name.startswith("test_") else pytest.mark.slow)
        for name in visattn.list_models()
    ],
)
def test_four_maps_of_a_detectors_image(name):
    with torch.device("meta"):
        backbone = MODELS.build({"type": "visattn.TimmBackbone", "model_name": name}).eval()
        maps = backbone(torch.empty(1, 3, 800, 1216))
    info = timm.create_model(name, device="meta").feature_info[-4:]
    assert [m.shape[1] for m in maps] == backbone.out_channels == [level["num_chs"] for level in info]
    assert backbone.out_strides == [level["reduction"] for level in info]
    assert [tuple(m.shape[2:]) for m in maps] == [(-(-800 // s), -(-1216 // s)) for s in backbone.out_strides]


@torch.no_grad()
@pytest.mark.parametrize(
    ("golden", "name", "options"),
    [
        ("agent_pvt_t_dense", "agent_pvt_tiny", DENSE_PVT),
        ("agent_swin_t_dense", "agent_swin_tiny", DENSE_SWIN),
        ("overlock_xt_det", "overlock_xt", {"out_norm": "detection"}),
        ("transnext_tiny_dense_extrap", "transnext_tiny", {"out_norm": "own"}),
    ],
)
def test_dense_goldens(golden, name, options):
    """The official backbones' maps, with the weights as a detector's file has them."""
    golden = load(golden)
    detector = nn.Module()
    detector.backbone = TimmBackbone(name, **options).eval()
    detector.neck = nn.Linear(1, 1)
    weights = {f"backbone.{key}": value for key, value in official_weights(golden).items()}
    detector.load_state_dict({**weights, "neck.weight": torch.ones(1, 1), "neck.bias": torch.ones(1)})
    assert len(goldens.cases(golden)) >= 2
    for case in goldens.cases(golden):
        goldens.check_case(detector.backbone, case, goldens.extracted)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("biformer_tiny", "extra_norms."),
        ("nat_mini", "norm"),
        ("dinat_mini", "norm"),
        ("dinat_s_tiny", "norm"),
    ],
)
def test_official_detectors_load(name, norm):
    """Keys of the official backbones for dense tasks: those of the classifier without head, and norms per output."""
    options = {"dilations": "detection"} if name.startswith("dinat") else {}
    detector = nn.Module()
    detector.backbone = TimmBackbone(name, out_norm="layer", **options)
    weights = official_weights(load(name)).items()
    weights = {key: value for key, value in weights if not key.startswith(("head.", "norm."))}
    for i, channels in enumerate(detector.backbone.out_channels):
        weights |= {f"{norm}{i}.{leaf}": torch.full((channels,), i + 0.5) for leaf in ("weight", "bias")}
    detector.load_state_dict({f"backbone.{key}": value for key, value in weights.items()})  # strict
    for i, layer in enumerate(detector.backbone.model.out_norms):
        assert layer.weight.eq(i + 0.5).all()
        assert layer.bias.eq(i + 0.5).all()
    state = detector.backbone.state_dict()
    again = TimmBackbone(name, out_norm="layer", **options)
    again.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


def test_checkpoints_of_earlier_versions_load():
    """Of this class, as mmengine loads them; their stems' layers were `patch_embed.proj.0` and so on."""
    detector = nn.Module()
    detector.backbone = TimmBackbone("test_biformer")
    state = {key: value + 1 for key, value in detector.state_dict().items()}
    load_state_dict(detector, {key.replace(".conv.", ".proj."): value for key, value in state.items()}, strict=True)
    assert all(torch.equal(value, state[key]) for key, value in detector.state_dict().items())


def files_of_weights(folder, model):
    """The model's state dict as the files that people have: {kind: path}."""
    state = model.state_dict()
    safetensors.torch.save_file(state, folder / "model.safetensors")
    torch.save({"model": state, "epoch": 3}, folder / "classifier.pth")
    for name, prefix in (("detector.pth", "backbone."), ("own_detector.pth", "backbone.model.")):
        detector = {f"{prefix}{key}": value for key, value in state.items()} | {"neck.weight": torch.ones(2)}
        torch.save({"meta": {"CLASSES": ("cell",)}, "state_dict": detector}, folder / name)
    return sorted(folder.iterdir())


# one of every family, and two of timm's
FAMILIES = [
    "test_biformer", "test_dinat", "test_transnext", "test_maxvit_va", "test_coatnet_va", "test_halonet_va",
    "test_overlock", "test_resnest_va", "test_resnet_ea", "test_agent_deit", "test_convit_va", "test_inline_pvt",
    "test_agent_swin", "test_efficient_cswin", "test_dinat_isotropic", "test_shiftvit", "test_patchconvnet",
    "test_l2vit", "test_flowformer", "resnet10t", "test_vit",
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_checkpoints_give_the_models_maps(tmp_path, name):
    """Weights of the classifier, in every kind of file; fewer levels; output norms are new."""
    options = {"dynamic_img_size": True, "dynamic_img_pad": True} if name == "test_vit" else {}
    model = timm.create_model(name, **options).eval()
    shapes = {k: v.shape for k, v in model.state_dict().items() if v.is_floating_point()}
    model.load_state_dict(fill.fill(shapes), strict=False)
    image = torch.randn(2, 3, 97, 131)
    kept = list(range(len(model.feature_info)))[-3:-1]
    expected = model.forward_intermediates(image, indices=kept, intermediates_only=True)
    for path in files_of_weights(tmp_path, model):
        for out_norm in (None, "layer"):
            backbone = TimmBackbone(name, kept, out_norm, checkpoint=str(path), **options).eval()
            backbone.init_weights()
            assert backbone.out_indices == tuple(kept)
            maps = backbone(image)
            for got, want in zip(maps, expected, strict=True):
                if out_norm:
                    want = nn.functional.layer_norm(want.movedim(1, -1), want.shape[1:2]).movedim(-1, 1)
                assert relative_error(got, want) <= MODEL_GOLDEN
        names = [key for key, _ in backbone.named_parameters() if "norms." in key]
        assert len(names) == 4  # two norms
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_every_parameter_is_used():
    """Else a DistributedDataParallel run would stop."""
    for name in FAMILIES:
        for out_norm in (None, "own"):
            backbone = TimmBackbone(name, out_norm=out_norm).train()
            sum(m.square().sum() for m in backbone(torch.randn(2, 3, 160, 160))).backward()
            unused = [key for key, parameter in backbone.named_parameters() if parameter.grad is None]
            assert not unused or name in ("test_vit", "test_agent_deit"), (name, unused)


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {k: v for k, v in state.items() if not k.startswith("stages.1.")}, "lacks .*stages.1"),
        (lambda state: {**state, "stages.9.weight": torch.ones(1)}, "adds .*stages.9"),
        (lambda state: {**state, "patch_embed.conv.0.weight": torch.ones(1)}, "size mismatch"),
        (lambda state: {"weight": torch.ones(1)}, "lacks"),
        (lambda state: {**state, "norm.weight": state["norm.weight"].long()}, "norm.weight of int64 in place of"),
        (lambda state: {**state, "norm.weight": state["norm.weight"] > 0}, "norm.weight of bool in place of"),
        (lambda state: {k: v for k, v in state.items() if k != "norm.weight"}, "lacks .*norm.weight"),
    ],
)
def test_weights_of_another_model_are_refused_as_a_whole(tmp_path, kind, change, message):
    weights = change({key: value + 1 for key, value in timm.create_model("test_dinat").state_dict().items()})
    path = tmp_path / f"model.{kind}"
    (safetensors.torch.save_file if kind == "safetensors" else torch.save)(weights, path)
    backbone = TimmBackbone("test_dinat", out_norm="own", checkpoint=str(path))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(WeightsError, match=f"(?s)expected weights of test_dinat, got .*{message}"):
        backbone.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["test_dinat", "resnet10t"])
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("kind", ["shape", "integers", "unknown"])
def test_a_detectors_weights_change_its_backbone_only_if_they_fit(name, official, kind):
    """However they are loaded; unknown keys of our own layout are for `strict`, which is torch's and mmengine's."""
    detector = nn.Module()
    detector.backbone = TimmBackbone(name)
    before = {key: value.clone() for key, value in detector.backbone.state_dict().items()}
    weights = {key.removeprefix("model.") if official else key: value + 1 for key, value in before.items()}
    key = list(weights)[-2]
    weights |= {
        "shape": {key: torch.ones(1)},
        "integers": {key: weights[key].long()},
        "unknown": {("" if official else "model.") + "one_more": torch.ones(1)},
    }[kind]
    prefixed = {f"backbone.{key}": value for key, value in weights.items()}
    loaders = [lambda: detector.backbone.load_state_dict(weights)]
    if official or kind != "unknown":
        loaders += [lambda: detector.load_state_dict(prefixed), lambda: load_state_dict(detector, prefixed)]
    for attempt in loaders:
        with pytest.raises(WeightsError, match=r"expected weights of .*, got .*; try"):
            attempt()
        assert all(torch.equal(value, before[key]) for key, value in detector.backbone.state_dict().items())


@pytest.mark.parametrize("content", [[1], 3, {}, {"state_dict": 3}, {"state_dict": {"a": 1}}, {"model": {}}])
def test_checkpoints_without_a_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="expected a state dict"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "w.pth"), "cpu")


def test_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {"weight": torch.arange(6.0)}}, path)
    path.write_bytes(path.read_bytes().replace(torch.arange(6.0).numpy().tobytes(), bytes(24)))
    os.mkfifo(tmp_path / "pipe.pth")
    for name in ("w.pth", "pipe.pth"):
        for attempt in (
            lambda path: CheckpointLoader.load_checkpoint(path, "cpu"),
            lambda path: TimmBackbone("test_dinat", checkpoint=path).init_weights(),
        ):
            with pytest.raises(WeightsError, match=r"checksum|got a pipe"):
                attempt(str(tmp_path / name))


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "model.bin"])
def test_a_malicious_checkpoint_is_refused(tmp_path, name):
    canary = tmp_path / "canary"
    torch.save({"state_dict": {"backbone.norm.weight": Touch(canary)}}, tmp_path / name)
    backbone = TimmBackbone("test_dinat", checkpoint=str(tmp_path / name))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(WeightsError, match=r"expected plain tensors at .*, got a damaged or unsafe file .*; try"):
        backbone.init_weights()
    with pytest.raises(WeightsError, match=r"expected a plain checkpoint at .*, got a damaged or unsafe file .*; try"):
        CheckpointLoader.load_checkpoint(str(tmp_path / name), "cpu")
    assert not canary.exists()
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    if not name.endswith(".safetensors"):
        torch.load(tmp_path / name, weights_only=False)  # the file would have done it
        assert canary.exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(WeightsError, match="got no file"):
        TimmBackbone("test_dinat", checkpoint=str(tmp_path / "nothing.pth")).init_weights()
    with pytest.raises(WeightsError, match="got no file"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "nothing.pth"), "cpu")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model_name": "biformer_tinny"}, ValueError, "expected a model of visattn or timm, got 'biformer_tinny'"),
        ({"out_indices": (0, 4)}, ValueError, "growing numbers from 0 to 3, got .0, 4."),
        ({"out_indices": (1, 0)}, ValueError, "growing numbers"),
        ({"out_indices": ()}, ValueError, "growing numbers"),
        ({"out_norm": "group"}, ValueError, "expected out_norm None or one of"),
        ({"model_name": "resnet10t", "out_norm": "group"}, ValueError, "expected out_norm None, 'own' or one of"),
        ({"init_cfg": {"type": "Pretrained"}}, TypeError, "try checkpoint=FILE"),
        ({"dilation": 3}, TypeError, "dilation"),
    ],
)
def test_mistakes_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        TimmBackbone(**{"model_name": "test_dinat", **options})


@pytest.mark.parametrize("name", ["test_dinat", "test_biformer", "test_resnest_va", "resnet10t"])
@pytest.mark.parametrize("frozen", [-1, 0, 2, 4])
def test_frozen_stages_do_not_change(name, frozen):
    backbone = TimmBackbone(name, frozen_stages=frozen, out_norm="layer", drop_path_rate=0.5).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], 1.0)
    sum(m.square().sum() for m in backbone(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    changed = {key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    stages = ["layer1", "layer2", "layer3", "layer4"] if name == "resnet10t" else [f"stages.{i}" for i in range(4)]
    for i, stage in enumerate(stages):
        keys = {key for key in changed if key.startswith(f"model.{stage}.")}
        assert bool(keys) == (i + 1 > frozen), stage
    stem = [key for key in changed if key.startswith(("model.patch_embed", "model.conv1", "model.bn1"))]
    assert bool(stem) == (frozen < 0)
    assert any("norms." in key for key in changed)


def test_a_frozen_stem_includes_tokens_and_positions():
    backbone = TimmBackbone("test_agent_deit", frozen_stages=0)
    fixed = {key.split(".")[1] for key, p in backbone.named_parameters() if not p.requires_grad}
    assert fixed == {"cls_token", "pos_embed", "patch_embed"}


def test_norm_eval_keeps_the_statistics():
    for norm_eval in (True, False):
        backbone = TimmBackbone("test_biformer", norm_eval=norm_eval).train()
        before = {key: value.clone() for key, value in backbone.named_buffers() if "running" in key}
        assert before
        backbone(torch.randn(2, 3, 64, 64))
        same = [torch.equal(dict(backbone.named_buffers())[key], value) for key, value in before.items()]
        assert all(same) if norm_eval else not any(same)


def test_activation_checkpointing_changes_nothing():
    image = torch.randn(2, 3, 64, 96)
    results = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        backbone = TimmBackbone("test_dinat", with_cp=with_cp).train()
        assert {stage.grad_checkpointing for stage in backbone.model.stages} == {with_cp}
        loss = sum(m.square().sum() for m in backbone(image))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in backbone.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_a_detector_initialises_its_backbone_once(tmp_path):
    """mmengine calls init_weights of everything: the backbone's is its checkpoint, not a new start."""
    model = timm.create_model("test_dinat")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    detector = BaseModule()
    detector.backbone = TimmBackbone("test_dinat", checkpoint=str(tmp_path / "model.safetensors"))
    detector.init_weights()
    state = model.state_dict()
    for key, value in detector.backbone.model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_published_weights_that_cannot_be_had_are_one_line():
    backbone = TimmBackbone("test_dinat", pretrained=True)
    with pytest.raises(WeightsError, match=r"expected the published weights of test_dinat, got no address of any; try"):
        backbone.init_weights()


def test_a_file_stands_in_for_published_weights(tmp_path):
    model = timm.create_model("test_dinat")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "own.safetensors")
    overlay = {"file": str(tmp_path / "own.safetensors")}
    backbone = TimmBackbone("test_dinat", pretrained=True, pretrained_cfg_overlay=overlay)
    backbone.init_weights()
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in backbone.model.state_dict().items())
