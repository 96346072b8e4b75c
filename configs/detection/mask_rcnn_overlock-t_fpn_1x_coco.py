# Settings of LMMMEng/OverLoCK at 2c8ab3b. Official numbers, not reproduced here: model_cards/overlock.md.
_base_ = ["_base_/mask_rcnn.py", "_base_/coco.py", "_base_/schedule_1x.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="overlock_t",
        out_norm="detection",
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[64, 128, 384, 640]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4), paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}))
