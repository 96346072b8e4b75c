"""What each option does to a run."""

import math
import os
import re
import shutil

import pytest
import torch
from PIL import Image
from runs import PLAIN, SMALL, assert_same_tensors, build, column, slow, stop_after_first_epoch, tensors
from torch.nn import functional as F

from visattn.train import distributed, finetune, metrics
from visattn.train import run as trainer
from visattn.train.config import Config
from visattn.train.engine import Engine
from visattn.train.loader import Batches


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--pretrained",), "--pretrained: expected the published weights of test_dinat, got no address of any; try"),
        (("--model-args", "colour=red"), "expected options that test_dinat takes"),
        (("--model-args", "depths=[1"), "--model-args: expected a YAML value, got 'depths=[1'"),
        (("--model-args", "num_heads=0"), "expected options that test_dinat takes"),
        (("--model-args", "depths=[&a [1], &b [*a, *a], [*b, *b]]"), "(an alias of more than one value, *a)"),
        (("--model-args", f"depths={'[' * 2000}"), "(values nested too deeply)"),
        (("--model-args", "depths=!!int ''"), "--model-args: expected a YAML value"),
        (("--model-args", "depths=[1, 2147483648]"), "(numbers up to 100000 are possible)"),
        (("--model-args", "mlp_ratio=.nan"), "(numbers up to 100000 are possible)"),
        (("--device", "meta"), "--device: expected a usable device, got 'meta' ("),
        (("--device", "privateuseone"), "--device: expected a usable device"),
        (("--auto-augment", "rand-m9-n1000000000"), "--auto-augment: expected a timm policy"),
        (("--auto-augment", "augmix-m3-a0"), "got ValueError: alpha <= 0; try another --auto-augment"),
        (("--img-size", 4096, "--crop-pct", 0.1), "the size before the crop, of at most 16384, got 4096 / 0.1"),
        (("--img-size", 8192, "--batch-size", 32), "--micro-batch: expected at most 10 images of 8192 px"),
        (("--workers", 1024), "--workers: expected at most"),
        (("--opt", "adahessian"), "--opt: expected an optimizer of first order"),
        (("--opt", "fusedlamb"), "--opt: expected one that runs here, got fusedlamb"),
        (("--name", "x" * 300), "--name: expected names of at most 255 bytes, got 'xxx"),
        (("--output", os.devnull), "--output: expected a folder to write to"),
    ],
)
def test_options_that_cannot_work_are_said(refused, options, words):
    assert words in refused(*options, model="test_dinat")


def test_images_that_do_not_fit_are_said(refused):
    said = refused("--img-size", 30)
    assert "--img-size: expected images that fit test_vit, got 30x30 (Input height (30) should be divisible" in said
    assert "try --img-size 160" in said


def test_images_of_one_pixel_are_cropped_to_one(folder_data, tmp_path):
    for path in (folder_data / "train").glob("*/*.png"):
        Image.new("RGB", (1, 1), "white").save(path)
    options = ("--data", folder_data, *SMALL, "--output", tmp_path, "--scale", 0.001, 0.001, "--ratio", 10, 10)
    images, _ = next(build("--model", "test_vit", *options).engine.loaders.begin(0, 0))
    assert images.min() > 0.9  # an empty crop would be black


def test_auxiliary_classifier_adds_its_weighted_loss(folder_data, refused, tmp_path):
    """And learns by it; a model without one is refused."""
    head = ("--model-args", "aux_head=true", "--aux-loss", 0.4)
    run = build("--model", "test_overlock", "--data", folder_data, *PLAIN, *head, "--output", tmp_path)
    images, target = next(run.engine.loaders.begin(0, 0))
    losses = [F.cross_entropy(x, target, label_smoothing=0.1) for x in run.engine.model.train()(images)]
    torch.testing.assert_close(run.state.task(images, target)["loss"], losses[0] + 0.4 * losses[1])
    assert losses[0] != losses[1]
    before = run.engine.model.aux_head.fc.weight.clone()
    run.engine.update(run.engine.loaders.begin(0, 0), metrics.Speed())
    assert not torch.equal(run.engine.model.aux_head.fc.weight, before)
    for model, remedy in (("test_dinat", "overlock_xt"), ("test_overlock", "--model-args aux_head=true")):
        said = refused("--aux-loss", 0.4, model=model)
        assert f"--aux-loss: expected a model with an auxiliary classifier, got {model}; try {remedy}, or 0" in said


def schedule(kind, epoch):
    """What --sched promises for 4 epochs with 1 of warm-up from 1e-5 to 1e-3, and a last rate of 1e-4."""
    if epoch < 1:
        return 1e-5
    share = {"cosine": (1 + math.cos(math.pi * min(epoch / 4, 1))) / 2, "linear": max(1 - epoch / 4, 0), "constant": 1}[
        kind
    ]
    return 1e-4 + (1e-3 - 1e-4) * share


@pytest.mark.parametrize("kind", ["linear", "constant", slow("cosine")])
def test_schedules_follow_their_formula(folder_data, run, kind):
    options = ("--data", folder_data, *PLAIN, "--epochs", 4, "--warmup-epochs", 1, "--warmup-lr", 1e-5)
    _, folder = run("r", *options, "--min-lr", 1e-4, "--cooldown-epochs", 2, "--sched", kind, "--layer-decay", 0.5)
    assert column(folder, "lr") == pytest.approx([schedule(kind, epoch) for epoch in range(6)])


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_follows_its_formula(folder_data, tmp_path, monkeypatch, warmup):
    options = ("--model", "test_vit", "--data", folder_data, *SMALL, "--epochs", 2, "--output", tmp_path)
    built = build(*options, "--ema-decay", 0.6, "--ema-warmup" if warmup else "--no-ema-warmup")
    take, average = Engine.update, None

    def update(self, *args):
        nonlocal average
        taken = take(self, *args)
        step = self.state.update - 1
        decay = min(1 - (1 + step) ** (-2 / 3), 0.6) if warmup else 0.6 * (step > 0)
        weight = self.model.head.weight.detach()
        average = weight.clone() if average is None else decay * average + (1 - decay) * weight
        return taken

    monkeypatch.setattr(Engine, "update", update)
    trainer.train(built)
    torch.testing.assert_close(built.state.task.trainable_module_ema.module.head.weight, average)
    assert (average - built.engine.model.head.weight).abs().max() > 1e-4


def test_repeated_images_are_augmented_anew_and_meet_in_other_processes():
    shares = []
    for rank in range(2):
        config = Config(batch_size=6, aug_repeats=3)
        batches = Batches(20, config, distributed.World(rank, 2, torch.device("cpu")))
        batches.begin(1)
        shares.append(list(batches))
    assert len(shares[0]) == 20 // 6
    for one, two in zip(*shares, strict=True):
        images = [key.number for key in one + two]
        assert sorted(images) == sorted(3 * list(set(images)))
        assert len({key.position for key in one + two}) == 6
        assert {key.number for key in one} == {key.number for key in two}


def test_copies_of_an_image_differ(folder_data):
    built = build("--model", "test_vit", "--data", folder_data, *SMALL, "--epochs", 1, "--aug-repeats", 2)
    images, target = next(built.engine.loaders.begin(0, 0))
    assert torch.equal(target[0::2], target[1::2])
    assert all(not torch.equal(one, two) for one, two in zip(images[0::2], images[1::2], strict=True))


def test_channels_last_changes_the_layout_only(folder_data, tmp_path):
    options = ("--model", "test_resnet", "--data", folder_data, *PLAIN, "--epochs", 2, "--output", tmp_path)
    plain, last = build(*options, "--name", "a"), build(*options, "--name", "b", "--channels-last")
    assert last.engine.model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    inputs = []
    last.engine.model.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for built in (plain, last):
        trainer.train(built)
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in inputs)
    assert column(tmp_path / "b", "train_loss") == pytest.approx(column(tmp_path / "a", "train_loss"), rel=1e-4)


@pytest.mark.parametrize("amp", ["float16", slow("bfloat16")])
def test_mixed_precision_of_shards(folder_data, run, launch, tmp_path, amp):
    """float16 skips updates that overflow, on both processes alike."""
    options = ("--data", folder_data, *PLAIN, "--epochs", 4, "--amp", amp, "--grad-clip", 1)
    _, one = run("one", *options)
    processes = launch(*options, "--engine", "fsdp2", "--name", "two", size=2)
    assert processes.wait() == [0, 0], processes.output()
    two = tmp_path / "out" / "two"
    assert column(two, "skipped") == column(one, "skipped")
    assert column(two, "train_loss")[-1] == pytest.approx(column(one, "train_loss")[-1], rel=2e-2)
    assert column(two, "train_loss")[-1] < 0.6
    assert (column(two, "skipped")[-1] > 0) == (amp == "float16")


@pytest.mark.slow
@pytest.mark.parametrize(("size", "engine"), [(1, "ddp"), (2, "ddp"), (2, "fsdp2")])
def test_compiled_runs_compute_the_same(folder_data, launch, run, tmp_path, size, engine):
    options = ("--data", folder_data, *PLAIN, "--epochs", 3, "--ema-decay", 0.5)
    _, eager = run("eager", *options)
    processes = launch(*options, "--compile", "--engine", engine, "--name", "compiled", size=size)
    assert set(processes.wait(280)) == {0}, processes.output()
    for key in ("train_loss", "eval_loss", "ema_loss"):
        assert column(tmp_path / "out" / "compiled", key) == pytest.approx(column(eager, key), rel=1e-4)


# Momentum alone; factored; state per group; types, None and shared tensors among the state; two optimizers in one.
COMMON = ("adafactorbv", "clamb")


OPTIMIZERS = (*COMMON, "nadamuon", "sgd", "adafactor", "lion", "lamb", "muon")


@pytest.mark.parametrize("opt", [opt if opt in COMMON else slow(opt) for opt in OPTIMIZERS])
def test_optimizers_go_on_bitwise(folder_data, run, opt):
    code, whole = run("whole", "--data", folder_data, *SMALL, "--epochs", 2, "--opt", opt)
    assert code == 0
    stop_after_first_epoch(whole, whole.with_name("parts"))
    assert run("parts", "--resume", whole.with_name("parts"))[0] == 0
    assert any(key.startswith("optimizer.") for key in tensors(whole))
    assert_same_tensors(whole, whole.with_name("parts"))


@pytest.mark.slow
@pytest.mark.parametrize(("opt", "tolerance"), [("lamb", 1e-5), ("adafactorbv", 1e-5), ("lion", 1e-5), ("muon", 1e-2)])
def test_optimizers_of_shards(folder_data, run, launch, tmp_path, opt, tolerance):
    """muon multiplies matrices in bfloat16, whose sums depend on the shards."""
    options = ("--data", folder_data, *PLAIN, "--epochs", 4, "--opt", opt)
    _, one = run("one", *options)
    processes = launch(*options, "--engine", "fsdp2", "--name", "two", size=2)
    assert processes.wait() == [0, 0], processes.output()
    assert column(tmp_path / "out" / "two", "train_loss") == pytest.approx(column(one, "train_loss"), rel=tolerance)


@pytest.mark.parametrize("preset", ["full", "linear_probe", "higher_resolution"])
def test_presets_train(folder_data, tmp_path, preset):
    options = ("--model", "test_dinat", "--data", folder_data, *SMALL, "--micro-batch", 4, "--workers", 0)
    options += ("--no-pretrained", "--epochs", 1, "--output", tmp_path / "out", "--name", preset)
    assert finetune.main([preset, *map(str, options)]) == 0
    assert len(column(tmp_path / "out" / preset, "top1")) == 1


@pytest.mark.parametrize("words", [[], ["a\nb"], ["x" * 5000]])
def test_no_preset_is_said(capsys, words):
    assert finetune.main(words) == 2
    assert re.fullmatch(r"error: expected a preset, got .{4,90}; try visattn finetune .*\n", capsys.readouterr().err)


def test_loggers_follow_a_run_and_its_continuation(folder_data, run):
    options = ("--data", folder_data, *SMALL, "--epochs", 2, "--tensorboard", "--wandb", "offline")
    code, whole = run("whole", *options)
    assert code == 0
    identity = (whole / "wandb_id.txt").read_text()
    for path in sorted((whole / "checkpoints").glob("[0-9]*"))[1:]:
        shutil.rmtree(path)
    assert run("whole", "--resume", whole)[0] == 0
    assert (whole / "wandb_id.txt").read_text() == identity
    assert len(list((whole / "tensorboard").glob("events.*"))) == 2
    runs = list((whole / "wandb").glob("offline-run-*"))
    assert {path.name.rpartition("-")[2] for path in runs} == {identity}
    assert all(list(path.glob("*.wandb")) for path in runs)
