"""ADE20K, crops of 512, 8 GPUs of 2 images; images for tests are resized (bicubic) to sides that 32 divides."""

_base_ = "ade20k.py"
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="ResizeToMultiple", size_divisor=32, interpolation="bicubic"),
    dict(type="LoadAnnotations"),  # after the resizing: results are compared at the original size
    dict(type="PackSegInputs"),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
