# Settings of mmdet 3.3.0, configs/resnest. Official numbers, not reproduced here: model_cards/resnest.md.
_base_ = ["_base_/cascade_mask_rcnn.py", "_base_/coco_range.py", "_base_/schedule_1x.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(type="visattn.TimmBackbone", model_name="resnest101_va", frozen_stages=1),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
    data_preprocessor=dict(mean=[123.68, 116.779, 103.939], std=[58.393, 57.12, 57.375]),
    roi_head=dict(
        bbox_head=[
            dict(head, reg_class_agnostic=True, reg_decoded_bbox=False, loss_bbox=dict(type="SmoothL1Loss", beta=1.0))
            for head in _base_.model.roi_head.bbox_head
        ],
        mask_head=dict(norm_cfg=dict(type="BN", requires_grad=True)),
    ),
)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="SGD", lr=0.02, momentum=0.9, weight_decay=0.0001))
