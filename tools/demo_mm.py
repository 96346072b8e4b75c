"""What demo_det.py and demo_seg.py share: a config of several files, a short training with a bar, and a picture."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from make_small_sets import ROOT, DownloadError, WrongFileError, make
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

try:
    from mmengine.config import Config
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    from visattn.mm import TimmBackbone
except ImportError as error:
    sys.exit(f"expected mmengine, mmcv, mmdet and mmsegmentation ({error}); try tools/install_mm.sh")

STRIDES = [4, 8, 16, 32]


def options(description: str, out: str, sets: dict[str, int], arguments: Sequence[str] | None) -> Any:
    """The command line of a demo, which has so many iterations for each of its `sets`."""
    defaults = ", ".join(f"{number} for {name}" for name, number in sets.items())
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinat_atto", help="backbone, of visattn or timm (default: dinat_atto)")
    parser.add_argument("--set", default=next(iter(sets)), choices=sets, help="data (default: the first)")
    parser.add_argument("--iters", type=int, help=f"training iterations (default: {defaults})")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the data")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="where the set is, or is made (default: data)")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / out, help=f"folder (default: output/{out})")
    found = parser.parse_args(arguments)
    found.iters = sets[found.set] if found.iters is None else found.iters
    if found.iters < 2:  # one to warm up
        parser.error(f"expected at least 2 iterations, got --iters {found.iters}")
    return found


def load(args: Any, *files: str) -> Config:
    """One config of several files of configs/, on the set, with the model as backbone; makes the set where it is not.

    Heads and learning rates are left to the caller.
    """
    try:
        folder = make(args.set, args.data)
    except (DownloadError, WrongFileError) as error:
        sys.exit(str(error))
    config = Config()
    for file in files:
        config.merge_from_dict(Config.fromfile(ROOT / "configs" / file).to_dict())
    for split in ("train", "val", "test"):
        config[f"{split}_dataloader"].dataset.data_root = f"{folder}/"
    for split in ("val", "test"):
        if "ann_file" in config[f"{split}_evaluator"]:
            config[f"{split}_evaluator"].ann_file = str(folder / "val.json")
    mean, std = statistics(folder / "train")
    config.model.data_preprocessor.update(mean=mean, std=std)
    config.model.backbone = {"type": "visattn.TimmBackbone", "model_name": args.model, "out_norm": "layer"}
    return config


def channels(config: Config) -> list[int]:
    """What the config's backbone gives to a neck."""
    try:
        with torch.device("meta"):
            backbone = TimmBackbone(config.model.backbone.model_name)
    except (TypeError, ValueError) as error:
        sys.exit(str(error))
    if backbone.out_strides != STRIDES:
        sys.exit(f"expected a model with strides {STRIDES}, got {backbone.out_strides}; try dinat_atto")
    return backbone.out_channels


def statistics(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of red, green and blue in a folder of pictures."""
    files = sorted(folder.glob("*.png"))
    pixels = np.concatenate([np.asarray(Image.open(file)).reshape(-1, 3) for file in files])
    return pixels.mean(axis=0).tolist(), pixels.std(axis=0).tolist()


def train(config: Config, args: Any, metrics: Sequence[str]) -> Runner:
    """Train the config's model for `args.iters` iterations, and print the metrics before and after."""
    warmup = min(30, (args.iters + 3) // 4)
    config.merge_from_dict(
        {
            "work_dir": str(args.out),
            "randomness": {"seed": args.seed},
            "log_level": "ERROR",
            "log_processor": {"by_epoch": False},
            "optim_wrapper": {
                "type": "OptimWrapper",
                "constructor": "BackboneOptimWrapperConstructor",
                "optimizer": {"type": "AdamW", "lr": args.lr, "weight_decay": 0.05},
                "clip_grad": {"max_norm": 5.0},
            },
            "param_scheduler": [
                {"type": "LinearLR", "start_factor": 0.01, "by_epoch": False, "end": warmup},
                {"type": "CosineAnnealingLR", "by_epoch": False, "begin": warmup, "end": args.iters, "eta_min": 0.0},
            ],
            "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": args.iters, "val_interval": args.iters + 1},
            "val_cfg": {"type": "ValLoop"},
            "test_cfg": {"type": "TestLoop"},
            "default_hooks": {"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": args.iters}},
        }
    )
    console = Console(stderr=True)
    with quiet():
        runner = Runner.from_cfg(config)
        before = runner.val()
    runner.register_hook(Bar(console))
    start = time.perf_counter()
    with quiet():
        runner.train()
        minutes = (time.perf_counter() - start) / 60
        after = runner.val()
    print(f"{args.model} on {args.set}: {args.iters} iterations in {minutes:.1f} minutes")
    for name in metrics:
        print(f"{name}: {before[name]:.3f} before, {after[name]:.3f} after")
    return runner


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the tables that pycocotools prints, and without mmsegmentation's advice."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="mmseg")
        yield


class Bar(Hook):
    """A bar that shows how far the training is, and the loss."""

    def __init__(self, console: Console) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console)

    def before_train(self, runner: Runner) -> None:
        """Start."""
        self.task = self.bar.add_task("", total=runner.max_iters, loss=float("nan"))
        self.bar.start()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Go one iteration ahead."""
        self.bar.update(self.task, advance=1, loss=outputs["loss"].item())

    def after_train(self, runner: Runner) -> None:
        """Stop."""
        self.bar.stop()


@dataclass
class Panel:
    """A picture with x0, y0, x1, y1 boxes and [H, W] masks on it."""

    title: str
    image: np.ndarray
    boxes: Sequence[np.ndarray] = ()
    masks: Sequence[np.ndarray] = ()
    colour: str = "gold"


def predictions(runner: Runner, number: int) -> Iterator[tuple[np.ndarray, Any]]:
    """The first pictures of the validation set, and the model's samples for them."""
    runner.model.eval()
    for batch, _ in zip(runner.val_dataloader, range(number), strict=False):
        with torch.no_grad():
            (sample,) = runner.model.val_step(batch)
        yield np.asarray(Image.open(sample.img_path).convert("RGB")), sample


def draw(columns: Sequence[Sequence[Panel]], file: Path) -> None:
    """Write columns of panels as one PNG; dark pictures are shown brighter."""
    rows = len(columns[0])
    figure, axes = plt.subplots(rows, len(columns), figsize=(4 * len(columns), 4 * rows + 0.3), squeeze=False)
    for column, panels in enumerate(columns):
        for axis, panel in zip(axes[:, column], panels, strict=True):
            white = max(1.0, np.percentile(panel.image, 99))
            axis.imshow(np.clip(panel.image / white, 0, 1))
            for mask in panel.masks:
                axis.contour(mask, [0.5], colors=panel.colour, linewidths=1.2)
            for x0, y0, x1, y1 in panel.boxes:
                # pixel centres are at whole numbers
                place = (x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0
                axis.add_patch(plt.Rectangle(*place, fill=False, edgecolor=panel.colour, linewidth=0.8))
            axis.set_title(panel.title, fontsize=10)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)
    print(f"wrote {file}")
