"""From a model to a program of plain PyTorch operations, which every target starts from."""

import contextlib
import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from visattn.ops import decompose, use_backend

Dynamic = Literal["none", "batch", "size"]
DYNAMIC: tuple[Dynamic, ...] = ("none", "batch", "size")
MOST = 2048  # pixels of a side: PyTorch wants a bound
# PyTorch reasons in ranges: of (h + padding to a multiple of 16) // 16 it knows from here on that it exceeds 1.
LEAST = 32


def least_size(model: nn.Module, channels: int) -> int:
    """Find the smallest side whose last map has two rows: PyTorch's exporter ties its convolutions to one or to more.

    Raises:
        ValueError: There is none, or the model does not tell its maps.
    """
    meta: Any = copy.deepcopy(model).to("meta")
    for side in range(2, 257):
        image = torch.empty(1, channels, side, side, device="meta")
        # what is smaller than a convolution is refused; timm's transformers refuse by assertions
        with contextlib.suppress(RuntimeError, ValueError, AssertionError):
            maps = [x for x in tree_leaves(meta(image)) if x.ndim == 4]  # of a model that returns its features
            if not maps and hasattr(meta, "forward_intermediates"):
                maps = meta.forward_intermediates(image, indices=1, intermediates_only=True)
            if maps and min(maps[-1].shape[-2:]) > 1:
                return max(side, LEAST)
    got = "none below 257 px"
    raise ValueError(f"expected a model whose last map has two rows, got {got}; try dynamic='batch'")


def trace(model: nn.Module, image: Tensor, dynamic: Dynamic, least: int) -> ExportedProgram:
    """Trace a model that needs no gradients, on an image [B, C, H, W]: a program without visattn's operations.

    Args:
        model: In evaluation mode.
        image: An example. A size that may change must not be 1 in it.
        dynamic: Which of its sizes may change: none, the batch, or batch, height and width.
        least: The smallest side, if height and width may change.
    """
    sizes = {}
    if dynamic != "none":
        sizes[0] = Dim("batch", min=1)
    if dynamic == "size":
        sizes |= {axis: Dim(name, min=least, max=MOST) for axis, name in ((2, "height"), (3, "width"))}
    with torch.no_grad(), use_backend("eager"):
        return decompose(torch.export.export(model, (image,), dynamic_shapes=(sizes,)))
