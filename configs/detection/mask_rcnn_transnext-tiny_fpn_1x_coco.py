# Settings of DaiShiResearch/TransNeXt at c8a9974. The official run of the base model is in float16, `--amp float16`.
# Official numbers, not reproduced here: model_cards/transnext.md.
_base_ = ["_base_/mask_rcnn.py", "_base_/coco.py", "_base_/schedule_1x.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="transnext_tiny",
        out_norm="own",
        position_bias="interpolate",
        bias_img_size=800,
        drop_path_rate=0.4,
    ),
    neck=dict(in_channels=[72, 144, 288, 576]),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}))
