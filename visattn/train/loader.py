"""Batches: which images in which order, augmented from counters, on this process's device.

The order of an epoch is one permutation that all processes share. An update takes the next `batch_size` of it, whatever
the number of processes, so a run goes on with the same images after a restart in mid-epoch or with other processes.
"""

import itertools
import math
import resource
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import FastCollateMixup, auto_augment, create_transform
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import DataLoader, Dataset, Sampler

from visattn.train import signals
from visattn.train.checks import check_pass
from visattn.train.config import Config, Resolved
from visattn.train.data import Data
from visattn.train.distributed import World
from visattn.train.errors import ConfigError, DataError, shown
from visattn.train.seeding import seed_everything, seed_for, seed_worker
from visattn.train.sources import BadImageError, Source
from visattn.weights import first_line

MAX_BAD_IN_A_ROW = 100
FILES, FILES_OF_A_WORKER = 24, 12  # open at once in training, as counted


class Key(NamedTuple):
    """An image of an epoch: its place in the order, and its number in the source."""

    epoch: int
    position: int
    number: int


class Batches(Sampler):
    """This process's share of every update, in `parts` forward passes; `begin` says where the next pass starts."""

    def __init__(self, images: int, config: Config, world: World):
        if config.batch_size > images * config.aug_repeats:
            raise ConfigError(
                f"--batch-size: expected at most the {images} training images, got {config.batch_size}; "
                f"try --batch-size {max(world.size, images // 4 // world.size * world.size)}"
            )
        if config.batch_size % world.size:
            raise ConfigError(
                f"--batch-size: expected a multiple of the {world.size} processes, got {config.batch_size}; "
                f"try --batch-size {math.ceil(config.batch_size / world.size) * world.size}"
            )
        share = config.batch_size // world.size
        self.parts = math.ceil(share / (config.micro_batch or share))
        while share % self.parts:
            self.parts += 1
        if (config.mixup or config.cutmix) and share // self.parts % 2:
            raise ConfigError(
                f"--batch-size: expected an even share for mixup and cutmix, which mix pairs, got "
                f"{share // self.parts} images per forward pass; try --batch-size {config.batch_size * 2}"
            )
        self.images, self.batch_size = images, config.batch_size
        self.repeats, self.seed = config.aug_repeats, config.seed
        self.rank, self.size = world.rank, world.size
        self.updates = self.updates_of(config.batch_size)
        self.epoch, self.first = 0, 0

    def updates_of(self, batch_size: int) -> int:
        """Updates in an epoch; with repeats it holds fewer different images."""
        return self.images // batch_size or 1

    def begin(self, epoch: int, update: int = 0) -> None:
        """Make the next iteration start at an update of an epoch."""
        self.epoch, self.first = epoch, update

    def __len__(self) -> int:
        return (self.updates - self.first) * self.parts

    def order(self, epoch: int) -> list[int]:
        """The images of an epoch, for all processes."""
        generator = torch.Generator().manual_seed(seed_for(self.seed, "order", epoch))
        order = torch.randperm(self.images, generator=generator).repeat_interleave(self.repeats)
        return order[: self.updates * self.batch_size].tolist()

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self.epoch, self.order(self.epoch)
        part = self.batch_size // self.parts
        for start in range(self.first * self.batch_size, len(order), part):
            # Ranks take turns, so that the copies of repeated augmentation meet in different processes.
            yield [Key(epoch, place, order[place]) for place in range(start + self.rank, start + part, self.size)]


class Images(Dataset):
    """Transformed images of a source. `bad` marks the unreadable ones; the memory is shared with the workers."""

    def __init__(self, source: Source, transform: Any):
        self.source, self.transform = source, transform
        self.bad = torch.zeros(len(source), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[Any, int] | None:
        """An image and its class; None, and a mark, if it cannot be read."""
        try:
            return self.source.read(index)
        except BadImageError:
            self.bad[index] = 1
            return None


class TrainingImages(Images):
    """Augmented from the image's place in the run; in the stead of an unreadable image comes the next one."""

    def __init__(self, source: Source, transform: Any, seed: int):
        super().__init__(source, transform)
        self.seed = seed

    def __getitem__(self, index: Key) -> tuple[Any, int]:
        for number in range(index.number, index.number + MAX_BAD_IN_A_ROW):
            if (sample := self.read(number % len(self))) is not None:
                seed_worker(self.seed, "image", index.epoch, index.position)
                return self.augment(sample[0]), sample[1]
        raise DataError(
            f"expected readable training images, got {min(MAX_BAD_IN_A_ROW, len(self))} unreadable ones from "
            f"{self.source.name(index.number)} on; try another --data"
        )

    def augment(self, image: Image.Image) -> Any:
        """The transformed image; an augmentation that breaks on it is named."""
        try:
            return self.transform(image)
        except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise DataError(
                f"expected an augmentation that an image of {image.width}x{image.height} pixels survives, got "
                f"{type(error).__name__}: {first_line(error)}; try another --auto-augment, or without it"
            ) from error


class TestImages(Images):
    """Images in order; an unreadable one comes as a black image of class -1, which no metric counts."""

    __test__ = False  # not for pytest

    def __getitem__(self, index: int) -> tuple[Any, int]:
        sample = self.read(index)
        if sample is not None:
            return self.transform(sample[0]), sample[1]
        return self.transform(Image.new(self.source.mode, (32, 32))), -1


class SeededErasing:
    """timm's random erasing, which draws in the main process: seeded by the batch."""

    def __init__(self, erasing: RandomErasing, batches: Batches):
        self.erasing, self.batches, self.done = erasing, batches, 0

    def begin(self) -> None:
        self.done = self.batches.first * self.batches.parts

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        seed_everything(self.batches.seed, "erase", self.batches.epoch, self.done, self.batches.rank)
        self.done += 1
        return self.erasing(images)


def _allow_no_bits(transform: Any) -> None:
    """Let timm's posterize keep no bit of a channel, which is black, as it was before Pillow 13 refused it.

    rand-m9-mstd0.5-inc1, the recipe of most families, asks for that in one of some hundred images.
    """
    for step in transform.transforms:
        for op in (*getattr(step, "ops", ()), *itertools.chain.from_iterable(getattr(step, "policy", ()))):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    return auto_augment.posterize(image, bits, **options) if bits else image.point([0] * 256 * len(image.getbands()))


def _keep_a_pixel(transform: Any) -> None:
    """Let no random crop be empty, and so black, as those of timm can be for images of a few pixels."""
    for step in transform.transforms:
        if isinstance(step, RandomResizedCropAndInterpolation):
            step.get_params = _crop_of_pixels


def _crop_of_pixels(img: Image.Image, scale: Any, ratio: Any) -> tuple[int, int, int, int]:
    top, left, height, width = RandomResizedCropAndInterpolation.get_params(img, scale, ratio)
    return min(top, img.height - 1), min(left, img.width - 1), max(height, 1), max(width, 1)


def allow_files(workers: int) -> None:
    """Raise the limit of open files as loader processes need it: without a file a batch never comes.

    Raises:
        ConfigError: the system does not allow so many.
    """
    needed = FILES + FILES_OF_A_WORKER * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not workers or soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"--workers: expected {needed} open files at once to be allowed for {workers} of them, got {hard}; "
            "try fewer --workers, or ulimit -n"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Loader(DataLoader):
    """Its processes do not hear the signals that end a run, which are often sent to all that it has."""

    def __init__(self, *args: Any, **options: Any):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more than there are CPUs, as asked for
            super().__init__(*args, worker_init_fn=signals.ignore, **options)

    def __iter__(self) -> Any:
        with signals.held_back():
            return super().__iter__()


def plain_errors(batches: Iterable[Any]) -> Iterator[Any]:
    """Without the traceback of a loader process, which torch puts into the text of its errors."""
    try:
        yield from batches
    except (EOFError, OSError) as error:  # images that cannot be read do not come here
        raise DataError(
            f"expected loader processes that go on, got {type(error).__name__}: {error}; try fewer --workers"
        ) from error
    except DataError as error:
        raise DataError(error.args[0].strip().rpartition(f"{DataError.__name__}: ")[2]) from error


@dataclass
class Loaders:
    """What one process reads."""

    batches: Batches
    train_images: TrainingImages
    train: PrefetchLoader
    eval_images: TestImages
    eval: PrefetchLoader
    real_eval_images: int  # on this process; the last ones may be padding

    def begin(self, epoch: int, update: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The training batches of an epoch from an update on: normalized images and classes (or class weights)."""
        self.batches.begin(epoch, update)
        if isinstance(self.train.random_erasing, SeededErasing):
            self.train.random_erasing.begin()
        return plain_errors(iter(self.train))


def make_test_transform(config: Resolved) -> Any:
    """Resize, crop, to a uint8 tensor, as `config` says."""
    return create_transform(
        (config.in_chans, config.img_size, config.img_size),
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
        crop_mode=config.crop_mode,
        mean=config.mean,
        use_prefetcher=True,
    )


def prefetch(loader: Loader, config: Resolved, device: torch.device, **erasing: Any) -> PrefetchLoader:
    """The batches of a loader, normalized on a device."""
    return PrefetchLoader(loader, config.mean, config.std, config.in_chans, device, **erasing)


def make_loaders(config: Resolved, data: Data, world: World) -> Loaders:
    """timm transforms, collation and prefetching around our order and counters."""
    batches = Batches(len(data.train), config, world)
    check_pass(batches.batch_size // world.size // batches.parts, config, "--micro-batch")
    try:
        augment = create_transform(
            (config.in_chans, config.img_size, config.img_size),
            is_training=True,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            interpolation=config.train_interpolation,
            mean=config.mean,
            use_prefetcher=True,
        )
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        if config.auto_augment is None:
            raise
        raise ConfigError(
            f"--auto-augment: expected a timm policy, got {shown(config.auto_augment)} ({first_line(error)}); "
            "try rand-m9-mstd0.5-inc1"
        ) from error
    _allow_no_bits(augment)
    _keep_a_pixel(augment)
    mixing = fast_collate
    if config.mixup or config.cutmix:
        # Its draws follow those of the batch's last image, so they too depend on places only.
        mixing = FastCollateMixup(
            config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=data.num_classes
        )
    allow_files(config.workers)
    options = {
        "num_workers": config.workers,
        "persistent_workers": config.workers > 0,
        "pin_memory": world.device.type == "cuda",
    }
    images = TrainingImages(data.train, augment, config.seed)
    loader = Loader(images, batch_sampler=batches, collate_fn=mixing, **options)
    train = prefetch(loader, config, world.device, re_prob=config.reprob, re_mode="pixel")
    if train.random_erasing is not None:
        train.random_erasing = SeededErasing(train.random_erasing, batches)
    test = TestImages(data.eval, make_test_transform(config))
    sampler = OrderedDistributedSampler(test, world.size, world.rank)
    loader = Loader(
        test,
        batch_size=2 * batches.batch_size // world.size // batches.parts,
        sampler=sampler,
        collate_fn=fast_collate,
        **options,
    )
    test_loader = prefetch(loader, config, world.device)
    return Loaders(batches, images, train, test, test_loader, sampler.num_valid_samples)
