# Settings of DaiShiResearch/TransNeXt at c8a9974. Multi-scale tests have bias_img_size=800, or
# position_bias="extrapolate", and mode="whole". Official numbers, not reproduced here: model_cards/transnext.md.
_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="transnext_base",
        out_norm="own",
        position_bias="interpolate",
        bias_img_size=512,
        drop_path_rate=0.7,
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
    test_cfg=dict(mode="slide", crop_size=[512, 512], stride=[341, 341]),
)
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}),
)
