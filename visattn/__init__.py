"""Attention vision backbones for timm: `import visattn` registers every model with `timm.create_model`."""

from visattn import models, ops
from visattn.models import is_model, list_models
from visattn.swap import swap_attention

__all__ = ["__version__", "is_model", "list_models", "models", "ops", "swap_attention"]
__version__ = "0.1.0"
