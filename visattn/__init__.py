"""Attention vision backbones for timm: `import visattn` registers every model with `timm.create_model`."""

from visattn import models, ops
from visattn.cam import NCHWFeatures, cam_layers, reshape_transform
from visattn.hub import Classifier, load
from visattn.models import is_model, list_models
from visattn.swap import swap_attention

__all__ = [
    "Classifier",
    "NCHWFeatures",
    "__version__",
    "cam_layers",
    "is_model",
    "list_models",
    "load",
    "models",
    "ops",
    "reshape_transform",
    "swap_attention",
]
__version__ = "0.1.0"
