"""DINO's 12 epochs of AdamW, for 8 GPUs of 2 images or of 1 accumulated twice; the backbone at a tenth of the rate.

Norms and biases do not decay.
"""

_base_ = "schedule_1x.py"
param_scheduler = [dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[11], gamma=0.1)]
optim_wrapper = dict(
    clip_grad=dict(max_norm=0.1, norm_type=2),
    accumulative_counts=2,  # 1 image per GPU
    paramwise_cfg=dict(
        backbone_lr_mult=0.1,
        flat_decay_mult=0.0,  # norms and biases
    ),
)
