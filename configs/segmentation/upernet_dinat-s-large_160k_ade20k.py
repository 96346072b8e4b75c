# Settings of SHI-Labs/Neighborhood-Attention-Transformer at d334f5b. The official run of DiNAT-Large is in float32,
# that of DiNAT_s-Large in float16. The crop of 640 is what the names of the official files say; the data that they name
# are cropped to 512. Official numbers, not reproduced here: model_cards/nat.md.
_base_ = ["_base_/upernet.py", "_base_/ade20k_640.py", "_base_/schedule_160k.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="dinat_s_large_21k",
        out_norm="layer",
        drop_path_rate=0.3,
        dilations="segmentation_640",
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
    data_preprocessor=dict(size=[640, 640]),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}))
