"""Zero-padding at the bottom and right of channels-last maps, as ops that trace, script and export at any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.registration import composite


def _pad(x: Tensor, amounts: list[int]) -> Tensor:
    if all(isinstance(a, int) and a == 0 for a in amounts):
        return x
    pairs = [0, 0]
    for amount in reversed(amounts):
        pairs += [0, amount]
    return F.pad(x, pairs)


def _pad_to_at_least(x: Tensor, size: list[int]) -> Tensor:
    return _pad(x, [torch.sym_max(s - n, 0) for s, n in zip(size, x.shape[1:-1], strict=True)])


def _pad_to_multiple(x: Tensor, multiple: list[int]) -> Tensor:
    return _pad(x, [-n % m for m, n in zip(multiple, x.shape[1:-1], strict=True)])


pad_to_at_least = composite("pad_to_at_least(Tensor(a) x, int[] size) -> Tensor(a)", _pad_to_at_least)
pad_to_multiple = composite("pad_to_multiple(Tensor(a) x, int[] multiple) -> Tensor(a)", _pad_to_multiple)
