"""What autocast does to an attention: its q, k and v are cast, as those of PyTorch's own, and nothing inside is.

So the result has autocast's dtype with every backend, sums and softmaxes keep the precision that a backend gives them,
and the backward pass, which runs outside of autocast, computes as the forward pass did.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple, Unpack

    Tensors = TypeVarTuple("Tensors")


def is_autocast(device: torch.device) -> bool:
    """Tell whether autocast is on for tensors of `device`."""
    if not torch._C._is_any_autocast_enabled():
        return False
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _cast(x: Any, device: torch.device) -> Any:
    """Cast one tensor, or pass on what is none."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device.type))


def to_autocast(*tensors: Unpack[Tensors]) -> tuple[Unpack[Tensors]]:
    """Cast the tensors to the dtype of autocast where it is on for the first one's device.

    float64 stays, as in PyTorch, and so does what is None.
    """
    first, found = tensors[0], tensors
    if isinstance(first, Tensor) and is_autocast(first.device):
        found = tuple(_cast(x, first.device) for x in tensors)
    return found


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off for what an op does inside."""
    if is_autocast(device):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
