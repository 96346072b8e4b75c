# Settings of mmsegmentation 1.2.2, configs/resnest. The rate is for 4 GPUs. Official numbers, not reproduced here:
# model_cards/resnest.md.
_base_ = ["_base_/fcn.py", "_base_/ade20k.py", "_base_/schedule_160k.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(type="visattn.TimmBackbone", model_name="resnest101_va", output_stride=8),
    decode_head=dict(in_channels=2048),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="SGD", lr=0.01, momentum=0.9, weight_decay=0.0005))
param_scheduler = [dict(type="PolyLR", eta_min=0.0001, power=0.9, begin=0, end=160000, by_epoch=False)]
train_dataloader = dict(batch_size=4)
