# Settings of SHI-Labs/Neighborhood-Attention-Transformer at d334f5b. Official runs are in float16, `--amp float16`.
# Official numbers, not reproduced here: model_cards/nat.md.
_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="dinat_tiny",
        out_norm="layer",
        drop_path_rate=0.2,
        dilations="segmentation",
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}))
