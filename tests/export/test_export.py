"""Files of other runtimes compute what the models do, or do not appear."""

import itertools
import re

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import visattn
from visattn.cli import main
from visattn.export import TARGETS, ExportError, export, load
from visattn.export.program import least_size
from visattn.ops.dispatch import BackendError

SMALL = visattn.list_models("test_*")
# one of each family
REAL = (
    "biformer_tiny", "coatnet_nano_rw_va", "convit_tiny_va", "agent_cswin_tiny", "inline_deit_tiny",
    "flowformer_small", "halonet26t_va", "l2vit_tiny", "maxvit_tiny_va", "dinat_mini", "dinat_isotropic_small",
    "overlock_xt", "patchconvnet_s60", "focused_pvt_tiny", "resnest14_va", "resnet50_ea", "shiftvit_light_tiny",
    "efficient_swin_tiny", "transnext_micro",
)  # fmt: skip
SIDES = ["height", "width"]
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
        ({"tolerance": -1.0}, ValueError, "expected tolerance >= 0, got -1.0"),
        ({"tolerance": float("nan")}, ValueError, "expected tolerance >= 0, got nan"),
        ({"image_size": (3, 64, 64)}, ValueError, "expected image_size of one int or 2 .*, got"),
        ({"image_size": ()}, ValueError, "expected image_size of one int or 2"),
        ({"image_size": 64.0}, ValueError, "expected image_size of one int or 2"),
        ({"batch_size": 0, "dynamic": "none"}, ValueError, "expected batch_size >= 1, got 0"),
        ({"batch_size": 2.0, "dynamic": "none"}, ValueError, "expected batch_size of one int, got 2.0"),
        ({"batch_size": 4}, ValueError, "expected batch_size with dynamic='none' only, got 4 for dynamic='batch'"),
        ({"opset": 18}, ValueError, "expected an opset with target 'onnx' or 'openvino' only, got 18 for 'pt2'"),
        ({"labels": "label.txt!"}, TypeError, "expected labels as a list of strings, got 'label.txt!'"),
        ({"labels": range(1000)}, TypeError, "expected labels as a list of strings"),
        ({"labels": []}, ValueError, "expected 1000 labels, one per class, got 0"),
    ],
)
def test_bad_input(changes, error, message, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # nothing is missing
    arguments = {"path": "m.pt2", "image_size": 64} | changes
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(error, match=message):
        export(timm.create_model("test_dinat"), **arguments)
    assert not list(tmp_path.iterdir())


def test_model_without_weights_and_things_that_are_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"expected weights, got a model on the meta device; try"):
        export(timm.create_model("test_deit_va", device="meta"), tmp_path / "m.pt2")
    for wrong in "test_deit_va", timm.create_model("test_deit_va").state_dict():
        with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got (str|OrderedDict); try"):
            export(wrong, tmp_path / "m.pt2")


def test_places_where_no_file_can_be(tmp_path):
    model = Cropped()
    (tmp_path / "m.pt2").mkdir()
    with pytest.raises(ValueError, match=r"expected a file to write, got the folder .*m.pt2; try"):
        export(model, tmp_path / "m.pt2")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"expected a folder to write m.pt2 in, got .*file \(Not a dir.*; try"):
        export(model, tmp_path / "file" / "m.pt2")
    assert not list((tmp_path / "m.pt2").iterdir())


def test_other_files_are_refused(tmp_path):
    (tmp_path / "m.pt2").write_text("not a program")
    with pytest.raises(ExportError, match=r"expected a file of `visattn.export.export`, got .*m.pt2"):
        load(tmp_path / "m.pt2")
    torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(2),)), tmp_path / "m.pt2")
    with pytest.raises(ExportError, match=r"expected a file of `visattn.export.export`, got .*m.pt2"):
        load(tmp_path / "m.pt2")


@torch.no_grad()
@pytest.mark.parametrize("target", ["onnx", "openvino", "pt2", "aoti", "executorch"])
def test_images_in_memory_of_another_order(target, tmp_path):
    for package in TARGETS[target].packages:
        pytest.importorskip(package)
    export(Cropped(), tmp_path / f"m{TARGETS[target].suffix}", dynamic="none", image_size=40)
    run, image = load(tmp_path / f"m{TARGETS[target].suffix}"), torch.randn(1, 40, 80, 3)[:, :, ::2].permute(0, 3, 1, 2)
    torch.testing.assert_close(run(image.requires_grad_()), [image[..., 1:, :-2], image.mean((2, 3))])
    for wrong in image.double(), image[0], image[:, :2], image[..., :39], image.repeat(2, 1, 1, 1):
        with pytest.raises(ValueError, match=r"expected images of torch.float32 \[1, 3, 40, 40\], got torch.float"):
            run(wrong)


def test_the_file_tells_its_shape(tmp_path):
    for dynamic, shape in ("none", [1, 3, 64, 96]), ("batch", ["batch", 3, 64, 96]), ("size", ["batch", 3, *SIDES]):
        export(timm.create_model("test_deit_va"), tmp_path / "m.pt2", dynamic=dynamic, image_size=(64, 96))
        run = load(tmp_path / "m.pt2")
        assert run.metadata["shape"] == shape
        assert run.metadata["input_size"] == [3, 64, 96]
    with pytest.raises(ValueError, match=r"expected images of .* with sides of 32 to 2048 px, got .* \[1, 3, 31, 64\]"):
        run(torch.randn(1, 3, 31, 64))


def test_an_opset_that_cannot_be_had_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(ExportError, match=r"expected an opset that PyTorch's exporter converts to, got 7; try"):
        export(timm.create_model("test_dinat"), tmp_path / "m.onnx", image_size=64, opset=7)


@pytest.mark.parametrize("features_only", [False, True])
def test_channels_are_those_that_the_model_was_made_with(features_only, tmp_path):
    model = timm.create_model("test_deit_va", in_chans=4, features_only=features_only)
    found = export(model, tmp_path / "m.pt2", dynamic="none", image_size=64)
    assert [*found.errors] == [(1, 4, 64, 64)]


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, AveragedModel, lambda m: torch.compile(nn.DataParallel(m)), lambda m: Variadic()]
)
def test_wrappers_are_refused(wrap, tmp_path):
    with pytest.raises(TypeError, match=r"whose forward takes images, got a wrapper, \w+; try model.module"):
        export(wrap(timm.create_model("test_deit_va")), tmp_path / "m.pt2", image_size=64)


class Variadic(nn.Module):
    """With the signature of `DistributedDataParallel`."""

    def forward(self, *inputs, **kwargs):
        return inputs[0]


def test_models_that_cannot_be_copied_are_refused(tmp_path):
    model = torch.jit.trace(Cropped(), torch.ones(1, 3, 8, 8), strict=False)
    with pytest.raises(TypeError, match=r"expected a model to copy, got TopLevelTracedModule \(.*\); try a new model"):
        export(model, tmp_path / "m.pt2")


def test_a_file_of_something_else_is_kept(tmp_path):
    pytest.importorskip("openvino")
    (tmp_path / "m.bin").write_text("weights of another program")
    with pytest.raises(ValueError, match=r"expected no .*m.bin, which belongs to another file, got one; try"):
        export(Cropped(), tmp_path / "m.xml", image_size=40)
    assert (tmp_path / "m.bin").read_text() == "weights of another program"
    for _ in range(2):
        export(Cropped(), tmp_path / "of_ours.xml", image_size=40)


def test_compiled_models_are_exported_as_they_were(tmp_path):
    export(torch.compile(timm.create_model("test_deit_va")), tmp_path / "m.pt2", image_size=64)


def test_labels_of_another_classifier_are_left_out(tmp_path):
    model = timm.create_model("test_deit_va", num_classes=2)
    model.pretrained_cfg["label_names"] = ["cat", "dog", "cow"]
    export(model, tmp_path / "m.pt2", image_size=64)
    assert load(tmp_path / "m.pt2").metadata["labels"] == []
    export(Cropped(), tmp_path / "m.pt2", image_size=64, labels=("cat", "dog", "cow"))
    assert load(tmp_path / "m.pt2").metadata["labels"] == ["cat", "dog", "cow"]


def test_results_of_zeros_and_of_nan(tmp_path):
    model = timm.create_model("test_deit_va")
    nn.init.zeros_(model.get_classifier().weight)
    nn.init.zeros_(model.get_classifier().bias)
    export(model, tmp_path / "m.pt2", image_size=64)
    with pytest.raises(ExportError, match=r"got nan for an image \[2, 3, 64, 64\]"):
        export(NaNOfTwo(), tmp_path / "m.pt2", image_size=64)


class NaNOfTwo(nn.Module):
    """NaN for a batch of two alone."""

    def forward(self, x):
        ones = torch.ones_like(x[:, 0, 0, 0])
        return ones + 0 / (ones.sum() - 2)


def test_sizes_of_models_that_refuse_by_assertions():
    assert least_size(timm.create_model("vit_tiny_patch16_224"), 3) == 224


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
    for name in "m.pt2", "new/m.pt2":
        with pytest.raises(ExportError, match=r"within 1e-05 of PyTorch's, got 1.0e.* try a larger tolerance"):
            export(timm.create_model("test_dinat"), tmp_path / name, dynamic="none", image_size=64)
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
    assert main(["export", "test_deit_va", file, "--image-size", "64", "--model-args", "drop_path_rate=0.1"]) == 0
    said = capsys.readouterr()
    assert f"{file}: pt2" in said.out
    assert "random weights" in said.err
    (tmp_path / "labels.txt").touch()
    (tmp_path / "latin.txt").write_bytes("ü".encode("latin-1"))
    for wrong in (
        ["nothing", file],
        ["test_deit_va", file, "--image-size", "3", "64", "64"],
        ["test_deit_va", file, "--model-args", "drop_path_rate"],
        *(["test_deit_va", file, "--labels", str(path)] for path in tmp_path.glob("*.txt")),
    ):
        assert main(["export", *wrong]) == 2
        assert re.search("error: .*expected .* got", capsys.readouterr().err)
    (tmp_path / "w.safetensors").touch()
    assert main(["export", "resnet10t", file, "--weights", str(tmp_path / "w.safetensors")]) == 2
    assert "error: expected plain tensors at" in capsys.readouterr().err


def test_labels_with_the_mark_of_windows(tmp_path):
    (tmp_path / "labels.txt").write_text("Kühe\r\n漢字\r\n", encoding="utf-8-sig", newline="")
    arguments = ["--image-size", "64", "--model-args", "num_classes=2", "--labels", str(tmp_path / "labels.txt")]
    assert main(["export", "test_deit_va", str(tmp_path / "m.pt2"), *arguments]) == 0
    assert load(tmp_path / "m.pt2").metadata["labels"] == ["Kühe", "漢字"]


def test_size_is_what_the_model_was_made_for(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=(64, 96))
    assert [*export(model, tmp_path / "m.pt2", dynamic="none").errors] == [(1, 3, 64, 96)]
