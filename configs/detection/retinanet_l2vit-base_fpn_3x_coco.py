# Settings of ChuanyangZheng/L2ViT at fad0341. Official numbers are not known: model_cards/l2vit.md.
_base_ = ["_base_/retinanet.py", "_base_/coco_boxes_multiscale.py", "_base_/schedule_3x.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="l2vit_base",
        out_indices=[1, 2, 3],
        out_norm="layer",
        drop_path_rate=0.3,
    ),
    neck=dict(in_channels=[256, 512, 1024], start_level=0),
)
