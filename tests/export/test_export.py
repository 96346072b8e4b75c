"""Files of other runtimes compute what the models do, or do not appear."""

import itertools

import pytest
import timm
import torch
from torch import nn

import visattn
from visattn.cli import main
from visattn.export import TARGETS, ExportError, export, load
from visattn.export.program import least_size
from visattn.ops.dispatch import BackendError

SMALL = visattn.list_models("test_*")
REAL = (
    "biformer_tiny",
    "coatnet_nano_rw_va",
    "agent_cswin_tiny",
    "inline_deit_tiny",
    "halonet26t_va",
    "maxvit_tiny_va",
)
REAL += (
    "dinat_mini",
    "dinat_isotropic_small",
    "focused_pvt_tiny",
    "resnest14_va",
    "resnet50_ea",
    "efficient_swin_tiny",
)
REAL += ("transnext_micro",)  # with the others, one of each family
SIZES = ((224, 224), (256, 192), (100, 132))  # the last fits neither windows nor regions nor strides
QUICK = [(name, "none", (100, 132)) for name in ("test_biformer", "test_focused_swin", "test_maxvit_va")]
QUICK += [(name, "batch", (100, 132)) for name in ("test_inline_pvt", "test_halonet_va", "test_cswin")]
QUICK += [("test_pvt", "size", (160, 192))]
CELLS = [
    *itertools.product((*SMALL, *REAL), ("none", "batch"), SIZES),
    *itertools.product(SMALL, ("size",), [(160, 192)]),
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "dynamic", "size"),
    [
        pytest.param(
            *cell, marks=[pytest.mark.slow] * (cell not in QUICK), id="{}-{}-{}x{}".format(*cell[:2], *cell[2])
        )
        for cell in CELLS
    ],
)
def test_onnx(name, dynamic, size, tmp_path):
    pytest.importorskip("onnxruntime")
    found = export(timm.create_model(name), tmp_path / "model.onnx", dynamic=dynamic, image_size=size)
    assert len(found.errors) == {"none": 1, "batch": 3, "size": 5}[dynamic]
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    print(found)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["dinat", "maxvit_va", "biformer", "deit_va", "resnest_va", "pvt", "coatnet_va"])
def test_one_onnx_file_for_every_size(name, tmp_path):
    pytest.importorskip("onnxruntime")
    model = timm.create_model(f"test_{name}").eval()
    export(model, tmp_path / "model.onnx", dynamic="size", image_size=(160, 192))
    run = load(tmp_path / "model.onnx")
    for size in ((33, 47), (64, 64), (97, 131), (160, 192), (224, 224), (256, 192), (300, 220), (512, 512)):
        image = torch.randn(1, 3, *size)
        torch.testing.assert_close(run(image)[0], model(image), rtol=1e-4, atol=1e-5)


class Cropped(nn.Module):
    """A model of the user's own, with two outputs."""

    def forward(self, x):
        return {"map": x[..., 1:, :-2], "mean": x.mean((2, 3))}


def test_any_module_with_metadata(tmp_path):
    export(Cropped(), tmp_path / "new" / "m.pt2", image_size=40, labels=None)
    run, image = load(tmp_path / "new" / "m.pt2"), torch.randn(5, 3, 40, 40)
    torch.testing.assert_close(run(image), [image[..., 1:, :-2], image.mean((2, 3))])
    assert run.metadata["model"] == "Cropped"


@pytest.mark.parametrize("target", [t for t in TARGETS if t in ("onnx", "openvino", "pt2")])
def test_metadata_and_labels(target, tmp_path):
    for package in TARGETS[target].packages:
        pytest.importorskip(package)
    labels, file = [f"class {i}" for i in range(10)], tmp_path / f"m{TARGETS[target].suffix}"
    model = timm.create_model("test_deit_va", num_classes=10)
    export(model, file, dynamic="none", image_size=64, batch_size=2, labels=labels)
    kept = load(file).metadata
    assert kept["labels"] == labels
    assert kept["mean"] == list(model.pretrained_cfg["mean"])
    with pytest.raises(ValueError, match="expected 10 labels, one per class, got 3"):
        export(model, file, labels=labels[:3])


def test_features_and_training_mode(tmp_path):
    pytest.importorskip("onnxruntime")
    model = timm.create_model("test_resnest_va", features_only=True, drop_path_rate=0.5).train()
    export(model, tmp_path / "m.onnx", image_size=64)
    assert len(load(tmp_path / "m.onnx")(torch.randn(1, 3, 64, 64))) == len(model.feature_info)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "dynamic"), [("test_maxvit_va", "batch"), ("test_deit_va", "size"), ("test_pvt", "none")]
)
def test_aoti(name, dynamic, tmp_path):
    export(timm.create_model(name), tmp_path / "m.aoti.pt2", dynamic=dynamic, image_size=(100, 132))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["test_deit_va", "test_resnest_va", "test_swin_va", "test_dinat"])
def test_executorch(name, tmp_path):
    pytest.importorskip("executorch")
    found = export(timm.create_model(name), tmp_path / "m.pte", dynamic="none", image_size=(100, 132))
    assert found.said == "XNNPACK"


def test_least_size_has_two_rows_in_the_last_map():
    for name, least in ("test_dinat", 33), ("test_cswin", 35), ("test_deit_va", 32):
        assert least_size(timm.create_model(name), 3) == least


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"path": "m.xyz"}, ValueError, "expected a target of 'onnx'"),
        ({"target": "tensorrt"}, ValueError, "got 'tensorrt'"),
        ({"path": "m.onnx", "target": "pt2"}, ValueError, "expected a file .pt2"),
        ({"dynamic": "all"}, ValueError, "expected dynamic of 'none', 'batch', 'size', got 'all'"),
        ({"dynamic": "size", "image_size": 31}, ValueError, "expected sides of 33 to 2048 px, got 31x31"),
        ({"path": "m.pte"}, ValueError, "expected fixed sizes"),
        ({"tolerance": -1.0}, ExportError, "try a larger tolerance"),
    ],
)
def test_bad_input(changes, error, message, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # nothing is missing
    arguments = {"path": "m.pt2", "image_size": 64} | changes
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(error, match=message):
        export(timm.create_model("test_dinat"), **arguments)
    assert not list(tmp_path.iterdir())


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"openvino: expected .* try `pip install 'visattn\[export\]'`"):
        export(timm.create_model("test_dinat"), tmp_path / "m.xml")


def test_half_precision_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"expected parameters of torch.float32, got torch.bfloat16"):
        export(timm.create_model("test_dinat").bfloat16(), tmp_path / "m.pt2")


def test_wrong_file_does_not_appear(tmp_path, monkeypatch):
    """One that computes something else than the model."""
    monkeypatch.setattr("visattn.export.trace", lambda model, image, *_: torch.export.export(Off(model), (image,)))
    (tmp_path / "m.pt2").write_text("an older file")
    with pytest.raises(ExportError, match=r"expected results within 1e-05 of PyTorch's, got 1.0e"):
        export(timm.create_model("test_dinat"), tmp_path / "m.pt2", dynamic="none", image_size=64)
    assert (tmp_path / "m.pt2").read_text() == "an older file"
    assert len(list(tmp_path.iterdir())) == 1


class Off(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return 2 * self.model(x)


def test_reason_of_a_model_is_told(tmp_path):
    model = timm.create_model("test_dinat")
    model.forward = lambda x: (_ for _ in ()).throw(BackendError("expected a GPU, got none"))
    with pytest.raises(ExportError, match="expected a GPU, got none"):
        export(model, tmp_path / "m.pt2")


def test_command(tmp_path, capsys):
    file = str(tmp_path / "m.pt2")
    main(["export", "test_deit_va", file, "--image-size", "64", "--model-kwargs", "drop_path_rate=0.1"])
    said = capsys.readouterr()
    assert f"{file}: pt2" in said.out
    assert "random weights" in said.err
    with pytest.raises(SystemExit, match=r"visattn: Unknown model \(nothing\)"):
        main(["export", "nothing", file])
