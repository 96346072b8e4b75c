# Settings of DaiShiResearch/TransNeXt at c8a9974. Official runs leave the last stage's patch embedding and norm at the
# full rate, by an oversight in the patterns of names; here the whole backbone has a tenth. Official numbers, not
# reproduced here: model_cards/transnext.md.
_base_ = ["_base_/dino_4scale.py", "_base_/coco_dino.py", "_base_/schedule_12e_transnext.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="transnext_tiny",
        out_norm="own",
        position_bias="interpolate",
        bias_img_size=800,
        out_indices=[1, 2, 3],
        drop_path_rate=0.3,
    ),
    neck=dict(in_channels=[144, 288, 576]),
)
train_dataloader = dict(batch_size=1)
