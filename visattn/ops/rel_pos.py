"""Relative position tables: resizing one learned for another window."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.geometry import is_symbolic, plain
from visattn.ops.registration import traced_as_one


@traced_as_one
def resize_rel_pos(table: Tensor, size: Sequence[int], mode: str = "bicubic") -> Tensor:
    """[N, h, w] -> [N, *size] by interpolation, in at least float32; the same size returns the table itself.

    Args:
        table: The table.
        size: Two ints.
        mode: "bicubic" or "bilinear", as the family's official checkpoints were carried from one window to another.
    """
    size = plain(size)
    if not is_symbolic(*size) and size == list(table.shape[-2:]):
        return table
    dtype = torch.promote_types(table.dtype, torch.float32)
    resized = F.interpolate(table[None].to(dtype), size=size, mode=mode, align_corners=False)
    return resized[0].to(table.dtype)
