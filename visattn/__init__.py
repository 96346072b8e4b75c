"""Attention vision backbones for timm: `import visattn` registers every model with `timm.create_model`."""

from visattn import models, ops

__all__ = ["__version__", "models", "ops"]
__version__ = "0.1.0"
