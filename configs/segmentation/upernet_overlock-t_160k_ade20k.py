# Settings of LMMMEng/OverLoCK at 2c8ab3b. Official numbers, not reproduced here: model_cards/overlock.md.
_base_ = ["_base_/upernet.py", "_base_/ade20k_multiple.py", "_base_/schedule_160k.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="overlock_t",
        out_norm="segmentation",
        drop_path_rate=0.2,
    ),
    decode_head=dict(in_channels=[64, 128, 384, 640]),
    auxiliary_head=dict(in_channels=384),
)
