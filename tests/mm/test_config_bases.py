"""Base configs hold no backbone, and are what mmdet and mmsegmentation ship but for what is said here."""

import re
import warnings
from fnmatch import fnmatch
from pathlib import Path

import mmdet
import mmseg
import pytest
import torch
from mmdet.registry import TRANSFORMS as DET_TRANSFORMS
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from mmseg.registry import TRANSFORMS as SEG_TRANSFORMS

CONFIGS = Path(__file__).parents[2] / "configs"
BASES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/_base_/*.py"))


def bases_of(base):
    return re.findall('^_base_ = "?(.*?)"?$', (CONFIGS / base).read_text(), re.MULTILINE)


@pytest.mark.parametrize("base", BASES)
def test_a_base_is_one_file_or_what_differs_from_one_and_has_no_backbone(base):
    config = Config.fromfile(CONFIGS / base)
    for other in bases_of(base):
        assert bases_of(f"{base.partition('/')[0]}/_base_/{other}") == []
    assert "backbone" not in config.get("model", {})
    if not Path(base).stem.startswith(("mask", "cascade", "mask2former")):  # heads that take more to say
        assert len((CONFIGS / base).read_text().splitlines()) <= 66


# Each base beside the file of mmdet or mmsegmentation that it says it is, and where it differs, as a pattern of keys.
# Zero labels are reduced where the dataset says so; the key of the transform of the same name is deprecated.
SWIN = "swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
LARGE = "mask2former_swin-l-in22k-384x384-pre_8xb2-160k_ade20k-640x640.py"
OWN = ["*.backbone*", "*.in_channels", "*.num_classes", "*.norm_cfg.type", "model.data_preprocessor.size"]
OWN += ["*.reduce_zero_label"]
COUNTERPARTS = {
    "detection/mask_rcnn": ("_base_/models/mask-rcnn_r50_fpn.py", []),
    "detection/cascade_mask_rcnn": ("_base_/models/cascade-mask-rcnn_r50_fpn.py", ["model.roi_head.bbox_head.*"]),
    "detection/retinanet": ("_base_/models/retinanet_r50_fpn.py", []),
    "detection/dino_4scale": ("dino/dino-4scale_r50_8xb2-12e_coco.py", ["model.num_feature_levels"]),
    "detection/dino_5scale": ("dino/dino-5scale_swin-l_8xb2-12e_coco.py", []),
    "detection/mask2former": ("mask2former/mask2former_r50_8xb2-lsj-50e_coco.py", ["*.seg_pad_value"]),
    "detection/mask2former_panoptic": ("mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py", []),
    "detection/coco": ("_base_/datasets/coco_instance.py", []),
    "detection/coco_boxes": ("_base_/datasets/coco_detection.py", []),
    "detection/coco_multiscale": ("swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py", []),
    "detection/coco_range": ("resnest/mask-rcnn_s50_fpn_syncbn-backbone+head_ms-1x_coco.py", []),
    "detection/coco_dino": ("dino/dino-4scale_r50_8xb2-12e_coco.py", []),
    "detection/coco_jitter": ("mask2former/mask2former_r50_8xb2-lsj-50e_coco.py", ["*.data_prefix.seg"]),
    "detection/coco_panoptic": ("mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py", ["*.resize_type"]),
    "detection/schedule_1x": ("_base_/schedules/schedule_1x.py", ["optim_wrapper.*"]),
    "detection/schedule_12e_transnext": ("dino/dino-4scale_r50_8xb2-12e_coco.py", ["optim_wrapper.*"]),
    "segmentation/upernet": ("_base_/models/upernet_swin.py", []),
    "segmentation/semantic_fpn": ("_base_/models/fpn_r50.py", []),
    "segmentation/fcn": ("_base_/models/fcn_r50-d8.py", []),
    "segmentation/pspnet": ("_base_/models/pspnet_r50-d8.py", []),
    "segmentation/deeplabv3": ("_base_/models/deeplabv3_r50-d8.py", []),
    "segmentation/deeplabv3plus": ("_base_/models/deeplabv3plus_r50-d8.py", []),
    "segmentation/mask2former": (
        "mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py",
        ["*.im2col_step", "*.add_identity"],
    ),
    "segmentation/ade20k": ("_base_/datasets/ade20k.py", ["train_dataloader.batch_size"]),
    "segmentation/ade20k_640": ("_base_/datasets/ade20k_640x640.py", ["train_dataloader.batch_size"]),
    "segmentation/ade20k_choice": ("mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py", []),
    "segmentation/ade20k_640_choice": (f"mask2former/{LARGE}", []),
    "segmentation/cityscapes_choice": ("mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py", []),
    "segmentation/schedule_160k": (SWIN, ["optim_wrapper.paramwise_cfg"]),
}
PARTS = [
    ["model"],
    ["train_dataloader", "val_dataloader", "test_dataloader", "val_evaluator", "test_evaluator", "tta_pipeline"],
    ["train_cfg", "val_cfg", "test_cfg", "param_scheduler", "optim_wrapper", "auto_scale_lr"],
]


def differences(ours, theirs, where):
    """The keys at which two values differ; None, False and "" stand for what is not said."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [d for key in {**ours, **theirs} for d in differences(ours.get(key), theirs.get(key), f"{where}.{key}")]
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
        return [d for a, b in zip(ours, theirs, strict=True) for d in differences(a, b, where)]
    return [] if ours == theirs or not (ours or theirs) else [where]


@pytest.mark.parametrize("base", COUNTERPARTS)
def test_a_base_is_what_mmdet_or_mmsegmentation_ships(base):
    file, known = COUNTERPARTS[base]
    folder, _, name = base.partition("/")
    package = mmdet if folder == "detection" else mmseg
    ours = Config.fromfile(CONFIGS / folder / "_base_" / f"{name}.py")
    theirs = Config.fromfile(Path(package.__file__).parent / ".mim" / "configs" / file)
    keys = next(keys for keys in PARTS if keys[0] in ours)
    found = [d for key in keys if key in theirs for d in differences(ours.get(key), theirs[key], key)]
    allowed = [*OWN, *known, "optim_wrapper.constructor", "tta_pipeline*", "*.num_workers", "model.pretrained"]
    assert [d for d in found if not any(fnmatch(d, pattern) for pattern in allowed)] == []


@pytest.mark.parametrize("base", [b for b in BASES if re.search("_base_/(coco|ade20k|cityscapes)", b)])
def test_the_steps_of_the_data_exist(base):
    config = Config.fromfile(CONFIGS / base)
    transforms = DET_TRANSFORMS if base.startswith("detection") else SEG_TRANSFORMS
    if "panoptic" in base:
        pytest.importorskip("panopticapi", reason="mmdet needs https://github.com/cocodataset/panopticapi here")
    init_default_scope("mmdet" if base.startswith("detection") else "mmseg")
    for split in ("train", "val", "test"):
        for step in config[f"{split}_dataloader"].dataset.pipeline:
            transforms.build(step)
    for step in config.get("tta_pipeline", []):
        transforms.build(step)


@pytest.mark.parametrize(
    ("leaf", "lrs"),
    [
        ("segmentation/upernet_nat-mini_160k_ade20k.py", {0: 6e-11, 1500: 6e-5, 17350: 5.4e-5}),
        ("segmentation/semantic_fpn_biformer-small_80k_ade20k.py", {0: 2e-5, 1000: 2e-4, 20750: 1.7071e-4}),
        ("segmentation/semantic_fpn_agent-pvt-tiny_40k_ade20k.py", {0: 2e-4, 20000: 2e-4 * 0.5**0.9}),
    ],
)
def test_rates_at_the_start_of_a_run(leaf, lrs):
    config = Config.fromfile(CONFIGS / leaf)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.optim_wrapper.optimizer.lr)
    optimizer.step()
    steps = [PARAM_SCHEDULERS.build({**s, "optimizer": optimizer, "verbose": False}) for s in config.param_scheduler]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for iteration in range(max(lrs) + 1):
            if iteration in lrs:
                assert optimizer.param_groups[0]["lr"] == pytest.approx(lrs[iteration], rel=1e-3, abs=1e-8), iteration
            for step in steps:
                step.step()
