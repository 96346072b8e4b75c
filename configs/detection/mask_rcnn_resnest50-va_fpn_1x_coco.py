# Settings of mmdet 3.3.0, configs/resnest. Official numbers, not reproduced here: model_cards/resnest.md.
_base_ = ["_base_/mask_rcnn.py", "_base_/coco_range.py", "_base_/schedule_1x.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(type="visattn.TimmBackbone", model_name="resnest50_va", frozen_stages=1),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
    data_preprocessor=dict(mean=[123.68, 116.779, 103.939], std=[58.393, 57.12, 57.375]),
    roi_head=dict(
        bbox_head=dict(
            type="Shared4Conv1FCBBoxHead",
            conv_out_channels=256,
            norm_cfg=dict(type="BN", requires_grad=True),
        ),
        mask_head=dict(norm_cfg=dict(type="BN", requires_grad=True)),
    ),
)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="SGD", lr=0.02, momentum=0.9, weight_decay=0.0001))
