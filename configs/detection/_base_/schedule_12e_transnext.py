"""DINO's 12 epochs of AdamW, for 8 GPUs of 2 images or of 1 accumulated twice; the backbone at a tenth of the rate.

Norms and biases do not decay. Names of parameters are TransNeXt's, whose backbone this is for.
"""

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=12, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[11], gamma=0.1)]
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="BackboneOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=0.1, norm_type=2),
    accumulative_counts=2,  # 1 image per GPU
    paramwise_cfg=dict(
        flat_decay_mult=0.0,  # norms and biases
        custom_keys={
            "backbone": dict(lr_mult=0.1),
            **{
                key: dict(lr_mult=0.1, decay_mult=0.0)
                for key in [
                    "attn.q.bias",
                    "attn.kv.bias",
                    "attn.qkv.bias",
                    "attn.sr.bias",
                    "attn.proj.bias",
                    "attn.norm",
                    "mlp.fc1.bias",
                    "mlp.fc2.bias",
                    "mlp.dwconv.bias",
                    "norm1.weight",
                    "norm1.bias",
                    "norm2.weight",
                    "norm2.bias",
                    "patch_embed.norm",
                    "patch_embed.proj.bias",
                    "downsample.norm",
                    "downsample.reduction.bias",
                    "stages.0.norm",
                    "stages.1.norm",
                    "stages.2.norm",
                    "backbone.model.norm",
                ]
            },
        },
    ),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=3),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="DetVisualizationHook"),
)
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=True)
