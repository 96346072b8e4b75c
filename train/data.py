"""Data sets and their timm loaders."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import FastCollateMixup, ImageDataset, create_loader, resolve_data_config
from torch.utils.data import Dataset

from train.config import Config
from train.errors import ConfigError, DataError, DataNotFoundError

# What suits 8x8 grey digits; the mean and deviation are those of the training split. No flip: a mirrored 2 is no 2.
DIGITS = {
    "img_size": 32,
    "in_chans": 1,
    "mean": (0.305,),
    "std": (0.376,),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "scale": (0.7, 1.0),
    "ratio": (0.85, 1.18),
    "hflip": 0.0,
}
# timm's ImageNet defaults, spelled out so that args.yaml is complete.
FOLDER = {"in_chans": 3, "scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5}
EVAL_SPLITS = ("val", "validation", "test")


@dataclass(frozen=True)
class Data:
    """A training and a test split with the same classes."""

    name: str
    train: Dataset
    eval: Dataset
    num_classes: int


class Digits(Dataset):
    """One fixed split of scikit-learn's 1,797 handwritten digits (8x8, grey), enlarged once to `size` pixels."""

    def __init__(self, split: str, size: int, mode: str):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        # The split does not follow --seed, so that accuracies of different seeds compare.
        parts = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
        images, self.targets = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
        levels = (images * (255 / 16)).round().astype("uint8")
        images = [Image.fromarray(image).convert(mode) for image in levels]
        self.images = [image.resize((size, size), Image.Resampling.BICUBIC) for image in images]
        self.transform = None  # set by timm's create_loader

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return self.transform(image) if self.transform else image, int(self.targets[index])


def resolve(config: Config, model_cfg: dict[str, Any]) -> Config:
    """Replace every None that means `as the data set or the model has it`; `model_cfg` is timm's pretrained_cfg."""
    defaults = DIGITS if config.data == "digits" else FOLDER
    config = _fill(config, defaults)
    asked = {name: getattr(config, name) for name in ("img_size", "in_chans", "interpolation", "crop_pct")}
    for name in ("mean", "std"):
        values = getattr(config, name)
        if values is not None and len(values) not in (1, config.in_chans):
            raise ConfigError(
                f"--{name}: expected 1 or {config.in_chans} values, got {len(values)}; try one value per channel"
            )
        asked[name] = values
    found = resolve_data_config(asked, pretrained_cfg=model_cfg)
    if config.in_chans == 1:  # an RGB model on grey images: the mean over its channels
        found["mean"], found["std"] = ((sum(found[name]) / len(found[name]),) for name in ("mean", "std"))
    height, width = found["input_size"][-2:]
    if height != width:
        raise ConfigError(
            f"expected a square input, got {config.model} with {height}x{width}; try --img-size {min(height, width)}"
        )
    return _fill(
        config,
        {
            "img_size": height,
            "mean": tuple(found["mean"]),
            "std": tuple(found["std"]),
            "interpolation": found["interpolation"],
            "crop_pct": found["crop_pct"],
            "train_interpolation": found["interpolation"],
        },
    )


def _fill(config: Config, values: dict[str, Any]) -> Config:
    return dataclasses.replace(config, **{k: v for k, v in values.items() if getattr(config, k) is None})


def open_data(config: Config) -> Data:
    """Open the splits that `config.data` names; images stay undecoded until they are read."""
    mode = "L" if config.in_chans == 1 else "RGB"
    if config.data == "digits":
        train, evaluation = (Digits(split, config.img_size, mode) for split in ("train", "test"))
        return Data("digits", train, evaluation, num_classes=10)

    root = Path(config.data)
    train_dir = _split_folder(root, ("train",))
    eval_dir = _split_folder(root, EVAL_SPLITS)
    try:
        train = ImageDataset(train_dir, input_img_mode=mode)
        class_map = train.reader.class_to_idx
        unknown = sorted(set(ImageDataset(eval_dir).reader.class_to_idx) - set(class_map))
        # One class map for both splits: timm alone would number the classes of each split by itself.
        evaluation = ImageDataset(eval_dir, input_img_mode=mode, class_map=class_map)
    except RuntimeError as error:  # timm found no images
        raise DataError(f"expected class folders with images, got: {error}; try DIR/train/CLASS/x.png") from error
    if unknown:
        raise DataError(
            f"expected {eval_dir} to hold only the {len(class_map)} classes of {train_dir}, got also "
            f"{', '.join(unknown[:5])}; try the same folder names in both"
        )
    if len(class_map) < 2:
        raise DataError(
            f"expected at least 2 class folders in {train_dir}, got {len(class_map)}; try DIR/train/CLASS/x.png"
        )
    return Data(root.resolve().name, train, evaluation, len(class_map))


def _split_folder(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    wanted = " or ".join(str(root / name) for name in names)
    if root.is_dir():
        got = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "an empty folder"
    else:
        got = f"no folder {root}"
    raise DataNotFoundError(
        f"expected the folder {wanted}, got {got}; try --data DIR with DIR/train/CLASS/*.png and DIR/val/CLASS/*.png, "
        "or --data digits"
    )


def make_loaders(config: Config, data: Data, device: torch.device) -> tuple[Any, Any]:
    """timm loaders (training, test) that yield normalized batches on `device`."""
    if len(data.train) < config.batch_size:
        raise ConfigError(
            f"--batch-size: expected at most the {len(data.train)} training images, got {config.batch_size}; "
            f"try --batch-size {max(2, len(data.train) // 4)}"
        )
    mixing = None
    if config.mixup or config.cutmix:
        mixing = FastCollateMixup(
            config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=data.num_classes
        )
    common = {
        "input_size": (config.in_chans, config.img_size, config.img_size),
        "batch_size": config.batch_size,
        "mean": config.mean * (config.in_chans if len(config.mean) == 1 else 1),
        "std": config.std * (config.in_chans if len(config.std) == 1 else 1),
        "num_workers": config.workers,
        # Fresh workers draw their seeds from the main generator each epoch; persistent ones would carry random
        # state that no checkpoint holds, and a resumed run would differ.
        "persistent_workers": False,
        "pin_memory": device.type == "cuda",
        "device": device,
    }
    try:
        train = create_loader(
            data.train,
            is_training=True,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            interpolation=config.train_interpolation,
            re_prob=config.reprob,
            re_mode="pixel",
            collate_fn=mixing,
            **common,
        )
    except (AssertionError, KeyError, ValueError) as error:
        if config.auto_augment is None:
            raise
        raise ConfigError(
            f"--auto-augment: expected a timm policy, got {config.auto_augment!r} ({error}); try rand-m9-mstd0.5-inc1"
        ) from error
    evaluation = create_loader(data.eval, crop_pct=config.crop_pct, interpolation=config.interpolation, **common)
    return train, evaluation
