"""How much a model computes."""

import copy
import itertools

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(model: nn.Module, in_chans: int, height: int, width: int) -> int:
    """FLOPs (two per multiply-add) of one image [in_chans, height, width] forward, in evaluation mode.

    Runs a twin of `model` on the meta device, which holds no weights. visattn's ops count by formulas of their own, the
    visible keys alone; the rest by PyTorch's. What a model raises that cannot run without real values passes.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    memo = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
    twin = copy.deepcopy(model, memo).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(torch.empty(1, in_chans, height, width, device="meta"))
    return counter.get_total_flops()
