# Settings of SHI-Labs/Neighborhood-Attention-Transformer at d334f5b. Official runs are in float16, `--amp float16`.
# Official, not reproduced here: box AP 47.2, mask AP 42.5 (model_cards/nat.md). Written by tools/make_mm_configs.py
# from tools/mm_recipes.yaml.
_base_ = ["_base_/mask_rcnn.py", "_base_/coco_multiscale.py", "_base_/schedule_3x.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="TimmBackboneVA",
        model_name="dinat_mini",
        out_norm="layer",
        drop_path_rate=0.2,
        dilations="detection",
        pretrained=True,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(
    optimizer=dict(lr=0.0001, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}),
)
