"""Halo attention by the fused Triton kernels; see `visattn.ops.fused`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops import _legacy as support
from visattn.ops.geometry import Halo


def refusal(
    q: Tensor, k: Tensor, v: Tensor, axes: tuple[Halo, Halo], rel_h: Tensor | None, rel_w: Tensor | None, *args: Any
) -> str | None:
    """Why the kernels cannot run this call."""
    return support.attention_refusal(q, v, k, rel_h, rel_w)


def _rel_pos(q: Tensor, axes: tuple[Halo, Halo], rel_h: Tensor | None, rel_w: Tensor | None) -> Tensor:
    """[B, H', W', N, R] what each query adds to the keys of a window's row and of a window's column.

    Turned round within the window so that entry i belongs to all key positions that are i modulo the window, wherever
    the query's block is: the kernels need not know it.
    """
    half, rel_pos = max(8, *(1 << (axis.window - 1).bit_length() for axis in axes)), []
    for a, (axis, table) in enumerate(zip(axes, (rel_h, rel_w), strict=True)):
        if table is None:
            rel_pos.append(q.new_zeros(()).expand(*q.shape[:-1], half))
            continue
        query = torch.arange(axis.queries, device=q.device)
        slot = torch.arange(axis.window, device=q.device) - query[:, None] // axis.queries_per_block * axis.block
        entry = slot % axis.window - query[:, None] % axis.queries_per_block + axis.window - 1  # [queries, window]
        entry = entry[:, None, None] if a == 0 else entry[:, None]
        products = q @ table.to(q.dtype).mT  # [B, H', W', N, 2 * window - 1]
        rel_pos.append(F.pad(products.gather(-1, entry.expand(*q.shape[:-1], -1)), (0, half - axis.window)))
    return torch.cat(rel_pos, dim=-1)


def halo_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: tuple[Halo, Halo],
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    mask_border: bool,
    scale: float,
) -> Tensor:
    """See `visattn.ops.halo_attention`."""
    from visattn.ops.fused.attention import flat, fused_attention

    rel_pos = None if rel_h is None and rel_w is None else flat(_rel_pos(q, axes, rel_h, rel_w))
    out, _ = fused_attention(flat(q), flat(k), flat(v), axes, scale, rel_pos=rel_pos, zero_keys=not mask_border)
    return out.view(*q.shape[:-1], v.shape[-1])
