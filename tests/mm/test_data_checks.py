"""What the commands say of data before they begin."""

import os
import re
import subprocess
import sys
from functools import partial

import mm_runner
import numpy as np
import pytest
from mm_checks import check_data
from mmengine.config import ConfigDict
from PIL import Image
from pycocotools import mask as mask_tools

from tests.mm import coco_faults, mask_faults
from tests.mm.conftest import ROOT
from tests.mm.runs import small_config
from tests.mm.tiny_sets import HEIGHT, KINDS, WIDTH, Data


def says_of(data):
    """The one line that is said of a fault."""
    (line,) = check_data(data.config, "train")[0].lines("error")
    assert line.isprintable()
    return line


@pytest.mark.parametrize(
    ("kind", "break_it", "says"),
    [
        pytest.param(kind, *found, id=name)
        for kind, faults in (("det", coco_faults), ("seg", mask_faults))
        for name, found in faults.FAULTS.items()
    ],
)
def test_a_fault_is_one_line(kind, break_it, says, tmp_path):
    data = Data(kind, tmp_path)
    break_it(data)
    assert re.search(says, says_of(data))


@pytest.mark.parametrize(("changes", "says"), coco_faults.ANNOTATIONS)
def test_a_fault_of_an_annotation_is_one_line(changes, says, tmp_path):
    data = Data("det", tmp_path)
    data.annotation(**changes)
    assert says in says_of(data)


def test_the_manual_shows_what_is_said(tmp_path):
    """But for numbers and folders."""
    shown = (ROOT / "visattn" / "mm" / "README.md").read_text()
    plain = partial(re.sub, r"\S*/|\d+(\.\d+)?", "")
    faults = {**coco_faults.FAULTS, **mask_faults.FAULTS}
    names = {"masks_of_0_and_255": "seg", "labels_above_num_classes": "seg", "category_that_the_config_lacks": "det"}
    for name, kind in names.items():
        data = Data(kind, tmp_path / name)
        faults[name][0](data)
        assert plain(says_of(data)) in map(plain, shown.splitlines())
    for kind in KINDS:
        summary = check_data(Data(kind, tmp_path / kind).config, "train")[1]
        assert plain(summary) in map(plain, shown.splitlines())


@pytest.mark.parametrize("kind", ["det", "seg"])
def test_a_healthy_set_is_one_line(kind, tmp_path):
    findings, summary = check_data(Data(kind, tmp_path).config, "train")
    assert not findings.faults
    assert (
        summary
        == {
            "det": "data: train 4 of 4 images (4 read), 8 objects of 1 class; val 2 of 2 images (2 read), "
            "4 objects of 1 class",
            "seg": "data: train 4 images (4 read with their masks), 2 of 2 classes, 0.0 % ignored; "
            "val 2 images (2 read with their masks), 2 of 2 classes, 0.0 % ignored",
        }[kind]
    )


def coco_like(root):
    """A set as COCO publishes it: crowds, touched borders, gaps in ids, images without objects."""
    data = Data("det", root)
    with data.json() as content:
        content["categories"] = [{"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}]
        content["images"][3].update(id=581929, file_name="../train/4.png")
        for found in content["annotations"]:
            found.update(category_id=(3, 90)[found["id"] % 2])
        content["annotations"] = content["annotations"][:4]
        first, second, third, fourth = content["annotations"]
        first.update(iscrowd=1, segmentation={"size": [HEIGHT, WIDTH], "counts": [0, 99, HEIGHT * WIDTH - 99]})
        second.update(bbox=[30.25, -0.01, WIDTH - 30.24, 20.5], area=12.5)
        second.update(segmentation=[[30.25, 0, WIDTH + 0.01, 20.5, 40, 9], [1.5, 1, 9, 9.5, 5, 9]])
        mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
        mask[5:9, 3:40] = mask[20:22, 10:12] = 1
        third.update(segmentation={**mask_tools.encode(mask), "counts": mask_tools.encode(mask)["counts"].decode()})
        fourth.update(image_id=581929)
    with data.json("val") as content:
        content["categories"] = [{"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}]
        content["annotations"] = [{**found, "category_id": 90} for found in content["annotations"]]
    data.set(metainfo={"classes": ("car", "toothbrush")})
    data.heads(2)
    return data.config


def ade_like(root):
    """Masks of 0 for none and 1 to 150 as ADE20K's."""
    data = Data("seg", root)
    data.paint(range(151))
    data.set(type="ADE20KDataset", metainfo=None, reduce_zero_label=True)
    data.heads(150)
    return data.config


def voc_like(root):
    """Masks with a palette and ignored borders, of which a list names some."""
    data = Data("seg", root)
    data.paint([0, 1, 255])
    for file in data.masks():
        mask = Image.open(file)
        mask.putpalette(range(256))
        mask.save(file)
    for split in ("train", "val"):
        (data.root / f"{split}.txt").write_text("1\n2\n")
        data.config[f"{split}_dataloader"].dataset.ann_file = f"{split}.txt"
    return data.config


def cityscapes_like(root):
    """Pictures in a folder for each city, masks with a long suffix beside other files."""
    data = Data("seg", root)
    for file in data.masks():
        city = file.parent / "ulm"
        city.mkdir(exist_ok=True)
        file.rename(city / f"{file.stem}_labelTrainIds.png")
        (city / f"{file.stem}_polygons.json").write_text("{}")
        (city / f"{file.stem}_color.png").write_text("")
        image = data.image(file.stem, file.parent.name.removesuffix("_masks"))
        (image.parent / "ulm").mkdir(exist_ok=True)
        image.rename(image.parent / "ulm" / image.name)
    data.set(seg_map_suffix="_labelTrainIds.png")
    return data.config


def wrapped(root):
    """Wrappers around a set that two kinds of files make."""
    data = Data("seg", root)
    inner = data.config.train_dataloader.dataset
    both = ConfigDict(type="ConcatDataset", datasets=[inner, inner.copy()])
    data.config.train_dataloader.dataset = ConfigDict(type="RepeatDataset", times=2, dataset=both)
    return data.config


def two_classes_of_one_output(root):
    """A head of one output, which tells two classes."""
    data = Data("seg", root)
    for head in (data.config.model.decode_head, data.config.model.auxiliary_head):
        head.update(num_classes=2, out_channels=1)
        head.loss_decode.use_sigmoid = True
    return data.config


def masks_in_one_folder(root):
    """The masks of several sets together, of which one has no labels beside them."""
    data = Data("seg", root)
    for number in (1, 2):
        data.image(number, "val").rename(data.root / "val" / f"9{number}.png")
        data.mask(number, "val").rename(data.root / "train_masks" / f"9{number}.png")
    data.config.val_dataloader.dataset.data_prefix.seg_map_path = "train_masks"
    return data.config


def other_ignored_label(root):
    """A label outside of 8 bits is in no mask."""
    data = Data("seg", root)
    data.config.model.decode_head.ignore_index = -100
    return data.config


def images_alone(root):
    """Results are written for a server that has the annotations."""
    data = Data("det", root)
    with data.json("val") as content:
        del content["annotations"]
    data.config.val_evaluator.update(format_only=True, outfile_prefix=str(root))
    return data.config


def boxes_alone(root):
    """No masks where no head wants any."""
    data = Data("det", root)
    data.config.model.roi_head.pop("mask_head")
    for split in ("train", "val"):
        with data.json(split) as content:
            for found in content["annotations"]:
                del found["segmentation"]
        for step in data.config[f"{split}_dataloader"].dataset.pipeline:
            step.pop("with_mask", None)
    return data.config


def panoptic(root):
    """Pictures of segments, with a class of things and one of stuff."""
    data = Data("det", root)
    for split in ("train", "val"):
        with data.json(split) as content:
            content["categories"] = [
                {"id": 1, "name": "nucleus", "isthing": 1},
                {"id": 7, "name": "glass", "isthing": 0},
            ]
            content["annotations"] = []
            for image in content["images"]:
                ids = np.ones((HEIGHT, WIDTH), int)
                ids[4:20, 4:20] = 70_000
                picture = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
                Image.fromarray(picture).save(data.mask(image["id"], split))
                places = {1: ([0, 0, WIDTH, HEIGHT], 7), 70_000: ([4, 4, 16, 16], 1)}
                inside = [
                    {"id": number, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
                    for number, (box, category) in places.items()
                ]
                content["annotations"].append(
                    {"image_id": image["id"], "file_name": image["file_name"], "segments_info": inside}
                )
        prefix = {"img": split, "seg": f"{split}_masks"}
        data.config[f"{split}_dataloader"].dataset.data_prefix = prefix
    names = {"classes": ("nucleus", "glass"), "thing_classes": ("nucleus",), "stuff_classes": ("glass",)}
    data.set(type="CocoPanopticDataset", metainfo=names)
    data.config.model = ConfigDict(panoptic_head={"num_things_classes": 1, "num_stuff_classes": 1})
    return data


def images_of_another_format(root):
    """What a loader of one's own reads is left to it."""
    data = Data("det", root)
    data.image(1).write_bytes(b"bands")
    data.config.train_dataloader.dataset.pipeline[0].type = "LoadBands"
    return data.config


def masks_of_another_format(root):
    """Likewise."""
    data = Data("seg", root)
    Image.open(data.mask(1)).convert("RGB").save(data.mask(1))
    for step in data.config.train_dataloader.dataset.pipeline:
        if step.type == "LoadAnnotations":
            step.type = "LoadColourAnnotations"
    return data.config


PUBLISHED = [coco_like, ade_like, voc_like, cityscapes_like, lambda root: panoptic(root).config]
OWN = [wrapped, two_classes_of_one_output, masks_in_one_folder, other_ignored_label, images_alone, boxes_alone]
OWN += [images_of_another_format, masks_of_another_format]


@pytest.mark.parametrize("make", PUBLISHED + OWN)
def test_what_publishers_and_others_do_is_healthy(make, tmp_path):
    findings, _ = check_data(make(tmp_path), "train")
    assert not findings.faults


def test_panoptic_faults(tmp_path):
    data = panoptic(tmp_path)
    with data.json() as content:
        content["annotations"][0]["segments_info"][0]["id"] = 9
        del content["categories"][0]["isthing"]
    data.mask(2).unlink()
    data.config.model.panoptic_head.num_stuff_classes = 53
    lines = check_data(data.config, "train")[0].lines("error")
    said = ["categories with isthing, got", "other ids: [1, 9]", "the segments of 2.png, got no file"]
    assert len(lines) == len(said)
    assert all(any(text in line for line in lines) for text in said)


@pytest.mark.parametrize("kind", KINDS)
def test_the_nuclei_are_healthy(kind, nuclei, tmp_path):
    config = small_config(KINDS[kind], "test_dinat", nuclei, tmp_path, 1)
    findings, summary = check_data(config, "train")
    assert not findings.faults
    assert {"det": "train 35 of 35 images (35 read), 275 objects", "seg": "train 35 images (35 read"}[kind] in summary


def warn_of_an_absent_class(data):
    data.config.merge_from_dict({f"model.{head}.num_classes": 3 for head in ("decode_head", "auxiliary_head")})
    data.paint([0, 1, 255])
    data.set(metainfo={"classes": ("background", "nucleus", "debris"), "palette": []})


def warn_of_an_ignored_mask(data):
    data.paint([255], 1)


def warn_of_a_mask_of_0_and_255(data):
    data.paint([0, 255], 1)


def warn_of_one_class_to_validate(data):
    for file in data.masks()[-2:]:
        Image.new("L", (WIDTH, HEIGHT)).save(file)


def warn_of_an_id_of_0(data):
    data.annotation("val", id=0)


def warn_of_another_suffix(data):
    Image.open(data.image(1)).save(data.root / "train" / "5.BMP")


def warn_of_16_bits(data):
    Image.fromarray(np.full((HEIGHT, WIDTH), 4000, np.uint16)).save(data.image(1))


def warn_of_a_name_listed_twice(data):
    (data.root / "list.txt").write_text("1\n1\n2\n")
    data.config.train_dataloader.dataset.ann_file = "list.txt"


def warn_of_a_thin_box(data):
    data.annotation(bbox=[4, 4, 0.4, 16])


def warn_of_a_class_without_objects(data):
    for split in ("train", "val"):
        with data.json(split) as content:
            content["categories"].append({"id": 2, "name": "debris"})
    data.set(metainfo={"classes": ("nucleus", "debris")})
    data.heads(2)


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        (
            "seg",
            warn_of_an_absent_class,
            "every class in 4 masks, got none of 'debris' and 255, which is ignored, in 3",
        ),
        ("seg", warn_of_an_ignored_mask, "1.png: expected labels, got 255 alone, which is ignored; try others"),
        ("seg", warn_of_a_mask_of_0_and_255, "1.png: expected both classes, or none ignored, got 0 and 255, which is"),
        ("seg", warn_of_one_class_to_validate, "val_masks: expected every class in 2 masks, got none of 'nucleus'"),
        ("det", warn_of_an_id_of_0, "val.json: expected annotation ids from 1, got 0, which COCO's metric never finds"),
        ("seg", warn_of_another_suffix, "expected images *.png, got 1 that are left out, e.g. "),
        ("seg", warn_of_16_bits, "1.png: expected images of 8 bits, got I;16, of which mmcv takes the upper 8"),
        ("seg", warn_of_a_name_listed_twice, "list.txt: expected every image once, got 1 again, e.g. "),
        ("det", warn_of_a_thin_box, "annotation 1 with bbox [4, 4, 0.4, 16] and area 256, which mmdet leaves out"),
        ("det", warn_of_a_class_without_objects, "expected objects of every class, got none of 'debris'"),
    ],
)
def test_what_may_be_meant_is_a_warning(kind, change, says, tmp_path):
    data = Data(kind, tmp_path)
    change(data)
    findings, _ = check_data(data.config, "train")
    assert not findings.lines("error")
    assert says in findings.lines("warning")[0]


def test_a_few_bad_boxes_among_many_are_a_warning(tmp_path):
    """Published sets have some, which mmdet leaves out."""
    data = Data("det", tmp_path)
    with data.json() as content:
        first = content["annotations"][0]
        content["annotations"] = [{**first, "id": number} for number in range(20_000)]
        content["annotations"][7]["bbox"] = [4, 4, 16, 0.0]
    findings, _ = check_data(data.config, "train")
    assert not findings.lines("error")
    assert "annotation 7 with bbox [4, 4, 16, 0.0] and area 256" in findings.lines("warning")[0]


def test_large_sets_are_sampled_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("mm_checks.pictures.FEW", 2)
    for kind, says in (("det", "4 of 4 images (2 read)"), ("seg", "4 images (2 read with their masks)")):
        findings, summary = check_data(Data(kind, tmp_path / kind).config, "train", seconds=0)
        assert not findings.faults
        assert says in summary


def test_names_cannot_move_the_cursor(tmp_path):
    data = Data("det", tmp_path / "a\rb")
    with data.json() as content:
        content["images"][0]["file_name"] = "a\n\x1b[2Jb.png"
    (line,) = check_data(data.config, "train")[0].lines("error")
    assert line.isprintable()
    assert r"a\n\x1b[2Jb.png" in line


def test_a_test_looks_at_its_own_set(tmp_path):
    data = Data("seg", tmp_path)
    data.paint([0, 7], 1)
    findings, summary = check_data(data.config, "test")
    assert not findings.faults
    assert summary.startswith("data: test 2 images")


@pytest.mark.parametrize("job", ["train", "test"])
def test_a_command_ends_with_one_line(job, tmp_path, monkeypatch, capsys):
    data = Data("seg", tmp_path)
    data.paint([0, 255])
    data.config.dump(tmp_path / "own.py")
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "own.py"), *(["x.pth"] if job == "test" else [])])
    with pytest.raises(SystemExit, match="1"):
        mm_runner.main("mmseg", job, "")
    said = capsys.readouterr()
    assert said.out.startswith(f"data: {job} ")
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert not list(tmp_path.rglob("*.log"))


@pytest.mark.parametrize("dataset", ["coco", {"datasets": 3}, {"type": "ConcatDataset", "datasets": ["coco"]}])
def test_parts_of_another_type_are_one_line(dataset, tmp_path, monkeypatch, capsys):
    data = Data("det", tmp_path)
    data.config.train_dataloader = {"dataset": dataset}
    with pytest.raises(SystemExit, match="1"):
        mm_runner.check(data.config, "train")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: expected a config whose data can be read, got ")


@pytest.mark.slow
def test_two_processes_end_with_one_line(tmp_path):
    data = Data("seg", tmp_path)
    data.paint([0, 255])
    data.config.dump(tmp_path / "own.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(ROOT / "tools" / "train_seg.py"), str(tmp_path / "own.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert len(re.findall("^error: .*train_masks: expected several classes", done.stderr, re.MULTILINE)) == 1
    assert done.stdout.count("data: train 4 images (4 read with their masks), 1 of 2 classes, 50.0 % ignored") == 1
    assert "mm_runner.py" not in done.stderr  # the only traceback is torchrun's own
    assert not list(tmp_path.rglob("*.log"))
