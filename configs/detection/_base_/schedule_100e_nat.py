"""Mask2Former's 100 epochs of COCO, for 8 GPUs of 2 images; the backbone at a tenth of the rate.

Norms and embeddings do not decay.
"""

_base_ = "schedule_1x.py"
train_cfg = dict(
    _delete_=True,
    type="IterBasedTrainLoop",
    max_iters=737500,
    val_interval=5000,
    dynamic_intervals=[(735001, 737500)],
)
param_scheduler = [
    dict(type="MultiStepLR", begin=0, end=737500, by_epoch=False, milestones=[655556, 710184], gamma=0.1)
]
optim_wrapper = dict(
    clip_grad=dict(max_norm=0.01, norm_type=2),
    paramwise_cfg=dict(
        backbone_lr_mult=0.1,
        norm_decay_mult=0.0,
        custom_keys={
            key: dict(decay_mult=0.0)
            for key in ["panoptic_head.query_embed", "panoptic_head.query_feat", "panoptic_head.level_embed"]
        },
    ),
)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=5000))
log_processor = dict(by_epoch=False)
