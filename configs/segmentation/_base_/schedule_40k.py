"""40k iterations of AdamW, polynomial decay; rates are for 8 GPUs."""

_base_ = "schedule_160k.py"
train_cfg = dict(max_iters=40000, val_interval=4000)
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=40000, by_epoch=False)]
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
default_hooks = dict(checkpoint=dict(interval=4000))
