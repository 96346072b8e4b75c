# Settings of SHI-Labs/Neighborhood-Attention-Transformer at d334f5b. Official code is detectron2; what its shared file
# says (rates, clipping, decay) is recalled, and is what mmsegmentation has for Mask2Former. There relative position
# biases decay, here not. Official numbers, not reproduced here: model_cards/nat.md.
_base_ = ["_base_/mask2former.py", "_base_/cityscapes_choice.py", "_base_/schedule_160k_nat.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="dinat_large_21k_11x11",
        out_norm="layer",
        drop_path_rate=0.3,
        dilations="mask2former_k11",
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536], num_classes=19, loss_cls=dict(class_weight=[1.0] * 19 + [0.1])),
    data_preprocessor=dict(size=[512, 1024]),
)
train_cfg = dict(max_iters=90000)
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=90000, by_epoch=False)]
