"""The small sets: every number in them against the pictures that they are made of, and what the maker refuses."""

import json
import zipfile
from collections import Counter
from pathlib import Path

import make_small_sets as maker
import mmdet.registry
import mmdet.utils
import mmseg.registry
import mmseg.utils
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as coco_mask

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Folders of the sets, made anew."""
    out = tmp_path_factory.mktemp("data")

    def folder(name):
        try:
            return maker.make(name, out)
        except maker.DownloadError as error:
            pytest.skip(str(error))

    return folder


@pytest.fixture(scope="session")
def microscope(made):
    """The nuclei's folder, their image and their labels."""
    folder, files = made("nuclei"), maker.fetch(maker.STARDIST)
    return folder, *(np.asarray(Image.open(files / name)).astype(int) for name in ("img2d.tif", "mask2d.tif"))


def read(folder, split):
    content = json.loads((folder / f"{split}.json").read_text())
    objects = {image["id"]: [] for image in content["images"]}
    for found in content["annotations"]:
        objects[found["image_id"]].append(found)
    return {image["file_name"]: (image, objects[image["id"]]) for image in content["images"]}


def nuclei_places(names):
    return {name: (int(name[1:4]), int(name[6:9])) for name in names}


def test_nuclei_masks_are_the_labels(microscope):
    """Every pixel of every tile belongs to the object that the original says, boxes are tight, areas add up."""
    folder, _, labels = microscope
    assert len(np.unique(labels)) - 1 == 125
    sizes = Counter(labels.ravel().tolist())
    for split, tiles in (("train", 35), ("val", 4)):
        images = read(folder, split)
        assert len(images) == tiles
        for name, (y, x) in nuclei_places(images).items():
            tile = labels[y : y + 128, x : x + 128]
            seen = np.zeros_like(tile)
            for found in images[name][1]:
                code = coco_mask.frPyObjects(found["segmentation"], 128, 128)
                assert found["bbox"] == coco_mask.toBbox(code).tolist()
                assert found["area"] == coco_mask.area(code)
                assert found["iscrowd"] == (found["area"] < sizes[found["object"]] / 4)
                seen += coco_mask.decode(code) * found["object"]
            np.testing.assert_array_equal(seen, tile)
            semantic = np.asarray(Image.open(folder / f"{split}_masks" / name))
            np.testing.assert_array_equal(semantic, tile > 0)
            assert sum(found["area"] for found in images[name][1]) == semantic.sum()


def test_nuclei_splits_share_no_pixel_and_cover_all(microscope):
    folder, _, labels = microscope
    covered = {}
    for split in ("train", "val"):
        covered[split] = np.zeros(labels.shape, int)
        for y, x in nuclei_places(read(folder, split)).values():
            covered[split][y : y + 128, x : x + 128] += 1
    assert not (covered["train"].astype(bool) & covered["val"].astype(bool)).any()
    assert (covered["train"] + covered["val"]).all()
    assert covered["val"].max() == 1


def test_nuclei_keep_every_grey_level(microscope):
    """Each of 16 bits' levels has one of 8 bits, in the same order; the whole range is in use."""
    folder, image, _ = microscope
    levels = {}
    for split in ("train", "val"):
        for name, (y, x) in nuclei_places(read(folder, split)).items():
            tile = np.asarray(Image.open(folder / split / name))
            assert tile.shape == (128, 128, 3)
            assert (tile == tile[..., :1]).all()
            for pair in set(zip(image[y : y + 128, x : x + 128].ravel(), tile[..., 0].ravel(), strict=True)):
                levels.setdefault(pair[0], set()).add(int(pair[1]))
    grey = [levels[level] for level in sorted(levels)]
    assert all(len(found) == 1 for found in grey)
    flat = [found.pop() for found in grey]
    assert flat == sorted(set(flat))
    assert (flat[0], flat[-1]) == (0, 255)


def test_trees_are_the_boxes(made):
    """Every pixel is in one tile of one split, and the pieces of every box give the box."""
    folder, files = made("trees"), maker.fetch(maker.DEEPFOREST)
    images = {split: read(folder, split) for split in ("train", "val")}
    assert [len(found) for found in images.values()] == [56, 14]
    seen = []
    for stem in maker.TREES:
        original = np.asarray(Image.open(files / f"{stem}.png").convert("RGB"))
        boxes = maker.read_boxes(files / f"{stem}.xml")
        wholes = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        seen.append(len(boxes))
        again, times, areas = np.zeros_like(original), np.zeros(original.shape[:2], int), np.zeros_like(wholes)
        tiles = [(part, name) for part, found in images.items() for name in found if name.startswith(f"{stem}_y")]
        for split, name in tiles:
            image, found = images[split][name]
            y, x = (int(part[1:]) for part in name.removesuffix(".png").rsplit("_", 2)[1:])
            place = slice(y, y + image["height"]), slice(x, x + image["width"])
            again[place] = np.asarray(Image.open(folder / split / name))
            times[place] += 1
            for tree in found:
                left, top, width, height = tree["bbox"]
                x0, y0, x1, y1 = boxes[tree["object"]]
                assert tree["area"] == width * height > 0
                assert (left + x, top + y) == (max(x0, x), max(y0, y))
                assert (left + x + width, top + y + height) == (min(x1, place[1].stop), min(y1, place[0].stop))
                assert tree["iscrowd"] == (tree["area"] < wholes[tree["object"]] / 4)
                areas[tree["object"]] += tree["area"]
        assert (times == 1).all()
        np.testing.assert_array_equal(again, original)
        np.testing.assert_array_equal(areas, wholes)
    assert seen == [574, 279, 61, 37]


@pytest.mark.parametrize("file", ["detection/_base_/nuclei.py", "detection/_base_/trees.py"])
def test_detection_config(made, file):
    """mmdet gives every object that is not to be ignored, and the truth as prediction scores 1."""
    mmdet.utils.register_all_modules()
    name = Path(file).stem
    folder, config = made(name), Config.fromfile(ROOT / "configs" / file)
    assert config.data_root == f"data/{name}/"
    masks = "segm" in config.val_evaluator.metric
    config.val_evaluator.ann_file = str(folder / "val.json")
    metric = mmdet.registry.METRICS.build(config.val_evaluator)
    for split in ("train", "val"):
        part = config[f"{split}_dataloader"].dataset
        part.data_root = f"{folder}/"
        data = mmdet.registry.DATASETS.build(part)
        images = read(folder, split)
        kept = {name: found for name, (_, found) in images.items() if found or split == "val"}
        assert len(data) == len(kept)
        count = 0
        for item in data:
            sample = item["data_samples"]
            truth = sample.gt_instances
            count += len(truth)
            if split == "train":
                assert tuple(item["inputs"].shape[1:]) == sample.img_shape
                assert max(sample.img_shape) == config.train_pipeline[2].scale[0]
                continue
            scores = torch.ones(len(truth))
            found = {"bboxes": truth.bboxes.tensor, "labels": truth.labels, "scores": scores}
            if masks:
                found["masks"] = truth.masks.to_tensor(torch.bool, "cpu")
            metric.process({}, [{"pred_instances": found, "img_id": sample.img_id, "ori_shape": sample.ori_shape}])
        assert count == sum(not found["iscrowd"] for image in kept.values() for found in image)
    metric.dataset_meta = data.metainfo
    scores = metric.evaluate(len(data))
    assert all(scores[f"coco/{kind}_mAP"] == 1.0 for kind in (("bbox", "segm") if masks else ("bbox",)))


def test_segmentation_config(made):
    mmseg.utils.register_all_modules()
    folder, config = made("nuclei"), Config.fromfile(ROOT / "configs" / "segmentation/_base_/nuclei.py")
    for split, tiles in (("train", 35), ("val", 4)):
        part = config[f"{split}_dataloader"].dataset
        part.data_root = f"{folder}/"
        data = mmseg.registry.DATASETS.build(part)
        assert len(data) == tiles
        for item in data:
            sample = item["data_samples"]
            truth = sample.gt_sem_seg.data[0].numpy()
            assert tuple(item["inputs"].shape[1:]) == (256, 256)
            assert set(np.unique(truth)) == {0, 1}
            if split == "val":
                name = Path(sample.img_path).name
                np.testing.assert_array_equal(truth, np.asarray(Image.open(folder / "val_masks" / name)))


def test_made_once(made, monkeypatch):
    """A set that is there stays as it is, and needs no download."""
    folder = made("nuclei")
    before = (folder / "val.json").stat().st_mtime_ns
    monkeypatch.setattr(maker, "fetch", None)
    assert maker.make("nuclei", folder.parent) == folder
    assert (folder / "val.json").stat().st_mtime_ns == before
    licences = (folder.parent / "LICENCES.txt").read_text()
    assert all(f"{wheel.package} {wheel.version}" in licences for wheel in (maker.STARDIST, maker.DEEPFOREST))


def test_no_network(tmp_path, monkeypatch, capsys):
    """A clear error, and no half-made set."""
    monkeypatch.setenv("VISATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(maker.DownloadError, match=r"expected pip to download stardist==0\.9\.2, got: ERROR.*try again"):
        maker.make("nuclei", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    with pytest.raises(SystemExit):
        maker.main(["--sets", "nuclei", "--out", str(tmp_path / "data")])
    assert "access to PyPI" in capsys.readouterr().err


@pytest.mark.parametrize(("member", "message"), [("img2d.tif", "SHA-256"), ("other.tif", "got none")])
def test_another_wheel_is_refused(tmp_path, monkeypatch, member, message):
    """Files that are not the known ones never get into the cache."""
    monkeypatch.setenv("VISATTN_CACHE", str(tmp_path))

    def download(wheel, folder):
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr(f"{wheel.folder}/{member}", b"not this")
        return folder / "x.whl"

    monkeypatch.setattr(maker, "download", download)
    with pytest.raises(maker.WrongFileError, match=message):
        maker.fetch(maker.STARDIST)
    assert not list(tmp_path.rglob("*.tif"))


def test_a_damaged_cache_is_filled_again(tmp_path, monkeypatch, made):
    made("nuclei")
    files = maker.fetch(maker.STARDIST)
    monkeypatch.setenv("VISATTN_CACHE", str(tmp_path))

    def download(wheel, folder):
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            for name in wheel.sums:
                archive.write(files / name, f"{wheel.folder}/{name}")
            archive.writestr("stardist/evil.py", b"")
        return folder / "x.whl"

    monkeypatch.setattr(maker, "download", download)
    folder = maker.fetch(maker.STARDIST)
    (folder / "img2d.tif").write_bytes(b"damaged")
    assert maker.fetch(maker.STARDIST) == folder
    assert {file.name for file in folder.iterdir()} == set(maker.STARDIST.sums)
    assert (folder / "img2d.tif").read_bytes() == (files / "img2d.tif").read_bytes()
    monkeypatch.setattr(maker, "download", None)
    maker.fetch(maker.STARDIST)
