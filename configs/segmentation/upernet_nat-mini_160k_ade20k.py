# Settings of SHI-Labs/Neighborhood-Attention-Transformer at d334f5b. Official runs are in float16, `--amp float16`.
# Official, not reproduced here: mIoU 45.1, mIoU (multi-scale) 46.4 (model_cards/nat.md). Written by
# tools/make_mm_configs.py from tools/mm_recipes.yaml.
_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(type="TimmBackboneVA", model_name="nat_mini", out_norm="layer", drop_path_rate=0.2, pretrained=True),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(
    optimizer=dict(lr=6e-05, weight_decay=0.01),
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}),
)
