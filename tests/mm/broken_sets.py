"""Tiny sets of detection and segmentation, healthy ones and every way to break them."""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from tests.mm.runs import small_config

WIDTH, HEIGHT = 64, 48
KINDS = {"det": "mask_rcnn", "seg": "upernet"}


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
        self.config = small_config(KINDS[kind], "test_dinat", root, Path(root) / "run", 1)
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


FAULTS = {}  # name: (kind, what breaks it, what the line says)


def fault(kind, says):
    """Register a way to break a set."""

    def register(break_it):
        FAULTS[break_it.__name__] = (kind, break_it, says)
        return break_it

    return register


# Segmentation


@fault("seg", r"train_masks: expected several classes in 4 masks, got 'background' alone and 255, which is ignored, in")
def masks_of_0_and_255(data):
    data.paint([0, 255])


@fault("seg", r"train_masks/1.png: expected labels below num_classes=2, or 255 to ignore, got \[7\]")
def labels_above_num_classes(data):
    data.paint([0, 1, 7], 1)


@fault("seg", r"train_masks/\d.png: expected labels below num_classes=2.*, got \[128\] \(3 more like it\)")
def grey_masks(data):
    for number in (1, 2, 3, 4):
        data.paint([0, 1, 128], number)


@fault("seg", r"train_masks/2.png: expected one channel of class numbers, got RGB, 3 channels")
def rgb_mask(data):
    Image.open(data.mask(2)).convert("RGB").save(data.mask(2))


@fault("seg", "val_masks/2.png: expected one channel of class numbers, got LA, 2 channels")
def mask_with_alpha(data):
    Image.open(data.mask(2, "val")).convert("LA").save(data.mask(2, "val"))


@fault("seg", "train_masks/1.png: expected a mask as PNG, got JPEG")
def jpeg_mask(data):
    Image.open(data.mask(1)).save(data.mask(1), format="JPEG")


@fault("seg", r"train_masks/1.png: expected whole numbers of 0 to 255, got 257 in I;16")
def mask_of_16_bits(data):
    Image.fromarray(np.full((HEIGHT, WIDTH), 257, np.uint16)).save(data.mask(1))


@fault("seg", r"train_masks/1.png: expected one channel of class numbers, got P")
def palette_read_as_colours(data):
    mask = Image.open(data.mask(1))
    mask = mask.convert("P")
    mask.save(data.mask(1))
    for step in data.config.train_dataloader.dataset.pipeline:
        if step.type == "LoadAnnotations":
            step.imdecode_backend = "cv2"


@fault("seg", r"train_masks/3.png: expected the 64 x 48 pixels of .*train/3.png, got 48 x 64")
def turned_mask(data):
    Image.open(data.mask(3)).transpose(Image.Transpose.ROTATE_90).save(data.mask(3))


@fault("seg", r"train_masks/1.png: expected the 48 x 64 pixels of .*train/1.png, got 64 x 48")
def image_turned_by_exif(data):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(data.image(1)).save(data.image(1), format="JPEG", exif=exif)


@fault("seg", r"train_masks/1.png: expected the mask of .*train/1.png, got no file")
def missing_mask(data):
    data.mask(1).unlink()


@fault("seg", r"train_masks/1.png: expected the mask of .*train/1.png, got a FIFO, socket or device")
def mask_that_is_a_fifo(data):
    data.mask(1).unlink()
    os.mkfifo(data.mask(1))


@fault("seg", r"train_masks/1.png: expected the mask of .*train/1.png, got a broken link")
def mask_that_is_a_broken_link(data):
    data.mask(1).unlink()
    data.mask(1).symlink_to("nowhere.png")


@fault("seg", "train_masks/4.png: expected an image in .*train, got none")
def mask_without_an_image(data):
    data.image(4).unlink()


@fault("seg", "train_masks/4.png: expected an image in .*train, got none")
def image_that_is_a_fifo(data):
    data.image(4).unlink()
    os.mkfifo(data.image(4))


@fault("seg", "train/1.png: expected an image, got ")
def truncated_image(data):
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(data.image(1))
    data.image(1).write_bytes(data.image(1).read_bytes()[:5000])


@fault("seg", "train_masks/1.png: expected an image, got ")
def mask_that_is_text(data):
    data.mask(1).write_text("hello")


@fault("seg", "train_masks: expected several classes in 4 masks, got none and 255, which is ignored, in 100.0 %")
def everything_ignored(data):
    data.paint([255])


@fault("seg", "got 'background' alone and 255.*; reduce_zero_label makes 0 the ignored label")
def zero_reduced_by_mistake(data):
    data.set(reduce_zero_label=True)


@fault("seg", "train: expected images \\*.jpg, got 4 \\*.png \\(1 more like it\\); try img_suffix")
def other_suffix(data):
    data.set(img_suffix=".jpg")


@fault("seg", r"nowhere: expected a folder of data, got no file")
def no_data_root(data):
    data.set(data_root="nowhere")


@fault("seg", r"nowhere: expected a folder as data_prefix.seg_map_path, got no file")
def no_folder_of_masks(data):
    data.set(data_prefix={"img_path": "train", "seg_map_path": "nowhere"})


@fault("seg", "list.txt: expected a list of images, got no file")
def no_list_of_images(data):
    data.set(ann_file="list.txt")


@fault("seg", "train/2.png.png: expected the image that is listed, got no file")
def list_with_suffixes(data):
    (data.root / "list.txt").write_text("2.png\n")
    data.set(ann_file="list.txt", data_prefix={"img_path": "train", "seg_map_path": "train_masks"})


@fault("seg", "train/loop: expected every folder once, got .*train again")
def loop_of_links(data):
    (data.root / "train" / "loop").symlink_to(data.root / "train")


@fault("seg", r"config.py: expected num_classes=2 in model.auxiliary_head, as metainfo.classes, got 150")
def forgotten_head_of_a_segmentor(data):
    data.config.model.auxiliary_head.num_classes = 150


@fault("seg", r"config.py: expected the classes \['background', 'nucleus'\] in every set, got \['background', 'cell'\]")
def other_classes_in_val(data):
    data.config.val_dataloader.dataset.metainfo = {"classes": ("background", "cell")}


@fault("seg", r"config.py: expected a dataset ADE20KDataset, got ValueError: .*is not a subset of")
def classes_that_a_dataset_does_not_have(data):
    data.set(type="ADE20KDataset")


@fault("seg", r"config.py: expected reduce_zero_label=False as the dataset has it, got True in its pipeline")
def zero_reduced_by_the_pipeline(data):
    for step in data.config.train_dataloader.dataset.pipeline:
        if step.type == "LoadAnnotations":
            step.reduce_zero_label = True


@fault("seg", r"config.py: expected 2 or, with the background, 3 values in .*class_weight, got 5")
def weights_of_other_classes(data):
    data.config.model.decode_head.loss_decode.class_weight = [1.0] * 5


# Detection


@fault("det", r"train.json: expected COCO annotations, got no file")
def no_annotations_file(data):
    (data.root / "train.json").unlink()


@fault("det", r"train.json: expected COCO annotations, got a FIFO")
def annotations_that_are_a_fifo(data):
    (data.root / "train.json").unlink()
    os.mkfifo(data.root / "train.json")


@fault("det", r"train.json: expected COCO annotations, got a file that cannot be read: ")
def cut_json(data):
    file = data.root / "train.json"
    file.write_text(file.read_text()[:100])


@fault("det", r"train.json: expected COCO annotations, got a file that cannot be read: ")
def deep_json(data):
    (data.root / "train.json").write_text("[" * 100_000)


@fault("det", r"train.json: expected COCO annotations, got a list")
def json_of_something_else(data):
    (data.root / "train.json").write_text('[{"image": "1.png", "boxes": []}]')


@fault("det", r"train.json: expected COCO annotations, got no list of dicts under 'annotations'")
def json_without_annotations(data):
    with data.json() as content:
        del content["annotations"]


@fault("det", r"train.json: expected objects of the config's classes, got none in 4 images")
def no_annotations(data):
    with data.json() as content:
        content["annotations"] = []


@fault("det", r"train.json: expected images, got none")
def no_images(data):
    with data.json() as content:
        content.update(images=[], annotations=[])


@fault(
    "det", r"train.json: expected metainfo.classes of the config to be the file's categories \['nucleus'\], got \['Nu"
)
def other_names(data):
    data.set(metainfo={"classes": ("Nucleus",)})


@fault("det", r"got 'nucleus' \(1 more like it\); try metainfo=dict\(classes=\(\"NAME\",\)\), a tuple")
def name_without_a_comma(data):
    data.set(metainfo={"classes": "nucleus"})


@fault(
    "det", r"file's categories \['nucleus', 'debris'\], got \['nucleus'\], which leaves out 1 objects of \['debris'\]"
)
def category_that_the_config_lacks(data):
    with data.json() as content:
        content["categories"].append({"id": 2, "name": "debris"})
        content["annotations"][0]["category_id"] = 2


@fault("det", r"file's categories \['nucleus', 'debris'\], got another order: \['debris', 'nucleus'\]")
def classes_in_another_order(data):
    for split in ("train", "val"):
        with data.json(split) as content:
            content["categories"].append({"id": 2, "name": "debris"})
            content["annotations"][0]["category_id"] = 2
    data.set(metainfo={"classes": ("debris", "nucleus")})
    data.heads(2)


@fault(
    "det", r"config.py: expected num_classes=1 in model.roi_head.\w+, as metainfo.classes, got 80 \(1 more like it\)"
)
def forgotten_heads(data):
    data.heads(80)


@fault("det", r"train.json: expected every image id once, got 1 again, of 2.png")
def image_id_twice(data):
    with data.json() as content:
        content["images"][1]["id"] = 1
        content["annotations"] = content["annotations"][:2]


@fault("det", r"train.json: expected every image once, got 1.png under two ids")
def image_twice(data):
    with data.json() as content:
        content["images"][1]["file_name"] = "1.png"


@fault("det", r"train.json: expected every annotation id once, got 1 again")
def annotation_id_twice(data):
    with data.json() as content:
        content["annotations"][1]["id"] = 1


@fault("det", r"train.json: expected every id and name of a category once, got \{'id': 1, 'name': 'nucleus'\}")
def category_id_twice(data):
    with data.json() as content:
        content["categories"].insert(0, {"id": 1, "name": "debris"})


@fault("det", r"got annotation 1 of image 99, which is not there")
def annotation_of_no_image(data):
    data.annotation(image_id=99)


@fault("det", r"got annotation 1 of image '1', which is not there")
def image_id_as_text(data):
    data.annotation(image_id="1")


@fault("det", r"train.json: expected categories \[1\], got annotation 1 of category 7")
def annotation_of_no_category(data):
    data.annotation(category_id=7)


@fault("det", r"got annotation 1 with bbox \[4, 4, 0, 0\]")
def box_of_0_by_0(data):
    data.annotation(bbox=[4, 4, 0, 0])


@fault("det", r"got annotation 1 with bbox \[20, 20, -16, 16\]")
def negative_box(data):
    data.annotation(bbox=[20, 20, -16, 16])


@fault("det", r"boxes and areas above 0, got annotation 1 with bbox .* and area 0")
def no_area(data):
    data.annotation(area=0)


@fault("det", r"got annotation 1 with bbox \[60, 4, 16, 16\] \(x, y, width, height\) in 64 x 48 pixels")
def box_over_the_border(data):
    data.annotation(bbox=[60, 4, 16, 16])


@fault("det", r"got annotation 1 with bbox \[400, 4, 16, 16\] \(x, y, width, height\) in 64 x 48 pixels")
def box_outside(data):
    data.annotation(bbox=[400, 4, 16, 16])


@fault("det", r"val.json: expected boxes within the image, got annotation \d")
def boxes_as_corners(data):
    with data.json("val") as content:
        for found in content["annotations"]:
            found["bbox"] = [30, 20, 46, 36]


@fault("det", r"expected x, y, width, height as bbox, and an area, got annotation 1 with \[nan, 4, 16, 16\]")
def nan_in_a_box(data):
    data.annotation(bbox=[float("nan"), 4, 16, 16])


@fault("det", r"expected x, y, width, height as bbox, and an area, got annotation 1 with \[4, 4, 16\]")
def box_of_3_numbers(data):
    data.annotation(bbox=[4, 4, 16])


@fault("det", r"expected x, y, width, height as bbox, and an area, got annotation 1 with None")
def box_of_nothing(data):
    data.annotation(bbox=None)


@fault("det", r"expected objects of the config's classes, got none in 4 images")
def boxes_as_fractions(data):
    with data.json() as content:
        for found in content["annotations"]:
            found["bbox"] = [0.1, 0.1, 0.3, 0.3]


@fault("det", r"train.json: expected annotations with id, image_id, category_id, bbox, area, got \{")
def annotation_without_area(data):
    with data.json() as content:
        del content["annotations"][0]["area"]


@fault("det", r"val.json: expected annotations with id, image_id, category_id, bbox, area, iscrowd, got \{")
def results_without_iscrowd(data):
    with data.json("val") as content:
        for found in content["annotations"]:
            del found["iscrowd"]


@fault("det", r"train.json: expected images with id, file_name, width and height, got \{")
def image_without_size(data):
    with data.json() as content:
        del content["images"][0]["width"]


@fault("det", r"expected a segmentation of every object, got annotation 1 with \[\]")
def empty_segmentation(data):
    data.annotation(segmentation=[])


@fault("det", r"expected a segmentation of every object, got annotation 1 without \(7 more like it\)")
def no_segmentation(data):
    with data.json() as content:
        for found in content["annotations"]:
            del found["segmentation"]


@fault("det", r"expected polygons of 3 points and more, with an area, got annotation 1 with \[\]")
def empty_polygon(data):
    data.annotation(segmentation=[[]])


@fault("det", r"expected polygons of 3 points and more, with an area, got annotation 1 with \[4, 4, 20, 20\]")
def polygon_of_2_points(data):
    data.annotation(segmentation=[[4, 4, 20, 20]])


@fault("det", r"expected polygons of 3 points and more, with an area, got annotation 1 with \[4, 4, 20, 4, 9, 4\]")
def polygon_without_area(data):
    data.annotation(segmentation=[[4, 4, 20, 4, 9, 4]])


@fault("det", r"expected polygons as lists of x and y, got annotation 1 with \[\[nan, 4, 20, 4, 20, 20\]\]")
def nan_in_a_polygon(data):
    data.annotation(segmentation=[[float("nan"), 4, 20, 4, 20, 20]])


@fault("det", r"expected polygons as lists of x and y, got annotation 1 with \[4, 4, 20, 4, 20, 20\]")
def flat_polygon(data):
    data.annotation(segmentation=[4, 4, 20, 4, 20, 20])


@fault("det", r"expected objects within the image, got annotation 1 with a polygon out of 64 x 48 pixels")
def polygon_outside(data):
    data.annotation(segmentation=[[104, 4, 120, 4, 120, 20]])


@fault("det", r"expected \[height, width\] \[48, 64\] and runs of as many pixels, got annotation 1 with run lengths")
def run_lengths_of_another_size(data):
    data.annotation(segmentation={"size": [WIDTH, HEIGHT], "counts": [64, 48 * 64 - 64]})


@fault("det", r"expected \[height, width\] \[48, 64\] and runs of as many pixels, got annotation 1 with run lengths")
def run_lengths_that_end_early(data):
    data.annotation(segmentation={"size": [HEIGHT, WIDTH], "counts": [64, 48]})


@fault("det", r"expected \[height, width\] \[48, 64\] and runs of as many pixels, got annotation 1 with run lengths")
def damaged_compressed_run_lengths(data):
    data.annotation(segmentation={"size": [HEIGHT, WIDTH], "counts": "0"})


@fault("det", r"expected masks of some pixels, got annotation 1")
def run_lengths_of_nothing(data):
    data.annotation(segmentation={"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]})


@fault("det", r"train/1.png: expected the image that .*train.json names, got no file")
def missing_image(data):
    data.image(1).unlink()


@fault("det", r"train/1.png: expected the image that .*train.json names, got a FIFO, socket or device")
def image_of_annotations_that_is_a_fifo(data):
    data.image(1).unlink()
    os.mkfifo(data.image(1))


@fault("det", r"train/1.png: expected an image, got ")
def image_that_is_text(data):
    data.image(1).write_text("hello")


@fault("det", r"train/1.png: expected 64 x 48 pixels as in .*train.json, got 48 x 64")
def image_of_another_size(data):
    Image.new("RGB", (HEIGHT, WIDTH)).save(data.image(1))


@fault("det", r"train.json: expected images of at least 100 pixels, got 4 smaller")
def images_below_min_size(data):
    data.config.train_dataloader.dataset.filter_cfg = {"filter_empty_gt": True, "min_size": 100}


@fault("det", r"nowhere.json: expected COCO annotations, got no file")
def no_file_of_the_evaluator(data):
    data.config.val_evaluator.ann_file = str(data.root / "nowhere.json")


@fault("det", r"train.json: expected the images of .*val.json, got 1 not in it")
def evaluator_of_other_images(data):
    with data.json("val") as content:
        content["images"][1]["id"] = 77
        content["annotations"] = content["annotations"][:2]
    data.config.val_evaluator.ann_file = str(data.root / "train.json")
