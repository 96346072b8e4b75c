"""DeepLabV3, as in mmsegmentation 1.2.2, without its backbone; 150 classes."""

_base_ = "encoder_decoder.py"
model = dict(decode_head=dict(type="ASPPHead", in_index=3, dilations=(1, 12, 24, 36)))
