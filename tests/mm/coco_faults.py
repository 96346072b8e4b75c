"""Ways to break annotations in COCO's format."""

import os
from functools import partial

from mmengine.config import ConfigDict
from PIL import Image

from tests.mm.tiny_sets import HEIGHT, WIDTH, register

SIZE = [HEIGHT, WIDTH]
RUNS = "expected [height, width] [48, 64] and runs of as many pixels, got annotation 1 with run lengths"
NUMBERS = "expected x, y, width, height as bbox, and an area, got annotation 1 with"
POLYGON = "expected polygons of 3 points and more, with an area, got annotation 1 with"
# what an annotation is changed to, and what the line says
ANNOTATIONS = [
    ({"image_id": 99}, "got annotation 1 of image 99, which is not there"),
    ({"image_id": "1"}, "got annotation 1 of image '1', which is not there"),
    ({"category_id": 7}, "train.json: expected categories [1], got annotation 1 of category 7"),
    ({"bbox": [4, 4, 0, 0]}, "expected boxes and areas above 0, got annotation 1 with bbox [4, 4, 0, 0]"),
    ({"bbox": [20, 20, -16, 16]}, "got annotation 1 with bbox [20, 20, -16, 16]"),
    ({"area": 0}, "boxes and areas above 0, got annotation 1 with bbox [4, 4, 16, 16] and area 0"),
    ({"bbox": [60, 4, 16, 16]}, "got annotation 1 with bbox [60, 4, 16, 16] (x, y, width, height) in 64 x 48 pixels"),
    ({"bbox": [400, 4, 16, 16]}, "expected boxes within the image, got annotation 1 with bbox [400, 4, 16, 16]"),
    ({"bbox": [float("nan"), 4, 16, 16]}, f"{NUMBERS} [nan, 4, 16, 16]"),
    ({"bbox": [10**400, 4, 16, 16]}, f"{NUMBERS} [1000"),
    ({"bbox": [4, 4, 16]}, f"{NUMBERS} [4, 4, 16]"),
    ({"bbox": None}, f"{NUMBERS} None"),
    ({"area": "256"}, NUMBERS),
    ({"id": [1]}, "train.json: expected annotations with id, image_id, category_id, bbox, area, got {"),
    ({"iscrowd": None}, "expected iscrowd of 0 or 1, got annotation 1 with None"),
    ({"segmentation": []}, "expected a segmentation of every object, got annotation 1 with []"),
    ({"segmentation": None}, "expected a segmentation of every object, got annotation 1 with None"),
    ({"segmentation": [[]]}, f"{POLYGON} []"),
    ({"segmentation": [[4, 4, 20, 20]]}, f"{POLYGON} [4, 4, 20, 20]"),
    ({"segmentation": [[4, 4, 20, 4, 9, 4]]}, f"{POLYGON} [4, 4, 20, 4, 9, 4]"),
    ({"segmentation": [[4, 4, 20, 4, 20, 20, 9]]}, f"{POLYGON} [4, 4, 20, 4, 20, 20, 9]"),
    (
        {"segmentation": [[float("nan"), 4, 20, 4, 20, 20]]},
        "expected polygons as lists of x and y, got annotation 1 with",
    ),
    ({"segmentation": [4, 4, 20, 4, 20, 20]}, "expected polygons as lists of x and y, got annotation 1 with"),
    ({"segmentation": "none"}, "expected polygons or run lengths, got annotation 1 with 'none'"),
    ({"segmentation": [[104, 4, 120, 4, 120, 20]]}, "got annotation 1 with a polygon out of 64 x 48 pixels"),
    ({"segmentation": {"size": SIZE[::-1], "counts": [64, 48 * 64 - 64]}}, RUNS),
    ({"segmentation": {"size": SIZE, "counts": [64, 48]}}, RUNS),
    ({"segmentation": {"size": SIZE, "counts": [-1, 48 * 64 + 1]}}, RUNS),
    ({"segmentation": {"size": SIZE, "counts": "0"}}, RUNS),
    ({"segmentation": {"size": SIZE, "counts": "é"}}, RUNS),
    ({"segmentation": {"counts": [64, 48]}}, RUNS),
    ({"segmentation": {"size": SIZE, "counts": [HEIGHT * WIDTH]}}, "expected masks of some pixels, got annotation 1"),
]
FAULTS = {}  # name: (what breaks a set, what the line says)
fault = partial(register, FAULTS)


@fault(r"train.json: expected COCO annotations, got no file")
def no_annotations_file(data):
    (data.root / "train.json").unlink()


@fault(r"train.json: expected COCO annotations, got a FIFO")
def annotations_that_are_a_fifo(data):
    (data.root / "train.json").unlink()
    os.mkfifo(data.root / "train.json")


@fault(r"train.json: expected COCO annotations, got a file that cannot be read: ")
def cut_json(data):
    file = data.root / "train.json"
    file.write_text(file.read_text()[:100])


@fault(r"train.json: expected COCO annotations, got a file that cannot be read: ")
def deep_json(data):
    (data.root / "train.json").write_text("[" * 100_000)


@fault(r"train.json: expected COCO annotations, got a list")
def json_of_something_else(data):
    (data.root / "train.json").write_text('[{"image": "1.png", "boxes": []}]')


@fault(r"train.json: expected COCO annotations, got no list of dicts under 'annotations'")
def json_without_annotations(data):
    with data.json() as content:
        del content["annotations"]


@fault(r"train.json: expected objects of the config's classes, got none in 4 images")
def no_annotations(data):
    with data.json() as content:
        content["annotations"] = []


@fault(r"train.json: expected images, got none")
def no_images(data):
    with data.json() as content:
        content.update(images=[], annotations=[])


@fault(r"train.json: expected metainfo.classes of the config to be the file's categories \['nucleus'\], got \['Nu")
def other_names(data):
    data.set(metainfo={"classes": ("Nucleus",)})


@fault(r"got 'nucleus' \(1 more like it\); try metainfo=dict\(classes=\(\"NAME\",\)\), a tuple")
def name_without_a_comma(data):
    data.set(metainfo={"classes": "nucleus"})


@fault(r"file's categories \['nucleus', 'debris'\], got \['nucleus'\], which leaves out 1 objects of \['debris'\]")
def category_that_the_config_lacks(data):
    with data.json() as content:
        content["categories"].append({"id": 2, "name": "debris"})
        content["annotations"][0]["category_id"] = 2


@fault(r"file's categories \['nucleus', 'debris'\], got another order: \['debris', 'nucleus'\]")
def classes_in_another_order(data):
    for split in ("train", "val"):
        with data.json(split) as content:
            content["categories"].append({"id": 2, "name": "debris"})
            content["annotations"][0]["category_id"] = 2
    data.set(metainfo={"classes": ("debris", "nucleus")})
    data.heads(2)


@fault(r"expected num_classes=1 in model.roi_head.\w+, as metainfo.classes, got 80 \(1 more like it\)")
def forgotten_heads(data):
    data.heads(80)


@fault("expected num_classes=1 in model.bbox_head, as metainfo.classes, got 2")
def head_of_focal_loss_with_more_classes(data):
    loss = {"type": "FocalLoss", "use_sigmoid": True}
    data.config.model = ConfigDict(bbox_head={"num_classes": 2, "loss_cls": loss})


@fault("expected num_classes=2 in model.bbox_head, as metainfo.classes, got 1")
def head_of_focal_loss_with_fewer_classes(data):
    classes_in_another_order(data)
    data.set(metainfo={"classes": ("nucleus", "debris")})
    head_of_focal_loss_with_more_classes(data)
    data.config.model.bbox_head.num_classes = 1


@fault("config.py: expected data_prefix.img, got none")
def no_folder_of_images(data):
    data.config.train_dataloader.dataset.pop("data_prefix")


@fault("config.py: expected COCO annotations, got no file")
def no_ann_file(data):
    data.config.train_dataloader.dataset.pop("ann_file")


@fault(r"train.json: expected every image id once, got 1 again, of 2.png")
def image_id_twice(data):
    with data.json() as content:
        content["images"][1]["id"] = 1
        content["annotations"] = content["annotations"][:2]


@fault(r"train.json: expected every image once, got 1.png under two ids")
def image_twice(data):
    with data.json() as content:
        content["images"][1]["file_name"] = "1.png"


@fault(r"train.json: expected every annotation id once, got 1 again")
def annotation_id_twice(data):
    with data.json() as content:
        content["annotations"][1]["id"] = 1


@fault(r"train.json: expected every id and name of a category once, got \{'id': 1, 'name': 'nucleus'\}")
def category_id_twice(data):
    with data.json() as content:
        content["categories"].insert(0, {"id": 1, "name": "debris"})


@fault(r"val.json: expected boxes within the image, got annotation \d")
def boxes_as_corners(data):
    with data.json("val") as content:
        for found in content["annotations"]:
            found["bbox"] = [30, 20, 46, 36]


@fault(r"expected objects of the config's classes, got none in 4 images")
def boxes_as_fractions(data):
    with data.json() as content:
        for found in content["annotations"]:
            found["bbox"] = [0.1, 0.1, 0.3, 0.3]


@fault(r"train.json: expected annotations with id, image_id, category_id, bbox, area, got \{")
def annotation_without_area(data):
    with data.json() as content:
        del content["annotations"][0]["area"]


@fault(r"val.json: expected annotations with id, image_id, category_id, bbox, area, iscrowd, got \{")
def results_without_iscrowd(data):
    with data.json("val") as content:
        for found in content["annotations"]:
            del found["iscrowd"]


@fault(r"train.json: expected images with id, file_name, width and height, got \{")
def image_without_size(data):
    with data.json() as content:
        del content["images"][0]["width"]


@fault(r"expected a segmentation of every object, got annotation 1 without \(7 more like it\)")
def no_segmentation(data):
    with data.json() as content:
        for found in content["annotations"]:
            del found["segmentation"]


@fault(r"train/1.png: expected the image that .*train.json names, got no file")
def missing_image(data):
    data.image(1).unlink()


@fault(r"train/1.png: expected the image that .*train.json names, got a FIFO, socket or device")
def image_of_annotations_that_is_a_fifo(data):
    data.image(1).unlink()
    os.mkfifo(data.image(1))


@fault(r"train/1.png: expected an image, got ")
def image_that_is_text(data):
    data.image(1).write_text("hello")


@fault(r"train/1.png: expected 64 x 48 pixels as in .*train.json, got 48 x 64")
def image_of_another_size(data):
    Image.new("RGB", (HEIGHT, WIDTH)).save(data.image(1))


@fault(r"train.json: expected images of at least 100 pixels, got 4 smaller")
def images_below_min_size(data):
    data.config.train_dataloader.dataset.filter_cfg = {"filter_empty_gt": True, "min_size": 100}


@fault(r"nowhere.json: expected COCO annotations, got no file")
def no_file_of_the_evaluator(data):
    data.config.val_evaluator.ann_file = str(data.root / "nowhere.json")


@fault(r"train.json: expected the images of .*val.json, got 1 not in it")
def evaluator_of_other_images(data):
    with data.json("val") as content:
        content["images"][1]["id"] = 77
        content["annotations"] = content["annotations"][:2]
    data.config.val_evaluator.ann_file = str(data.root / "train.json")
