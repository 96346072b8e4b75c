"""Neighborhood mix by the fused Triton kernels: softmax in PyTorch, the weighted sum in `visattn.ops.fused.depthwise`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from visattn.ops.mix import MixProblem


def can_run(problem: MixProblem) -> str | None:
    """None, or why the kernels cannot run this call."""
    return "there are no kernels for it"


def attend(problem: MixProblem) -> Tensor:
    """See `visattn.ops.neighborhood_mix`."""
    raise NotImplementedError
