# Settings of SHI-Labs/Neighborhood-Attention-Transformer at d334f5b. Official runs are in float16, `--amp float16`.
# Official numbers, not reproduced here: model_cards/nat.md.
_base_ = ["_base_/mask_rcnn.py", "_base_/coco_multiscale.py", "_base_/schedule_3x.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="nat_small",
        out_norm="layer",
        drop_path_rate=0.35,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}))
