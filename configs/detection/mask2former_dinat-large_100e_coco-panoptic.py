# Settings of SHI-Labs/Neighborhood-Attention-Transformer at d334f5b. Official code is detectron2; what its shared file
# says (rates, clipping, jitter) is recalled, and is what mmdet has for Mask2Former. There relative position biases
# decay, here not. Official numbers, not reproduced here: model_cards/nat.md.
_base_ = [
    "_base_/mask2former_panoptic.py",
    "_base_/coco_panoptic.py",
    "_base_/schedule_100e_nat.py",
    "_base_/runtime.py",
]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="dinat_large_21k_11x11",
        out_norm="layer",
        drop_path_rate=0.3,
        dilations="mask2former_k11",
    ),
    panoptic_head=dict(in_channels=[192, 384, 768, 1536], num_queries=200),
)
