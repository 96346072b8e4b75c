"""Tiny sets of detection and segmentation, to be broken."""

import contextlib
import copy
import functools
import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.mm.runs import small_config

WIDTH, HEIGHT = 64, 48
KINDS = {"det": "mask_rcnn", "seg": "upernet"}


@functools.cache
def _config(kind):
    return small_config(KINDS[kind], "test_dinat", "", "", 1)


def register(faults, says):
    """Decorate a way to break a set: it goes into `faults` by its name, with what the line says."""

    def add(break_it):
        faults[break_it.__name__] = (break_it, says)
        return break_it

    return add


class Data:
    """Four images to train and two to validate in the nuclei's layout, with a config, for faults to change."""

    def __init__(self, kind, root):
        self.root = Path(root) / "nuclei"
        for split, number in (("train", 4), ("val", 2)):
            (self.root / split).mkdir(parents=True)
            (self.root / f"{split}_masks").mkdir()
            images, annotations = [], []
            for i in range(1, number + 1):
                size = {"width": WIDTH, "height": HEIGHT}
                images.append({"id": i, "file_name": f"{i}.png", **size})
                Image.new("RGB", (WIDTH, HEIGHT), (40 * i, 9, 9)).save(self.image(i, split))
                mask = np.zeros((HEIGHT, WIDTH), np.uint8)
                mask[4:20, 4:20] = 1
                Image.fromarray(mask).save(self.mask(i, split))
                for x in (4, 30):
                    polygon = [x, 4, x + 16, 4, x + 16, 20, x, 20]
                    place = {"bbox": [x, 4, 16, 16], "area": 256, "iscrowd": 0, "segmentation": [polygon]}
                    number = len(annotations) + 1
                    annotations.append({"id": number, "image_id": i, "category_id": 1, **place})
            content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "nucleus"}]}
            (self.root / f"{split}.json").write_text(json.dumps(content))
        self.config = copy.deepcopy(_config(kind))
        self.config.work_dir = str(Path(root) / "run")
        for part in ("train", "val", "test"):
            self.config[f"{part}_dataloader"].dataset.data_root = str(self.root)
            if kind == "det" and part != "train":
                self.config[f"{part}_evaluator"].ann_file = str(self.root / "val.json")
        object.__setattr__(self.config, "_filename", str(self.root / "config.py"))

    def image(self, number=1, split="train"):
        return self.root / split / f"{number}.png"

    def mask(self, number=1, split="train"):
        return self.root / f"{split}_masks" / f"{number}.png"

    def masks(self):
        return sorted(self.root.glob("*_masks/*"))

    @contextlib.contextmanager
    def json(self, split="train"):
        """Change a file of annotations."""
        file = self.root / f"{split}.json"
        content = json.loads(file.read_text())
        yield content
        file.write_text(json.dumps(content))

    def annotation(self, split="train", **changes):
        """Change the first annotation."""
        with self.json(split) as content:
            content["annotations"][0].update(changes)

    def paint(self, values, *numbers):
        """Paint all masks, or some of `train`, in stripes of values."""
        for file in [self.mask(number) for number in numbers] or self.masks():
            Image.fromarray(np.resize(np.repeat(np.uint8(values), 8), (HEIGHT, WIDTH))).save(file)

    def set(self, **changes):
        """Change the datasets of the config."""
        for part in ("train", "val"):
            self.config[f"{part}_dataloader"].dataset.update(changes)

    def heads(self, number):
        """Change the number of classes of all heads."""
        for key in ("roi_head.bbox_head", "roi_head.mask_head", "decode_head", "auxiliary_head"):
            if key.split(".")[0] in self.config.model:
                self.config.merge_from_dict({f"model.{key}.num_classes": number})
