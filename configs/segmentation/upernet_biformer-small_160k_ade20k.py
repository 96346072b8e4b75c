# Settings of rayleizhu/BiFormer at 1697bbb. Official runs are in float16, `--amp float16`, or float32 where that gives
# NaN. Weights to start from: `--weights FILE`. Official numbers, not reproduced here: model_cards/biformer.md.
_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="biformer_small",
        out_norm="layer",
        n_win="segmentation",
        drop_path_rate=0.3,
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}))
