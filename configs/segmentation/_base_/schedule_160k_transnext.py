"""Mask2Former's 160k iterations of AdamW, for 8 GPUs of 2 images; the backbone at a tenth of the rate.

Norms, biases and embeddings do not decay.
"""

_base_ = "schedule_160k.py"
train_cfg = dict(val_interval=5000)
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=160000, by_epoch=False)]
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=0.01, norm_type=2),
    paramwise_cfg=dict(
        backbone_lr_mult=0.1,
        flat_decay_mult=0.0,  # norms and biases
        custom_keys={
            key: dict(decay_mult=0.0)
            for key in ["decode_head.query_embed", "decode_head.query_feat", "decode_head.level_embed"]
        },
    ),
)
default_hooks = dict(checkpoint=dict(interval=5000))
