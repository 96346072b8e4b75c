# Settings of LeapLabTHU/Agent-Attention at 207ce3e. Official numbers, not reproduced here: model_cards/pvt.md.
_base_ = ["_base_/retinanet.py", "_base_/coco_boxes.py", "_base_/schedule_1x.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="agent_pvt_large",
        attention_args=[dict(num_agents=n, agent_size=(s, s)) for n, s in ((9, 12), (16, 16), (49, 28), (49, 28))],
        drop_path_rate=0.3,
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
optim_wrapper = dict(optimizer=dict(weight_decay=0.0001))
