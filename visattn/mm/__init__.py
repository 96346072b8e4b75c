"""visattn in mmdet and mmsegmentation: a config that says `custom_imports = dict(imports=["visattn.mm"])` may name

`TimmBackboneVA`, `EfficientAttentionFPN`, `BackboneOptimWrapperConstructor`, `AutocastOptimWrapper` and
`PlainCheckpointHook`. All are in mmengine's root registries, so both packages find them without a prefix.
`tools/install_mm.sh` brings the packages.
"""

from visattn.mm.backbone import TimmBackboneVA
from visattn.mm.checkpoints import PlainCheckpointHook
from visattn.mm.neck import EfficientAttentionFPN
from visattn.mm.optim import AutocastOptimWrapper, BackboneOptimWrapperConstructor

__all__ = [
    "AutocastOptimWrapper",
    "BackboneOptimWrapperConstructor",
    "EfficientAttentionFPN",
    "PlainCheckpointHook",
    "TimmBackboneVA",
]
