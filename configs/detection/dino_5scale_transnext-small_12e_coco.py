# Settings of DaiShiResearch/TransNeXt at c8a9974. Official runs leave the last stage's patch embedding and norm at the
# full rate, by an oversight in the patterns of names; here the whole backbone has a tenth. Official, not reproduced
# here: box AP 56.6 (model_cards/transnext.md). Written by tools/make_mm_configs.py from tools/mm_recipes.yaml.
_base_ = ["_base_/dino_5scale.py", "_base_/coco_dino.py", "_base_/schedule_12e_transnext.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="TimmBackboneVA",
        model_name="transnext_small",
        out_norm="own",
        position_bias="interpolate",
        bias_img_size=800,
        drop_path_rate=0.5,
        pretrained=True,
    ),
    neck=dict(in_channels=[72, 144, 288, 576]),
)
train_dataloader = dict(batch_size=1)
