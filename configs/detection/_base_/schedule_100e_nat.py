"""Mask2Former's 100 epochs of COCO, for 8 GPUs of 2 images; the backbone at a tenth of the rate.

Norms and embeddings do not decay.
"""

train_cfg = dict(type="IterBasedTrainLoop", max_iters=737500, val_interval=5000, dynamic_intervals=[(735001, 737500)])
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="MultiStepLR", begin=0, end=737500, by_epoch=False, milestones=[655556, 710184], gamma=0.1)
]
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="BackboneOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
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
auto_scale_lr = dict(enable=False, base_batch_size=16)
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=5000, max_keep_ckpts=3),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="DetVisualizationHook"),
)
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=False)
