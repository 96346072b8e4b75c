"""Runs from the command line, resumed, of two processes, and in lower precision."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner
from PIL import Image

from tests.mm.conftest import ROOT
from tests.mm.runs import losses, small_config


def tool(name, *args, torchrun=0):
    """Run a tool; returns what it printed."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"] if torchrun else []
    launch += [str(ROOT / "tests" / "ends.py")] if torchrun else []
    command = [sys.executable, *launch, str(ROOT / "tools" / f"{name}.py"), *map(str, args)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


class SameWeights(Hook):
    """Looks whether a run begins with these weights."""

    def __init__(self, weights):
        self.weights = weights

    def before_train(self, runner):
        for key, value in runner.model.state_dict().items():
            assert torch.equal(value, self.weights[key]), key


class FirstWeights(Hook):
    """Keeps what a run begins with."""

    def before_train(self, runner):
        self.weights = {key: value.clone() for key, value in runner.model.state_dict().items()}


def test_a_resumed_run_goes_on(nuclei, tmp_path):
    """From a file of plain values, with the optimizer, the schedule and the history."""
    warmup = {"param_scheduler": [{"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "begin": 0, "end": 10}]}
    first = Runner.from_cfg(small_config("semantic_fpn", "test_dinat", nuclei, tmp_path, 3, **warmup))
    first.train()
    saved = torch.load(tmp_path / "iter_3.pth", weights_only=True)
    assert torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "iter_3.pth") == []
    runner = Runner.from_cfg(small_config("semantic_fpn", "test_dinat", nuclei, tmp_path, 5, resume=True, **warmup))
    runner.register_hook(SameWeights(saved["state_dict"]))
    runner.train()
    assert runner.iter == 5
    assert losses(runner)[:3] == losses(first)
    assert len(losses(runner)) == 5
    assert isinstance(runner.message_hub.get_scalar("train/loss"), HistoryBuffer)
    steps = {int(state["step"]) for state in runner.optim_wrapper.optimizer.state.values()}
    assert steps == {5}
    lrs = runner.message_hub.get_scalar("train/lr").data[0]
    assert lrs[0] < lrs[2] < lrs[4]  # the warm-up goes on


def test_the_hook_refuses_what_it_cannot_make_plain(nuclei, tmp_path):
    runner = Runner.from_cfg(small_config("semantic_fpn", "test_dinat", nuclei, tmp_path, 1))
    runner.message_hub.update_info("mine", HistoryBuffer)
    with pytest.raises(TypeError, match=r"expected plain values in a checkpoint, got type at message_hub.*mine"):
        runner.train()


def test_commands_of_segmentation(nuclei, tmp_path):
    config = small_config("upernet", "test_dinat", nuclei, tmp_path / "run", 5, log_level="INFO")
    config.dump(tmp_path / "small.py")
    said = tool("train_seg", tmp_path / "small.py", "--log", "tensorboard", "--seed", 1)
    assert re.search(r"Iter\(train\) \[5/5\] .* loss: ", said)  # of fewer iterations than the hook's interval
    assert len(said.splitlines()) < 60
    [log] = (tmp_path / "run").glob("*/*.log")
    assert f"config, environment, hooks and parameters: {log}\n" in said
    for text in ("System environment", "Config:", "Hooks will be executed", "paramwise_options"):
        assert text not in said
        assert text in log.read_text()
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    said = tool("train_seg", tmp_path / "small.py", "--resume", "--cfg-options", "train_cfg.max_iters=6")
    assert "resumed epoch: 0, iter: 5" in said
    checkpoint = tmp_path / "run" / "iter_6.pth"
    said = tool("test_seg", tmp_path / "small.py", checkpoint, "--work-dir", tmp_path / "test")
    score = float(re.findall(r"mIoU: +([\d.]+)", said)[-1])
    config.load_from = str(checkpoint)
    assert Runner.from_cfg(config).test()["mIoU"] == pytest.approx(score, abs=0.01)
    assert score > 0
    picture, *_ = sorted((nuclei / "nuclei" / "val").glob("*.png"))
    assert "1 pictures below" in tool("predict_mm", tmp_path / "small.py", checkpoint, picture, "--out", tmp_path)
    assert (tmp_path / "vis" / picture.name).is_file()
    with Image.open(*(tmp_path / "pred").iterdir()) as numbers:
        assert {number for _, number in numbers.getcolors()} <= {0, 1}
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    words = (tmp_path / "small.py", tmp_path / "other.pth", picture, "--out", tmp_path)
    for meta in {}, {"dataset_meta": {"classes": ["a", "b"]}}:
        torch.save({"state_dict": weights, "meta": meta}, tmp_path / "other.pth")
        assert "1 pictures below" in tool("predict_mm", *words)
    weights["decode_head.conv_seg.weight"] = weights["decode_head.conv_seg.weight"].repeat(2, 1, 1, 1)
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(AssertionError, match=r"expected weights of .*with a size mismatch at decode_head\.conv_seg"):
        tool("predict_mm", *words)


def test_commands_of_detection(nuclei, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = small_config("mask_rcnn", "test_dinat", nuclei, tmp_path / "run", 2, log_level="INFO")
    config.dump(tmp_path / "small.py")
    assert "coco/segm_mAP" in tool("train_det", tmp_path / "small.py", "--amp", "bfloat16", "--log", "wandb")
    assert list((tmp_path / "run").rglob("run-*.wandb"))
    said = tool("test_det", tmp_path / "small.py", tmp_path / "run" / "iter_2.pth", "--show")
    assert "coco/segm_mAP" in said
    assert len(list((tmp_path / "run").rglob("vis_image/*.png"))) == 4
    folder = nuclei / "nuclei" / "val"
    for name in "ab":  # pictures of one name
        (tmp_path / name).mkdir()
        shutil.copy(sorted(folder.glob("*.png"))[0], tmp_path / name / "x.png")
    (tmp_path / "a" / "y.jpg").touch()
    words = (
        tmp_path / "small.py",
        tmp_path / "run" / "iter_2.pth",
        tmp_path / "a",
        tmp_path / "b",
        "--out",
        tmp_path / "p",
    )
    said = tool("predict_mm", *words)
    assert "unreadable: " in said
    assert "2 pictures below" in said
    for name in "ab":
        assert (tmp_path / "p" / name / "vis" / "x.png").is_file()
        found = json.loads((tmp_path / "p" / name / "preds" / "x.json").read_text())
        assert {"labels", "scores", "bboxes", "masks"} <= found.keys()


@pytest.mark.parametrize(
    ("kind", "model_name", "task", "metric"),
    [("upernet", "test_biformer", "seg", "mIoU"), ("mask_rcnn", "test_dinat", "det", "coco/segm_mAP_50")],
)
def test_two_processes_train(kind, model_name, task, metric, nuclei, tmp_path):
    """With batch norms of each process, as there is no SyncBN on CPUs; both end with the same weights."""
    config = small_config(kind, model_name, nuclei, tmp_path / "run", 2, log_level="INFO")
    config.custom_imports = ConfigDict(imports=["tests.mm.runs"])
    config.custom_hooks = [*config.custom_hooks, ConfigDict(type="SameWeightsEverywhere")]
    if kind == "upernet":
        config.model.decode_head.norm_cfg = ConfigDict(type="SyncBN", requires_grad=True)
    config.dump(tmp_path / "small.py")
    said = tool(f"train_{task}", tmp_path / "small.py", torchrun=2)
    log = "".join(file.read_text() for file in (tmp_path / "run").rglob("*.log"))
    assert "Distributed training: True" in log
    assert "GPU number: 2" in log
    assert "the same weights in 2 processes, of other images" in said
    assert said.count("threads left: []") == 2
    weights = torch.load(tmp_path / "run" / "iter_2.pth", weights_only=True)["state_dict"]
    config.custom_hooks.pop()
    assert weights.keys() == Runner.from_cfg(config).model.state_dict().keys()
    said = tool(f"test_{task}", tmp_path / "small.py", tmp_path / "run" / "iter_2.pth", torchrun=2)
    assert metric in said
    assert said.count("threads left: []") == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["mask_rcnn", "upernet"])
def test_autocast_of_backbone_and_neck(kind, dtype, nuclei, tmp_path):
    if dtype == "float16" and kind == "mask_rcnn":
        pytest.skip("float16 on CPUs is tested with one head, it takes long")
    wrapper = {"type": "AutocastOptimWrapper", "dtype": dtype}
    runner = Runner.from_cfg(small_config(kind, "test_dinat", nuclei, tmp_path, 2, optim_wrapper=wrapper))
    seen = set()

    def look(module, args, output):
        if module.training:  # the validation at the end is in float32
            seen.add(output.dtype)

    conv = next(m for m in runner.model.backbone.modules() if isinstance(m, torch.nn.Conv2d))
    conv.register_forward_hook(look)
    runner.train()
    assert seen == {getattr(torch, dtype)}
    assert all(loss > 0 for loss in losses(runner))
    assert all(parameter.dtype == torch.float32 for parameter in runner.model.parameters())
    assert "extract_feat" not in vars(runner.model)
    scaler = runner.optim_wrapper.loss_scaler
    assert scaler.is_enabled() == (dtype == "float16")


def test_another_autocast_is_refused():
    from visattn.mm import AutocastOptimWrapper

    with pytest.raises(ValueError, match="expected dtype 'bfloat16' or 'float16', got 'float32'"):
        AutocastOptimWrapper("float32", optimizer=torch.optim.SGD([torch.ones(1, requires_grad=True)], 1.0))


NOWHERE = ("SEG", "--no-check", "--cfg-options", "train_dataloader.dataset.data_root=nowhere")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("nothing.py",), "expected a config file, got nothing.py"),
        (("DET",), "expected a config of mmseg, got one of mmdet; try the other command"),
        (("SEG", "--cfg-options", "train_dataloader"), "expected --cfg-options KEY=VALUE, got others"),
        (("BROKEN",), "expected a config that can be read, got .*BROKEN.py with SyntaxError"),
        (
            ("SEG", "--cfg-options", "model.type=Nothing"),
            "expected a config that can be built, got .*KeyError: 'Nothing is",
        ),
        (NOWHERE, r"expected the files that .*SEG.py names, got: .*No such file or directory: 'nowhere/train'"),
        (("SEG", "--resume", "nothing.pth"), "expected a checkpoint at nothing.pth, got no file"),
    ],
)
def test_mistakes_on_the_command_line(args, message, nuclei, tmp_path, monkeypatch):
    from mm_runner import main

    for kind, name in (("retinanet", "DET"), ("upernet", "SEG")):
        small_config(kind, "test_dinat", nuclei, tmp_path, 1).dump(tmp_path / f"{name}.py")
    (tmp_path / "BROKEN.py").write_text("model = dict(")
    args = [str(tmp_path / f"{arg}.py") if arg in ("DET", "SEG", "BROKEN") else arg for arg in args]
    monkeypatch.setattr(sys, "argv", ["train_seg.py", *args])
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main("mmseg", "train", "")


@pytest.mark.parametrize(
    ("model_name", "args", "message"),
    [
        ("biformer_small", ["--pretrained"], "expected the published weights of biformer_small, got no address of any"),
        (
            "dinat_s_tiny",
            ["--pretrained"],
            r"expected weights of dinat_s_tiny.in1k, got none from https://\S*: no answer in 0.5 s",
        ),
        ("test_dinat", ["--weights", "nothing.pth"], "expected weights at nothing.pth, got no file"),
        ("test_dinat", ["--weights", "nothing.pth", "--resume"], "expected --weights or --resume, got both"),
        (None, ["--pretrained"], "expected a config with visattn.TimmBackbone, got ResNet"),
    ],
)
def test_weights_that_cannot_be_had_end_the_run_at_once(model_name, args, message, tmp_path, monkeypatch):
    import mm_runner

    def no_network(*args, **kwargs):
        time.sleep(30)  # as a resolver without a network does

    monkeypatch.setattr("visattn.published.urlopen", no_network)
    monkeypatch.setattr("visattn.published.WARN_SECONDS", 0.2)
    monkeypatch.setattr("visattn.published.GIVE_UP_SECONDS", 0.5)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(mm_runner, "check", lambda *_: pytest.fail("the data came first"))
    config = small_config("upernet", "test_dinat", "nowhere", tmp_path, 1)
    config.model.backbone = {"type": "ResNet"} if model_name is None else {**config.model.backbone}
    if model_name is not None:
        config.model.backbone.model_name = model_name
    config.dump(tmp_path / "own.py")
    monkeypatch.setattr(sys, "argv", ["train_seg.py", str(tmp_path / "own.py"), *args])
    start = time.perf_counter()
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        mm_runner.main("mmseg", "train", "")
    assert time.perf_counter() - start < 10


def test_weights_of_a_backbone_and_of_a_whole_model(nuclei, tmp_path, monkeypatch):
    """And the channels of another backbone than the one that the config was written for."""
    import mm_runner

    config = small_config("upernet", "test_dinat", nuclei, tmp_path / "run", 1)
    whole = Runner.from_cfg(config).model.state_dict()
    config.model.decode_head.in_channels = [1, 2, 3, 4]
    config.dump(tmp_path / "own.py")
    begin = "backbone.model."
    part = {key.removeprefix(begin): value for key, value in whole.items() if key.startswith(begin)}
    files = {"whole.pth": whole, "whole.safetensors": whole, "backbone.pth": part}
    for name, weights in files.items():
        (torch.save if name.endswith(".pth") else safetensors.torch.save_file)(weights, tmp_path / name)
        hook, build = FirstWeights(), Runner.from_cfg

        def from_cfg(config, hook=hook, build=build):
            runner = build(config)
            runner.register_hook(hook)
            return runner

        with monkeypatch.context() as patch:
            patch.setattr(mm_runner.Runner, "from_cfg", from_cfg)
            args = [str(tmp_path / "own.py"), "--weights", str(tmp_path / name), "--no-check"]
            patch.setattr(sys, "argv", ["train_seg.py", *args])
            mm_runner.main("mmseg", "train", "")
        same = {key for key, value in hook.weights.items() if torch.equal(value, whole[key])}
        assert {key for key in whole if key.startswith(begin)} <= same
        assert ("decode_head.conv_seg.weight" in same) == (weights is whole)


@pytest.mark.parametrize("seed", ["-1", str(2**32), str(2**63)])
def test_seeds_out_of_range_are_refused(seed, monkeypatch, capsys):
    from mm_runner import main

    monkeypatch.setattr(sys, "argv", ["train_seg.py", "any.py", "--seed", seed])
    with pytest.raises(SystemExit, match="2"):
        main("mmseg", "train", "")
    assert f"argument --seed: expected 0 to {2**32 - 1}, got {seed}; try 42" in capsys.readouterr().err
