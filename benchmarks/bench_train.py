"""Time the training loop of `python -m train` against timm's pieces driven directly, on the same model in one run.

    python benchmarks/bench_train.py                                    # every case
    python benchmarks/bench_train.py --cases digits --rounds 3          # a part of it
    python benchmarks/bench_train.py --out benchmarks/results/train_overhead_cpu

timm's loop is what its train.py does in an epoch: create_loader, FastCollateMixup, ClassificationTask, gradient
clipping, optimizer, EMA, scheduler, meters. Ours adds what makes a run exact and safe: seeds for every image and step,
checks of every loss and gradient, a copy of the buffers, rates and the status line. Neither evaluates nor writes files.
Each round trains one epoch with either loop on one thread; without workers they take turns update by update. The table
has the median and the quartiles of the ratios of the rounds. Aim: 0.95.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import number, publish
from timm.data import FastCollateMixup, ImageDataset, create_loader
from timm.utils import AverageMeter, dispatch_clip_grad

import visattn  # noqa: F401  registers the models
from visattn.train import distributed, metrics
from visattn.train.arguments import parse
from visattn.train.config import Config
from visattn.train.data import open_data
from visattn.train.loader import _allow_no_bits
from visattn.train.model import make_model, make_optimizer, make_scheduler, make_task
from visattn.train.progress import EpochBar, Status
from visattn.train.run import Run, build

LOG_INTERVAL = 50  # timm's
OPTIONS = (
    *("--mixup", "0.8", "--cutmix", "1.0", "--auto-augment", "rand-m9-mstd0.5-inc1", "--reprob", "0.25"),
    *("--ema-decay", "0.9999", "--grad-clip", "5", "--epochs", "1000", "--device", "cpu"),
)


@dataclass(frozen=True)
class Case:
    """A model and its images: the embedded digits, or JPEG files in class folders."""

    model: str
    batch: int
    size: int = 224
    files: int = 0  # JPEGs in an epoch; 0: the digits


CASES = {
    "digits": Case("test_dinat", 64, 32),
    "jpeg, small model": Case("test_resnest_va", 32, files=128),
    "jpeg, dinat_mini": Case("dinat_mini", 8, files=16),
}


@dataclass
class Result:
    """One row of the table: images per second of wall time, and ratios of the rounds (above 1: ours is faster)."""

    case: str
    model: str
    size: int
    batch: int
    workers: int
    rounds: int
    images_per_s: float
    timm_images_per_s: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    cpu_ratio: float  # CPU time of the main process


def make_jpegs(folder: Path, count: int) -> None:
    """Write `count` training images of ImageNet's usual size in two classes, and one of each for the test split."""
    rng = np.random.default_rng(0)
    for split, files in (("train", count), ("val", 2)):
        for index in range(files):
            target = folder / split / f"class{index % 2}"
            target.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            image.resize((500, 375), Image.Resampling.BICUBIC).save(target / f"{index}.jpg", quality=90)


class InMemory(torch.utils.data.Dataset):
    """The training digits with the interface that timm's create_loader wants."""

    def __init__(self, config: Config):
        source = open_data(config).train
        self.samples, self.transform = [source.read(index) for index in range(len(source))], None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image, target = self.samples[index]
        return self.transform(image), target


def our_loop(run: Run) -> Callable[[], Iterator[None]]:
    """A call that trains one epoch as train.run does, update by update."""

    def epoch() -> Iterator[None]:
        count, speed = run.state.update // run.updates, metrics.Speed()
        batches = run.engine.loaders.begin(count, 0)
        with EpochBar(run.console, count + 1, run.epochs, run.updates, enabled=False) as bar:
            for _ in range(run.updates):
                taken = run.engine.update(batches, speed)
                rates = speed.images_per_s, speed.data_wait
                memory = metrics.memory_gb(run.world.device)
                bar.step(Status(run.state.meter.loss, taken.lr, taken.grad_norm, *rates, memory))
                yield

    return epoch


def timm_loop(run: Run, config: Config) -> Callable[[], Iterator[None]]:
    """A call that trains one epoch as timm's train.py does, update by update, from the same weights."""
    classes = run.engine.model.num_classes
    model = make_model(config, classes, run.console)
    model.load_state_dict(run.engine.model.state_dict())
    task = make_task(config, model, run.world.device)
    task.setup_ema(config.ema_decay, use_warmup=config.ema_warmup)
    optimizer = make_optimizer(config, task)
    scheduler = make_scheduler(config, optimizer, run.updates)
    dataset = InMemory(config) if config.data == "digits" else ImageDataset(str(Path(config.data, "train")))
    loader = create_loader(
        dataset,
        input_size=(config.in_chans, config.img_size, config.img_size),
        batch_size=config.batch_size,
        is_training=True,
        **{name: getattr(config, name) for name in ("scale", "ratio", "hflip", "color_jitter", "auto_augment", "mean")},
        std=config.std,
        interpolation=config.train_interpolation,
        re_prob=config.reprob,
        re_mode="pixel",
        collate_fn=FastCollateMixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classes),
        num_workers=config.workers,
        device=run.world.device,
    )
    _allow_no_bits(dataset.transform)
    if len(loader) != run.updates:
        raise RuntimeError(f"expected as many updates of both loops, got {len(loader)} and {run.updates}")
    updates = 0

    def epoch() -> Iterator[None]:
        nonlocal updates
        losses, data_time, update_time = AverageMeter(), AverageMeter(), AverageMeter()
        task.train()
        optimizer.zero_grad()
        start = data_start = time.time()
        for index, (images, target) in enumerate(loader):
            data_time.update(time.time() - data_start)
            loss = task(images, target)["loss"]
            loss.backward()
            dispatch_clip_grad(task.get_clip_parameters(), value=config.grad_clip, mode="norm")
            optimizer.step()
            losses.update(loss.item(), images.size(0))
            updates += 1
            optimizer.zero_grad()
            task.update_ema(step=updates)
            now = time.time()
            update_time.update(now - start)
            start = now
            if index % LOG_INTERVAL == 0:
                lr = statistics.mean(group["lr"] for group in optimizer.param_groups)
                print(
                    f"{losses.val:#.3g} {losses.avg:#.3g} {update_time.val:.3f} {data_time.val:.3f} {lr:.3e}",
                    file=run.console.file,
                )
            scheduler.step_update(updates, metric=losses.avg)
            yield
            data_start = time.time()

    return epoch


def time_round(
    loops: Sequence[Callable[[], Iterator[None]]], updates: int, workers: int, turn: int
) -> list[list[float]]:
    """Train an epoch with every loop; returns the wall time and the CPU time of each.

    The loops take turns update by update, but with workers, which work ahead, epoch by epoch.
    """
    order = list(range(len(loops)))[:: 1 if turn % 2 else -1]
    steps = [loop for loop in order for _ in range(updates)] if workers else order * updates
    epochs = [loop() for loop in loops]
    seconds = [[0.0, 0.0] for _ in loops]
    for loop in steps:
        start, cpu = time.perf_counter(), time.process_time()
        next(epochs[loop])
        seconds[loop][0] += time.perf_counter() - start
        seconds[loop][1] += time.process_time() - cpu
    for epoch in epochs:
        next(epoch, None)
    return seconds


def measure(name: str, workers: int, rounds: int, folder: Path) -> Result:
    """Train some epochs with either loop, in turns."""
    case = CASES[name]
    data = "digits"
    if case.files:
        data = str(folder / f"jpeg{case.files}")
        make_jpegs(Path(data), case.files)
    options = ("--model", case.model, "--data", data, "--batch-size", case.batch, "--img-size", case.size)
    where = ("--output", folder, "--name", f"{name} {workers}", "--workers", workers)
    config = parse([str(option) for option in (*OPTIONS, *options, *where)])
    with open(os.devnull, "w") as silent:
        run = build(config, distributed.start(config), metrics.make_console(silent))
        loops = our_loop(run), timm_loop(run, run.config)
        samples = [time_round(loops, run.updates, workers, turn) for turn in range(rounds + 1)]
    ours, theirs = np.array(samples[1:]).transpose(1, 0, 2)  # the first round warms up
    images = run.updates * case.batch
    wall, cpu = (theirs / ours).T
    return Result(
        name,
        case.model,
        case.size,
        case.batch,
        workers,
        rounds,
        images_per_s=images / float(np.median(ours[:, 0])),
        timm_images_per_s=images / float(np.median(theirs[:, 0])),
        ratio=float(np.median(wall)),
        ratio_quartiles=tuple(np.quantile(wall, (0.25, 0.75)).tolist()),
        cpu_ratio=float(np.median(cpu)),
    )


COLUMNS = ("case", "model", "size", "batch", "workers", "rounds", "img/s", "timm", "ratio", "quartiles", "CPU ratio")


def row(r: Result) -> list[str]:
    figures = [number(r.images_per_s, ".1f"), number(r.timm_images_per_s, ".1f"), number(r.ratio, ".3f")]
    quartiles = " to ".join(number(value, ".3f") for value in r.ratio_quartiles)
    whole = [str(value) for value in (r.size, r.batch, r.workers, r.rounds)]
    return [r.case, r.model, *whole, *figures, quartiles, number(r.cpu_ratio, ".3f")]


TEXT = """# Overhead of the training loop on a CPU

`{command}` ({setting}).
Images per second of `python -m train`'s loop and of timm's pieces driven directly as timm's train.py does, with the
same model, augmentation (RandAugment, mixup, cutmix, random erasing), EMA and clipping. One thread, wall time, both
loops in turns; `ratio` is the median over the rounds of ours / timm's, `CPU ratio` that of the CPU time of the
main process. Aim: at least 0.95.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rounds", type=int, default=9, help="timed epochs of each loop")
    parser.add_argument("--out", type=Path, help="path without suffix for the .json and .md results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.cases:
            for workers in args.workers:
                print(f"{name}, {workers} workers ...", flush=True)
                results.append(measure(name, workers, args.rounds, Path(folder)))
    publish(results, COLUMNS, row, TEXT, "bench_train.py", argv, args.out, title="one thread, wall time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
