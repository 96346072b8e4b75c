# A detector with masks on your own data in COCO's format. Copy this file beside itself and edit the first part:
#     python tools/train_det.py configs/detection/own_coco.py --pretrained
# As it is, it takes the nuclei of `python tools/make_small_sets.py --sets nuclei`.
_base_ = ["_base_/mask_rcnn.py", "_base_/coco.py", "_base_/schedule_1x.py", "_base_/runtime.py"]
data_root = "data/nuclei/"
classes = ("nucleus",)  # all categories of the annotations, in their order
train = dict(ann_file="train.json", data_prefix=dict(img="train/"))
val = dict(ann_file="val.json", data_prefix=dict(img="val/"))
model_name = "dinat_mini"  # any model of visattn or timm
epochs, batch_size, lr = 12, 2, 1e-4

own = dict(data_root=data_root, metainfo=dict(classes=classes))
model = dict(
    backbone=dict(type="visattn.TimmBackbone", model_name=model_name, out_norm="layer"),
    neck=dict(in_channels=[64, 128, 256, 512]),  # of dinat_mini; train_det.py puts those of another model here
    roi_head=dict(bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))),
)
train_dataloader = dict(batch_size=batch_size, dataset=dict(**train, **own))
val_dataloader = dict(dataset=dict(**val, **own))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + val["ann_file"])
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="CosineAnnealingLR", by_epoch=True, T_max=epochs, convert_to_iter_based=True),
]
optim_wrapper = dict(optimizer=dict(lr=lr))
