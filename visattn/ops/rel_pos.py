"""Relative position tables: resizing one learned for another window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.registration import composite


def _resize_rel_pos(table: Tensor, size: list[int], mode: str = "bicubic") -> Tensor:
    if all(isinstance(n, int) and n == m for n, m in zip(size, table.shape[-2:], strict=True)):
        return table
    dtype = torch.promote_types(table.dtype, torch.float32)
    resized = F.interpolate(table[None].to(dtype), size=size, mode=mode, align_corners=False)
    return resized[0].to(table.dtype)


# table [N, h, w]; `mode` "bicubic" or "bilinear", as the family's official checkpoints were carried from one window to
# another. The same size returns the table itself.
resize_rel_pos = composite(
    "resize_rel_pos(Tensor(a) table, SymInt[2] size, str mode='bicubic') -> Tensor(a)", _resize_rel_pos
)
