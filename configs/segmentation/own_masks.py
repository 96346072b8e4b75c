# A segmentor on your own images and masks: PNG of one channel, class numbers 0, 1, 2 ..., and 255 for what is ignored.
# Copy this file beside itself and edit the first part:
#     python tools/train_seg.py configs/segmentation/own_masks.py --pretrained
# As it is, it takes the nuclei of `python tools/make_small_sets.py --sets nuclei`.
_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_40k.py", "_base_/runtime.py"]
data_root = "data/nuclei/"
classes, palette = ("background", "nucleus"), [(0, 0, 0), (255, 220, 0)]
img_suffix = ".png"
train = dict(img_path="train", seg_map_path="train_masks")
val = dict(img_path="val", seg_map_path="val_masks")
model_name = "dinat_mini"  # any model of visattn or timm
iterations, batch_size, lr = 40000, 2, 6e-5

own = dict(type="BaseSegDataset", data_root=data_root, img_suffix=img_suffix)
own.update(metainfo=dict(classes=classes, palette=palette))
model = dict(
    backbone=dict(type="visattn.TimmBackbone", model_name=model_name, out_norm="layer"),
    # channels are those of dinat_mini; train_seg.py puts those of another model here
    decode_head=dict(in_channels=[64, 128, 256, 512], num_classes=len(classes)),
    auxiliary_head=dict(in_channels=256, num_classes=len(classes)),
)
train_dataloader = dict(batch_size=batch_size, dataset=dict(data_prefix=train, **own))
val_dataloader = dict(dataset=dict(data_prefix=val, **own))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=iterations, val_interval=iterations // 10)
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=iterations, by_epoch=False)]
optim_wrapper = dict(optimizer=dict(lr=lr))
