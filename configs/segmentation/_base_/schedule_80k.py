"""80k iterations of AdamW, cosine decay after a warm-up; rates are for 8 GPUs."""

_base_ = "schedule_160k.py"
train_cfg = dict(max_iters=80000, val_interval=8000)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="CosineAnnealingLR", eta_min_ratio=1e-8, begin=1000, end=80000, by_epoch=False),
]
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
auto_scale_lr = dict(base_batch_size=32)
default_hooks = dict(checkpoint=dict(interval=8000))
