"""DeepLabV3+, as in mmsegmentation 1.2.2, without its backbone; 150 classes."""

_base_ = "encoder_decoder.py"
model = dict(
    decode_head=dict(
        type="DepthwiseSeparableASPPHead",
        in_index=3,
        dilations=(1, 12, 24, 36),
        c1_in_channels=256,
        c1_channels=48,
    ),
)
