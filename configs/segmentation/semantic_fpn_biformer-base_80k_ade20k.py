# Settings of rayleizhu/BiFormer at 1697bbb. Official runs are in float16, `--amp float16`; official tests resize images
# to multiples of 32, here they keep their ratio. Weights to start from: `--weights FILE`. Official numbers, not
# reproduced here: model_cards/biformer.md.
_base_ = ["_base_/semantic_fpn.py", "_base_/ade20k.py", "_base_/schedule_80k.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="biformer_base",
        out_norm="layer",
        n_win="segmentation",
        drop_path_rate=0.3,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
train_dataloader = dict(batch_size=4)
