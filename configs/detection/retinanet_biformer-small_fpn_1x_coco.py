# Settings of rayleizhu/BiFormer at 1697bbb. Official runs are in float16, `--amp float16`. Weights to start from:
# `--weights FILE`. Official numbers, not reproduced here: model_cards/biformer.md.
_base_ = ["_base_/retinanet.py", "_base_/coco_boxes.py", "_base_/schedule_1x.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="biformer_small",
        out_indices=[1, 2, 3],
        out_norm="layer",
        n_win="detection",
        norm_eval=True,
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[128, 256, 512], start_level=0),
)
optim_wrapper = dict(optimizer=dict(weight_decay=0.0001))
