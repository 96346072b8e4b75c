"""UPerNet, as in mmsegmentation 1.2.2, without its backbone; 150 classes."""

_base_ = "encoder_decoder.py"
model = dict(decode_head=dict(type="UPerHead", in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6)))
