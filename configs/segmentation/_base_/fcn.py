"""FCN, as in mmsegmentation 1.2.2, without its backbone; 150 classes."""

_base_ = "encoder_decoder.py"
model = dict(decode_head=dict(type="FCNHead", in_index=3, num_convs=2, concat_input=True))
