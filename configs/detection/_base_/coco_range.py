"""COCO 2017, boxes and masks, short sides of 640 to 800, 8 GPUs of 2 images; as mmdet 3.3.0's ResNeSt."""

_base_ = "coco.py"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True, poly2mask=False),
    dict(type="RandomChoiceResize", scales=[(1333, side) for side in range(640, 801, 32)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
