"""Weight initialisation shared by the transformer families."""

from typing import Any

from timm.layers import trunc_normal_
from torch import nn


def init_weights(model: nn.Module, needs_reset: bool = True) -> None:
    """Truncated normal (std 0.02) for linear weights, zero for their biases; other modules as they reset themselves.

    Args:
        model: The model, in place.
        needs_reset: Call `reset_parameters` of the other modules. False right after construction, when they have
            just done so; True after `to_empty`.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif needs_reset:
            reset_parameters(module)


def reset_parameters(module: nn.Module) -> None:
    """Call `reset_parameters` where the module has it."""
    call: Any = getattr(module, "reset_parameters", None)
    if call is not None:
        call()
