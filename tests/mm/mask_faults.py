"""Ways to break a set of images and masks."""

import os
from functools import partial

import numpy as np
from PIL import Image

from tests.mm.tiny_sets import HEIGHT, WIDTH, register

FAULTS = {}  # name: (what breaks a set, what the line says)
fault = partial(register, FAULTS)


@fault(r"train_masks: expected several classes in 4 masks, got 'background' alone and 255, which is ignored, in")
def masks_of_0_and_255(data):
    data.paint([0, 255])


@fault(r"train_masks/1.png: expected labels below num_classes=2, or 255 to ignore, got \[7\]")
def labels_above_num_classes(data):
    data.paint([0, 1, 7], 1)


@fault(r"train_masks/\d.png: expected labels below num_classes=2.*, got \[128\] \(3 more like it\)")
def grey_masks(data):
    for number in (1, 2, 3, 4):
        data.paint([0, 1, 128], number)


@fault(r"train_masks/2.png: expected one channel of class numbers, got RGB, 3 channels")
def rgb_mask(data):
    Image.open(data.mask(2)).convert("RGB").save(data.mask(2))


@fault("val_masks/2.png: expected one channel of class numbers, got LA, 2 channels")
def mask_with_alpha(data):
    Image.open(data.mask(2, "val")).convert("LA").save(data.mask(2, "val"))


@fault("train_masks/1.png: expected a mask as PNG, got JPEG")
def jpeg_mask(data):
    Image.open(data.mask(1)).save(data.mask(1), format="JPEG")


@fault(r"train_masks/1.png: expected whole numbers of 0 to 255, got 257 in I;16")
def mask_of_16_bits(data):
    Image.fromarray(np.full((HEIGHT, WIDTH), 257, np.uint16)).save(data.mask(1))


@fault(r"train_masks/1.png: expected one channel of class numbers, got P")
def palette_read_as_colours(data):
    mask = Image.open(data.mask(1))
    mask = mask.convert("P")
    mask.save(data.mask(1))
    for step in data.config.train_dataloader.dataset.pipeline:
        if step.type == "LoadAnnotations":
            step.imdecode_backend = "cv2"


@fault(r"train_masks/3.png: expected the 64 x 48 pixels of .*train/3.png, got 48 x 64")
def turned_mask(data):
    Image.open(data.mask(3)).transpose(Image.Transpose.ROTATE_90).save(data.mask(3))


@fault(r"train_masks/1.png: expected the 48 x 64 pixels of .*train/1.png, got 64 x 48")
def image_turned_by_exif(data):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(data.image(1)).save(data.image(1), format="JPEG", exif=exif)


@fault(r"train_masks/1.png: expected the mask of .*train/1.png, got no file")
def missing_mask(data):
    data.mask(1).unlink()


@fault(r"train_masks/1.png: expected the mask of .*train/1.png, got a FIFO, socket or device")
def mask_that_is_a_fifo(data):
    data.mask(1).unlink()
    os.mkfifo(data.mask(1))


@fault(r"train_masks/1.png: expected the mask of .*train/1.png, got a broken link")
def mask_that_is_a_broken_link(data):
    data.mask(1).unlink()
    data.mask(1).symlink_to("nowhere.png")


@fault("train_masks/4.png: expected an image in .*train, got none")
def mask_without_an_image(data):
    data.image(4).unlink()


@fault("train_masks/4.png: expected an image in .*train, got none")
def image_that_is_a_fifo(data):
    data.image(4).unlink()
    os.mkfifo(data.image(4))


@fault("train/1.png: expected an image, got ")
def truncated_image(data):
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(data.image(1))
    data.image(1).write_bytes(data.image(1).read_bytes()[:5000])


@fault("train_masks/1.png: expected an image, got ")
def mask_that_is_text(data):
    data.mask(1).write_text("hello")


@fault("train_masks: expected several classes in 4 masks, got none and 255, which is ignored, in 100.0 %")
def everything_ignored(data):
    data.paint([255])


@fault("got 'background' alone and 255.*; reduce_zero_label makes 0 the ignored label")
def zero_reduced_by_mistake(data):
    data.set(reduce_zero_label=True)


@fault("train: expected images \\*.jpg, got 4 \\*.png \\(1 more like it\\); try img_suffix")
def other_suffix(data):
    data.set(img_suffix=".jpg")


@fault(r"nowhere: expected a folder of data, got no file")
def no_data_root(data):
    data.set(data_root="nowhere")


@fault(r"nowhere: expected a folder as data_prefix.seg_map_path, got no file")
def no_folder_of_masks(data):
    data.set(data_prefix={"img_path": "train", "seg_map_path": "nowhere"})


@fault("list.txt: expected a list of images, got no file")
def no_list_of_images(data):
    data.set(ann_file="list.txt")


@fault("train/2.png.png: expected the image that is listed, got no file")
def list_with_suffixes(data):
    (data.root / "list.txt").write_text("2.png\n")
    data.set(ann_file="list.txt", data_prefix={"img_path": "train", "seg_map_path": "train_masks"})


@fault("train/loop: expected every folder once, got .*train again")
def loop_of_links(data):
    (data.root / "train" / "loop").symlink_to(data.root / "train")


@fault(r"config.py: expected num_classes=2 in model.auxiliary_head, as metainfo.classes, got 150")
def forgotten_head_of_a_segmentor(data):
    data.config.model.auxiliary_head.num_classes = 150


@fault(r"config.py: expected the classes \['background', 'nucleus'\] in every set, got \['background', 'cell'\]")
def other_classes_in_val(data):
    data.config.val_dataloader.dataset.metainfo = {"classes": ("background", "cell")}


@fault(r"config.py: expected a dataset ADE20KDataset, got ValueError: .*is not a subset of")
def classes_that_a_dataset_does_not_have(data):
    data.set(type="ADE20KDataset")


@fault(r"config.py: expected reduce_zero_label=False as the dataset has it, got True in its pipeline")
def zero_reduced_by_the_pipeline(data):
    for step in data.config.train_dataloader.dataset.pipeline:
        if step.type == "LoadAnnotations":
            step.reduce_zero_label = True


@fault(r"config.py: expected 2 or, with the background, 3 values in .*class_weight, got 5")
def weights_of_other_classes(data):
    data.config.model.decode_head.loss_decode.class_weight = [1.0] * 5
