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
    """Whether autocast is on for tensors of `device`."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def to_autocast(*tensors: Unpack[Tensors]) -> tuple[Unpack[Tensors]]:
    """Cast the tensors to autocast's dtype where it is on; float64 stays, as in PyTorch, and so does what is None."""
    found: Any = tuple(
        t.to(torch.get_autocast_dtype(t.device.type))
        if isinstance(t, Tensor)
        and t.is_floating_point()
        and t.dtype != torch.float64
        and is_autocast(t.device)
        else t
        for t in tensors
    )
    return found


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off for what an op does inside."""
    return (
        torch.autocast(device.type, enabled=False)
        if is_autocast(device)
        else contextlib.nullcontext()
    )
