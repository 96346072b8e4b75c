# Settings of SHI-Labs/Neighborhood-Attention-Transformer at d334f5b. Official runs are in float16, `--amp float16`, but
# that of DiNAT-Large. Official numbers, not reproduced here: model_cards/nat.md.
_base_ = ["_base_/cascade_mask_rcnn.py", "_base_/coco_multiscale.py", "_base_/schedule_3x.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="dinat_base",
        out_norm="layer",
        drop_path_rate=0.6,
        dilations="detection",
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(
    optimizer=dict(lr=7.5e-05),
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}),
)
