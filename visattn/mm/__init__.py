"""visattn in mmdet and mmsegmentation: a config that says `custom_imports = dict(imports=["visattn.mm"])` may name

`visattn.TimmBackbone`, and `EfficientAttentionFPN`, `BackboneOptimWrapperConstructor`, `AutocastOptimWrapper` and
`PlainCheckpointHook`. The backbone is in a scope of its own, as mmsegmentation and mmpretrain have a `TIMMBackbone`;
the others are in mmengine's root registries, so that both packages find them without a prefix. `tools/install_mm.sh`
brings the packages.
"""

from visattn.mm.backbone import TimmBackbone, check_published, fit_channels
from visattn.mm.checkpoints import PlainCheckpointHook
from visattn.mm.neck import EfficientAttentionFPN
from visattn.mm.optim import AutocastOptimWrapper, BackboneOptimWrapperConstructor

__all__ = [
    "AutocastOptimWrapper",
    "BackboneOptimWrapperConstructor",
    "EfficientAttentionFPN",
    "PlainCheckpointHook",
    "TimmBackbone",
    "check_published",
    "fit_channels",
]
