"""torchmetrics: its figures of a trained model are the trainer's own."""

import csv
import subprocess
import sys

import pytest
import torch

torchmetrics = pytest.importorskip("torchmetrics")
pytest.importorskip("tyro")  # of the extra `train`, as those below need

from visattn.train.loader import TestImages, make_test_transform  # noqa: E402
from visattn.train.metrics import make_console  # noqa: E402
from visattn.train.validate import Options, configure, load_model, open_splits  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@torch.no_grad()
def test_accuracy_is_the_trainers(works, tmp_path):
    """Of a run on digits: what its log says of the weights that it leaves."""
    words = ["--output", tmp_path, "--name", "run", "--epochs", "1", "--warmup-epochs", "0", "--device", "cpu"]
    subprocess.run([sys.executable, "-m", "visattn.train", *map(str, words)], check=True, capture_output=True)
    expected = next(csv.DictReader((tmp_path / "run" / "log.csv").open()))

    config, weights = configure(Options(run=tmp_path / "run"))
    splits, classes, _ = open_splits(config, None)
    model = load_model(config, weights, len(classes), make_console())
    images = TestImages(splits["eval"], make_test_transform(config))
    top1, top5 = (torchmetrics.classification.MulticlassAccuracy(len(classes), k, average="micro") for k in (1, 5))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
    for image, target in images:
        logits = model(((torch.as_tensor(image) / 255 - mean) / std)[None])
        for metric in (top1, top5):
            metric.update(logits, torch.tensor([target]))
    got = [100 * metric.compute().item() for metric in (top1, top5)]
    assert got == pytest.approx([float(expected["top1"]), float(expected["top5"])], abs=1e-4)
    assert got[0] > 30
    works("torchmetrics", "MulticlassAccuracy against the trainer's own", f"top-1 {got[0]:.2f} % by both")
