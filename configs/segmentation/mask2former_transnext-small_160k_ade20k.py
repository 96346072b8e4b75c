# Settings of DaiShiResearch/TransNeXt at c8a9974. Official runs leave the last stage's patch embedding and norm at the
# full rate, by an oversight in the patterns of names; here the whole backbone has a tenth. Official numbers, not
# reproduced here: model_cards/transnext.md.
_base_ = ["_base_/mask2former.py", "_base_/ade20k_choice.py", "_base_/schedule_160k_transnext.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="transnext_small",
        out_norm="own",
        position_bias="interpolate",
        bias_img_size=512,
        drop_path_rate=0.5,
    ),
    decode_head=dict(in_channels=[72, 144, 288, 576]),
)
