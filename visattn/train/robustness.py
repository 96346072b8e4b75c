"""The folder layouts of ImageNet-A, -R (class folders of 200 classes) and -C (CORRUPTION/SEVERITY/CLASS)."""

import importlib.resources
import os
from pathlib import Path

from timm.data import ImageNetInfo

from visattn.train.config import Config
from visattn.train.errors import DataError, DataNotFoundError
from visattn.train.listing import list_folder, natural
from visattn.train.sources import Source

LAYOUTS = {"a": "SYNSET/x.jpg", "r": "SYNSET/x.jpg", "c": "CORRUPTION/1/CLASS/x.JPEG"}


def open_robustness(config: Config, kind: str) -> tuple[dict[str, Source], list[str], list[int] | None]:
    """Sources by name (of C: corruption/severity), the classes, and the outputs that stand for them (None: all)."""
    root, mode = Path(config.data), "L" if config.in_chans == 1 else "RGB"
    if not os.path.isdir(root):
        raise DataNotFoundError(f"expected the folder of ImageNet-{kind.upper()}, got no {root}; try --data DIR")
    if kind == "c":
        folders = [path for severity in "12345" for path in root.glob(f"*/{severity}") if path.is_dir()]
        listings = {f"{path.parent.name}/{path.name}": list_folder(path) for path in sorted(folders)}
    else:
        listings = {"eval": list_folder(root)}
    found = {label for listing in listings.values() for label in listing.labels}
    if not found:
        raise DataError(f"expected images in {root}, got none; try --data DIR with DIR/{LAYOUTS[kind]}")
    if kind == "c":
        classes, outputs = sorted(found, key=natural), None
    else:
        synsets = importlib.resources.files("timm.data") / "_info" / f"imagenet_{kind}_synsets.txt"
        classes, all_classes = synsets.read_text().split(), ImageNetInfo().label_names()
        outputs = [all_classes.index(synset) for synset in classes]
        if unknown := sorted(found - set(classes)):
            raise DataError(
                f"expected folders of the {len(classes)} classes of ImageNet-{kind.upper()} in {root}, got "
                f"{', '.join(unknown[:5])}; try --data DIR with DIR/{classes[0]}/x.jpg"
            )
    return {name: listing.source(classes, mode) for name, listing in listings.items()}, classes, outputs
