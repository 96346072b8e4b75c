"""timm's own scripts, and the parts that they are made of, on a folder of images.

The scripts know our models when visattn is imported before them, as `LAUNCH` does:

    python -c "import runpy, sys, visattn; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')" train.py

They are in timm's repository alone, not in what PyPI has: TIMM_SCRIPTS names the folder of a clone.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy

import visattn  # noqa: F401
from tests.works_with.tasks import CLASSES, bars, check_fall

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")  # of timm.data

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LAUNCH = "import runpy, sys, visattn; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
NAME = "dinat_atto"
SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of `bars` as files, in train/ and validation/."""
    root = tmp_path_factory.mktemp("images")
    for split, number in (("train", 96), ("validation", 32)):
        for i, (image, label) in enumerate(zip(*bars(number, SIZE), strict=True)):
            path = root / split / str(label.item()) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (255 * (image + 2) / 6).clamp(0, 255).byte().permute(1, 2, 0)  # [H, W, 3]
            Image.fromarray(pixels.numpy()).save(path)
    return root


def launch(script, *words):
    """The script's output."""
    command = [sys.executable, "-c", LAUNCH, str(script), *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_launched_scripts_know_our_models(works, tmp_path):
    """By their own words, as a script that is run."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, timm\nif __name__ == '__main__':\n    print(sys.argv, timm.is_model(sys.argv[-1]))\n"
    )
    assert launch(script, "--model", NAME).strip() == f"{[str(script), '--model', NAME]} True"
    works("timm", f'a script by `python -c "{LAUNCH}" train.py`', f"`{NAME}` is known")


def test_scripts(works, folder, tmp_path):
    if "TIMM_SCRIPTS" not in os.environ:
        pytest.skip(
            "train.py, validate.py and benchmark.py are in timm's repository alone; set TIMM_SCRIPTS to a clone"
        )
    scripts, data = Path(os.environ["TIMM_SCRIPTS"]), ("--data-dir", folder)
    model = ("--model", NAME, "--img-size", SIZE, "--device", "cpu")
    classes = ("--num-classes", CLASSES, "--workers", 1, "--batch-size", 16)
    recipe = ("--opt", "adamw", "--lr", 2e-3, "--warmup-epochs", 0, "--epochs", 3, "--no-aug")
    launch(scripts / "train.py", *data, "--output", tmp_path, "--experiment", "run", *model, *classes, *recipe)
    rows = list(csv.DictReader((tmp_path / "run" / "summary.csv").open()))
    losses, top1 = ([float(row[key]) for row in rows] for key in ("train_loss", "eval_top1"))
    assert losses[-1] < 0.8 * losses[0]
    works(
        "timm", f"train.py, `{NAME}`", f"loss {losses[0]:.3f} to {losses[-1]:.3f} in 3 epochs, top-1 {top1[-1]:.1f} %"
    )

    words = (*data, "--split", "validation", *model, *classes, "--checkpoint", tmp_path / "run" / "last.pth.tar")
    found = json.loads(launch(scripts / "validate.py", *words).partition("--result")[2])
    assert found["top1"] == pytest.approx(top1[-1], abs=1e-3)
    works("timm", f"validate.py, `{NAME}`", f"top-1 {found['top1']:.1f} %, as train.py says")

    words = (*model, "--batch-size", 4, "--bench", "both", "--num-warm-iter", 1, "--num-bench-iter", 3)
    found = json.loads(launch(scripts / "benchmark.py", *words).partition("--result")[2])
    expected = sum(p.numel() for p in timm.create_model(NAME, device="meta").parameters())
    assert found["param_count"] == pytest.approx(expected / 1e6, abs=0.01)
    assert min(found["infer_samples_per_sec"], found["train_samples_per_sec"]) > 0
    works("timm", f"benchmark.py, `{NAME}`", f"{found['param_count']} M parameters")


def test_parts_of_the_scripts(works, folder, tmp_path):
    """Loaders, optimizer groups with layer decay, schedule, averaged weights, checkpoints, accuracy."""
    model = timm.create_model(NAME, num_classes=CLASSES, drop_path_rate=0.1)
    loaders = []
    for split in ("train", "validation"):
        data = create_dataset("", root=str(folder), split=split)
        options = {"no_aug": True, "use_prefetcher": False, "num_workers": 0}
        loaders.append(create_loader(data, (3, SIZE, SIZE), 16, is_training=split == "train", **options))
    optimizer = create_optimizer_v2(model, "adamw", lr=2e-3, weight_decay=0.05, layer_decay=0.9)
    scheduler, epochs = create_scheduler_v2(optimizer, "cosine", num_epochs=4, warmup_epochs=1, warmup_lr=1e-4)
    average = ModelEmaV3(model, decay=0.8)
    where = {"checkpoint_dir": tmp_path, "recovery_dir": tmp_path}
    saver = CheckpointSaver(model, optimizer, argparse.Namespace(model=NAME), average, **where)
    losses = []
    for epoch in range(epochs):
        model.train()
        for images, labels in loaders[0]:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model)
            losses.append(loss.item())
        scheduler.step(epoch + 1)
        model.eval()
        with torch.no_grad():
            logits, labels = zip(*((model(x), y) for x, y in loaders[1]), strict=True)
        top1 = accuracy(torch.cat(logits), torch.cat(labels))[0].item()
        saver.save_checkpoint(epoch, top1)
    assert top1 > 90
    read = timm.create_model(NAME, num_classes=CLASSES, checkpoint_path=str(tmp_path / "last.pth.tar")).eval()
    image = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(read(image), average.module.eval()(image))
    works("timm", f"the parts of train.py and validate.py, `{NAME}`", f"{check_fall(losses)}, top-1 {top1:.1f} %")
