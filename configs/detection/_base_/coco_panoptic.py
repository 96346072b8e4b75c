"""COCO 2017, panoptic, crops of 1024 from 0.1 to 2 times the size; mmdet 3.3.0's for Mask2Former.

Its metric needs the panopticapi package: https://github.com/cocodataset/panopticapi.
"""

_base_ = "coco.py"
data_root = "data/coco/"
train_pipeline = [
    dict(type="LoadImageFromFile", to_float32=True),
    dict(type="LoadPanopticAnnotations", with_bbox=True, with_mask=True, with_seg=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomResize", scale=(1024, 1024), ratio_range=(0.1, 2.0), resize_type="Resize", keep_ratio=True),
    dict(
        type="RandomCrop",
        crop_size=(1024, 1024),
        crop_type="absolute",
        recompute_bbox=True,
        allow_negative_crop=True,
    ),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="LoadPanopticAnnotations"),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    dataset=dict(
        type="CocoPanopticDataset",
        ann_file="annotations/panoptic_train2017.json",
        data_prefix=dict(seg="annotations/panoptic_train2017/"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        type="CocoPanopticDataset",
        ann_file="annotations/panoptic_val2017.json",
        data_prefix=dict(seg="annotations/panoptic_val2017/"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = [
    dict(
        type="CocoPanopticMetric",
        ann_file=f"{data_root}annotations/panoptic_val2017.json",
        seg_prefix=f"{data_root}annotations/panoptic_val2017/",
    ),
    dict(type="CocoMetric", ann_file=f"{data_root}annotations/instances_val2017.json", metric=["bbox", "segm"]),
]
test_evaluator = val_evaluator
