"""Data sets: what the options name, opened as sources with one class map."""

import importlib.util
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import resolve_data_config

from visattn.train.config import Config, Resolved
from visattn.train.errors import ConfigError, DataError, DataNotFoundError, TrainError
from visattn.train.listing import Listing, is_hidden, is_image, list_folder, natural, some
from visattn.train.sources import EXTENSIONS, EmbeddedSource, HfSource, Source
from visattn.train.tars import list_tars

# What suits small grey digits. No flip: a mirrored 2 is no 2.
DIGITS = {
    "img_size": 32,
    "in_chans": 1,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "scale": (0.7, 1.0),
    "ratio": (0.85, 1.18),
    "hflip": 0.0,
}
# Mean and deviation are those of the training split before it is enlarged.
EMBEDDED = {
    "digits": {**DIGITS, "mean": (0.305,), "std": (0.376,)},
    "mnist5k": {**DIGITS, "mean": (0.131,), "std": (0.308,)},
}
# timm's ImageNet defaults, spelled out so that args.yaml is complete.
FOLDER = {"in_chans": 3, "scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5}
EVAL_SPLITS = ("val", "valid", "validation", "test")  # test last: published ones often come without labels
STREAMS = ("wds/", "hfids/", "tfds/")


@dataclass(frozen=True)
class Data:
    """A training and a test split with the same classes."""

    name: str
    train: Source
    eval: Source
    class_names: list[str]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def resolve(config: Config, model_cfg: dict[str, Any]) -> Resolved:
    """Replace every None that means `as the data set or the model has it`; `model_cfg` is timm's pretrained_cfg."""
    options = _filled(vars(config), EMBEDDED.get(config.data, FOLDER))
    for name in ("mean", "std"):
        values = options[name]
        if values is not None and len(values) not in (1, options["in_chans"]):
            raise ConfigError(
                f"--{name}: expected 1 or {options['in_chans']} values, got {len(values)}; try one value per channel"
            )
    names = ("img_size", "in_chans", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    found = resolve_data_config({name: options[name] for name in names}, pretrained_cfg=model_cfg)
    if options["in_chans"] == 1:  # an RGB model on grey images: the mean over its channels
        found["mean"], found["std"] = ((sum(found[name]) / len(found[name]),) for name in ("mean", "std"))
    height, width = found["input_size"][-2:]
    if height != width:
        raise ConfigError(
            f"expected a square input, got {config.model} with {height}x{width}; try --img-size {min(height, width)}"
        )
    found |= {"mean": tuple(found["mean"]), "std": tuple(found["std"])}
    found |= {"img_size": height, "train_interpolation": found["interpolation"]}
    return Resolved(**_filled(options, found))


def _filled(options: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The options, those that are None from `values`."""
    return {name: values.get(name) if option is None else option for name, option in options.items()}


def open_data(config: Resolved) -> Data:
    """Open the splits that `config.data` names; images stay undecoded until they are read."""
    mode = "L" if config.in_chans == 1 else "RGB"
    if config.val_split is not None and _is_named(config.data):
        raise ConfigError(
            f"--val-split: expected a folder of class folders in --data, got {config.data}; try without it"
        )
    if config.data in EMBEDDED:
        train, test = (EmbeddedSource(config.data, split, config.img_size, mode) for split in ("train", "test"))
        return Data(config.data, train, test, [str(digit) for digit in range(10)])
    if config.data.startswith(STREAMS):
        raise DataError(
            f"expected data that can be read in any order, got {config.data}: a stream cannot be resumed at the very "
            "image; try DIR with DIR/train/*.tar and DIR/val/*.tar (webdataset shards), or hfds/NAME"
        )
    if config.data.startswith("hfds/"):
        return _open_hf(config.data.removeprefix("hfds/"), mode)

    root = Path(config.data)
    if config.val_split is not None:
        train, evaluation = _split(root, config.val_split, config.seed)
    else:
        train, evaluation = (_list_split(root, names, "--val-split 0.2") for names in (("train",), EVAL_SPLITS))
    classes = _classes(train)
    # One class map for both splits: timm alone would number the classes of each split by itself.
    tested = {*evaluation.labels, *evaluation.empty}
    if lost := sorted(tested & ({*classes, *train.empty} - {*train.labels}), key=natural):
        raise DataError(
            f"expected images of all classes in {train.path}, got none of {some(lost)}; try to add them, or to remove "
            f"these classes from {evaluation.path} too{_said(train)}"
        )
    if unknown := sorted(set(evaluation.labels) - set(classes), key=natural):
        raise DataError(
            f"expected {evaluation.path} to hold only the {len(classes)} classes of {train.path}, got also "
            f"{some(unknown)}; try the same class names in both"
        )
    if missing := sorted(set(train.labels) - set(evaluation.labels), key=natural):
        raise DataError(
            f"expected images of all {len(classes)} classes in {evaluation.path}, got none of "
            f"{some(missing)}; try whether it was unpacked as a whole{_said(evaluation)}"
        )
    if both := len(train.stores & evaluation.stores):
        what = "tar file(s)" if train.shards else "folder(s)"
        evaluation.remarks.append(f"{both} {what} of {train.path} too, so that models are tested on what they learnt")
    return Data(root.resolve().name, train.source(classes, mode), evaluation.source(classes, mode), classes)


def open_eval(config: Resolved) -> tuple[Source, list[str]]:
    """The test split and its class names; of a folder with such a split nothing else is looked at."""
    if _is_named(config.data) or config.val_split is not None:
        data = open_data(config)
        return data.eval, data.class_names
    listing = _list_split(Path(config.data), EVAL_SPLITS)
    classes = _classes(listing)
    if listing.empty:  # without it the classes after it would have other numbers than in training
        raise DataError(
            f"expected images in each class folder of {listing.path}, got none in {some(listing.empty)}; "
            f"try to add them{_said(listing)}"
        )
    return listing.source(classes, "L" if config.in_chans == 1 else "RGB"), classes


def _is_named(data: str) -> bool:
    """Whether `data` is no folder of the user's."""
    return data in EMBEDDED or data.startswith(("hfds/", *STREAMS))


def test_splits(root: Path) -> list[str]:
    """What a folder has to test with."""
    names = [name for split in EVAL_SPLITS for name in (split, f"{split}.tar")]
    return [name for name in names if os.path.lexists(root / name)]


def _split(root: Path, share: float, seed: int) -> tuple[Listing, Listing]:
    """A folder of class folders or shards as what is trained with and what is tested with."""
    if there := test_splits(root):
        raise DataError(
            f"--val-split: expected a folder of class folders alone, got {root} with {there[0]}, to test with; "
            "try without --val-split"
        )
    if not os.path.isdir(root):
        raise DataNotFoundError(f"expected the folder {root}, got none; try --data DIR with DIR/CLASS/*.png")
    listing = _list_content(root)
    if not listing.names:
        raise _no_images(listing, root)
    return listing.split(share, seed)


def _no_images(listing: Listing, folder: Path) -> DataError:
    return DataError(
        f"expected images ({', '.join(sorted(EXTENSIONS))}) in class folders of {listing.path}, got none; "
        f"try {folder}/CLASS/x.png{_said(listing)}"
    )


def _list_split(root: Path, names: tuple[str, ...], otherwise: str = "") -> Listing:
    """List the first of `names` that is there, as a folder of class folders or shards, or as one tar.

    `otherwise` is an option that does without them.
    """
    try:
        for name in names:
            folder, tar = root / name, root / f"{name}.tar"
            if os.path.isdir(folder):
                found = _list_content(folder)
                if os.path.lexists(tar):
                    found.remarks.append(f"{tar.name} beside it is left out")
            elif os.path.isfile(tar):
                found = list_tars(tar, [tar], numbered=False)
            elif there := [path for path in (folder, tar) if os.path.lexists(path)]:
                raise DataError(
                    f"expected a folder of class folders or a tar file, got {there[0]}, which is neither; try "
                    f"ls -l {there[0]}"
                )
            else:
                continue
            if name != names[0]:
                found.remarks.insert(0, f"used as there is no {names[0]}")
            if not found.names:
                raise _no_images(found, folder)
            return found
        got = f"no folder {root}"
        if os.path.isdir(root):
            got = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "an empty folder"
    except TrainError:
        raise
    except OSError as error:
        raise DataError(f"expected data that can be read, got: {error}; try ls -l {root}") from error
    wanted = " or ".join(str(root / name) for name in names)
    hint = "--data DIR with DIR/train/CLASS/*.png and DIR/val/CLASS/*.png, with tar files of these, or --data digits"
    if otherwise and os.path.isdir(root) and _holds_images(root):
        hint = f"{otherwise}, which keeps a part of the images for testing, or {hint}"
    raise DataNotFoundError(f"expected the folder {wanted}, got {got}; try {hint}")


def _holds_images(root: Path) -> bool:
    """Whether there are images in the first folders below `root`."""
    return any(is_image(name) for _, _, names in itertools.islice(os.walk(root), 100) for name in names)


def _list_content(folder: Path) -> Listing:
    """List a folder of webdataset shards, if it holds tar files, or of class folders."""
    names = sorted((path.name for path in folder.iterdir() if not is_hidden(path.name)), key=natural)
    shards: dict[str, Path] = {}
    repeated = []
    for path in (folder / name for name in names if name.endswith(".tar")):
        first = shards.setdefault(os.path.realpath(path), path)
        repeated += [f"{path.name} = {first.name}"] if first != path else []
    if not shards:
        return list_folder(folder)
    found = list_tars(folder, list(shards.values()), numbered=True)
    if repeated:
        found.remarks.append(f"left out as repeated: {some(repeated)}")
    if others := [name for name in names if not name.endswith(".tar")]:
        found.remarks.append(f"left out beside the shards: {some(others)}")
    return found


def _said(listing: Listing) -> str:
    """What a split's report has to add to an error about it."""
    return f" ({'; '.join(listing.remarks)})" if listing.remarks else ""


def _classes(train: Listing) -> list[str]:
    """The names of the classes in the order of their numbers."""
    if train.numbered:
        known = {int(label) for label in train.labels}
        classes = _numbered(max(known) + 1, len(train.names), train.path)
        if lost := [name for name in classes if int(name) not in known]:
            train.remarks.append(f"without images: {some(lost)}")
        return classes
    return _two(sorted(set(train.labels), key=natural), train.path, _said(train))


def _numbered(classes: int, images: int, where: str) -> list[str]:
    if classes > images:  # a damaged label must not become a model with a billion outputs
        raise DataError(
            f"expected an image of each class in {where}, got {images} images and class number {classes - 1}; "
            "try numbers from 0 on without gaps"
        )
    return _two([str(number) for number in range(classes)], where)


def _two(classes: list[str], where: str, said: str = "") -> list[str]:
    if len(classes) < 2:
        raise DataError(
            f"expected at least 2 classes in {where}, got {len(classes)}; try {where}/CLASS/x.png with more than "
            f"{some(classes)}{said}"
        )
    return classes


def _open_hf(name: str, mode: str) -> Data:
    """Open a data set of the Hugging Face hub, or of a local folder in one of its layouts."""
    if importlib.util.find_spec("datasets") is None:
        raise DataNotFoundError(f"expected the package datasets for hfds/{name}, got none; try pip install datasets")
    from datasets import ClassLabel, get_dataset_split_names
    from timm.data.readers.reader_hfds import ReaderHfds

    where = f"hfds/{name}"
    try:
        splits = get_dataset_split_names(name)
        evaluation = next((split for split in EVAL_SPLITS if split in splits), EVAL_SPLITS[0])
        readers = [ReaderHfds(name, split=split) for split in ("train", evaluation)]
        targets = [reader.dataset.with_format("numpy", columns=["label"])[:]["label"] for reader in readers]
    except Exception as error:  # of the hub, the network, the files, the columns
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"expected {where} with the splits train and validation (or test) and the columns image and label, "
            f"got {type(error).__name__}: {reason}; try hfds/OWNER/NAME, or a folder with train/ and val/"
        ) from error
    feature = readers[0].dataset.features["label"]
    if targets[0].dtype.kind not in "iu":
        raise DataError(f"{where}: expected class numbers in the column label, got {feature}; try a ClassLabel column")
    if isinstance(feature, ClassLabel):
        classes = _two(feature.names, where)
    else:
        classes = _numbered(int(targets[0].max()) + 1, len(targets[0]), where)
    for reader, numbers in zip(readers, targets, strict=True):
        outside = np.setdiff1d(numbers, np.arange(len(classes)))
        if outside.size:
            raise DataError(
                f"{where}: expected class numbers from 0 to {len(classes) - 1} in {reader.split}, got "
                f"{outside[:5].tolist()}; try a split with labels"
            )
    train, test = (HfSource(reader, numbers, mode) for reader, numbers in zip(readers, targets, strict=True))
    file = os.path.relpath(readers[0].dataset[0]["image"]["path"] or name, name)
    if file.count(os.sep) > 2 and os.path.isdir(name):  # SPLIT/CLASS/.../IMAGE
        train.report = f"{where}: classes are the last folders of the images ({file}); try --data {name} for the first"
    notes = [f"tested on the split {evaluation}"] * (evaluation != EVAL_SPLITS[0])
    if lost := [classes[number] for number in np.setdiff1d(np.arange(len(classes)), targets[0])]:
        notes.append(f"of {some(lost)} there are no training images")
    test.report = f"{where}: {'; '.join(notes)}" if notes else ""
    return Data(Path(name).name, train, test, classes)
