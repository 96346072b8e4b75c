# Settings of LeapLabTHU/Agent-Attention at 207ce3e. Official numbers, not reproduced here: model_cards/swin_va.md.
_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        type="visattn.TimmBackbone",
        model_name="agent_swin_base",
        out_norm="layer",
        always_shift=True,
        attention_args=[dict(num_agents=n, agent_size=(s, s)) for n, s in ((9, 9), (16, 12), (49, 14), (49, 7))],
        drop_path_rate=0.5,
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            key: dict(decay_mult=0.0)
            for key in ["norm", "an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias"]
        },
    ),
)
