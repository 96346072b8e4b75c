"""Neighborhood mix by its definition: gather the values of every window, softmax, weighted sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visattn.ops.geometry import neighbors, outer_index

if TYPE_CHECKING:
    from visattn.ops.mix import MixProblem


def attend(problem: MixProblem) -> Tensor:
    """See `visattn.ops.neighborhood_mix`; `S` below is the number of tokens, `M` that of a window."""
    v, bias, axes, dtype = problem.v, problem.bias, problem.axes, problem.dtype
    found = [neighbors(axis, v.device) for axis in axes]
    index = outer_index([n.index for n in found], [a.length for a in axes])  # [S, M]
    logits = problem.logits.flatten(1, 2).to(dtype)  # [B, S, N, M]
    if bias is not None:
        widths = [2 * a.kernel_size - 1 for a in axes]
        entry = outer_index([n.displacement for n in found], widths)  # [S, M]
        logits = logits + bias.to(dtype).flatten(1)[:, entry].transpose(0, 1)  # [B, S, N, M]
    values = v.flatten(1, 2).to(dtype)[:, index]  # [B, S, M, N, C]
    out = torch.einsum("bsnm,bsmnc->bsnc", logits.softmax(-1), values)
    return out.to(v.dtype).reshape(v.shape)
