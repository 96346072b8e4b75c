# Efficient attention after res3, res4 and in all five levels of the FPN, as a table of arXiv:1812.01243 is told to have
# it. Our choice: the schedule and SGD of mmdet's Mask R-CNN with a ResNet-50, and keys of half the channels. Official
# numbers, not reproduced here: model_cards/resnet_ea.md.
_base_ = ["_base_/mask_rcnn.py", "_base_/coco.py", "_base_/schedule_1x.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(type="visattn.TimmBackbone", model_name="resnet50_ea", frozen_stages=1, norm_eval=True),
    neck=dict(in_channels=[256, 512, 1024, 2048], type="EfficientAttentionFPN", key_channels=128, head_count=1),
)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="SGD", lr=0.02, momentum=0.9, weight_decay=0.0001))
