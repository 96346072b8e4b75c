"""Window attention as one batched attention: pad to whole windows, reshape, attend, reshape back, crop.

Windows without empty slots need no mask, and the bias broadcasts over them. With empty slots the mask differs from
window to window but not from image to image: windows and heads are then the batch of
`scaled_dot_product_attention` and images its heads, so that bias and mask are held once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.geometry import Partition


def _pad(x: Tensor, axes: tuple[Partition, ...]) -> Tensor:
    pads = [0, 0, 0, 0]
    for axis in reversed(axes):
        windows, slots, empty = axis.layout()
        pads += [empty, windows * slots - empty - axis.length]
    return F.pad(x, pads) if any(pads) else x


def _order(axes: tuple[Partition, ...]) -> tuple[list[int], list[int]]:
    """Where the windows and where the slots of each axis lie in [B, a_1, b_1, a_2, b_2, ..., N, D]."""
    first = [1 + 2 * a for a in range(len(axes))]
    windows = [f + axis.is_grid for f, axis in zip(first, axes, strict=True)]
    slots = [f + (not axis.is_grid) for f, axis in zip(first, axes, strict=True)]
    return windows, slots


def _cut(x: Tensor, axes: tuple[Partition, ...], windows_first: bool) -> Tensor:
    """[B, *spatial, N, D] -> [B, T, N, t, D] (T windows of t slots), or [T, N, B, t, D]; one copy."""
    x = _pad(x, axes)
    for a, axis in reversed(list(enumerate(axes, start=1))):
        windows, slots, _ = axis.layout()
        x = x.unflatten(a, (slots, windows) if axis.is_grid else (windows, slots))
    windows, slots = _order(axes)
    head, last = x.ndim - 2, x.ndim - 1
    x = x.permute(*((*windows, head, 0) if windows_first else (0, *windows, head)), *slots, last)
    number = len(axes)
    x = x.flatten(-1 - number, -2)
    return x.flatten(0, number - 1) if windows_first else x.flatten(1, number)


def _join(x: Tensor, axes: tuple[Partition, ...], windows_first: bool) -> Tensor:
    """Inverse of `_cut`."""
    layouts = [axis.layout() for axis in axes]
    x = x.unflatten(-2, [slots for _, slots, _ in layouts])
    x = x.unflatten(0 if windows_first else 1, [windows for windows, _, _ in layouts])
    windows, slots = _order(axes)
    head, last = x.ndim - 2, x.ndim - 1
    order = [*((*windows, head, 0) if windows_first else (0, *windows, head)), *slots, last]
    x = x.permute(*sorted(range(x.ndim), key=order.__getitem__))
    for a in range(1, len(axes) + 1):
        x = x.flatten(a, a + 1)
    for a, axis in enumerate(axes, start=1):
        x = x.narrow(a, axis.layout()[2], axis.length)
    return x.contiguous()


def _hidden(axes: tuple[Partition, ...], device: torch.device) -> Tensor:
    """[T, 1, 1, t] slots without a token."""
    occupied = torch.ones((), dtype=torch.bool, device=device)
    for a, axis in enumerate(axes):
        part = axis.occupied(device)
        shape = [1] * (2 * len(axes))
        shape[a], shape[a + len(axes)] = part.shape
        occupied = occupied & part.reshape(shape)
    return ~occupied.flatten(0, len(axes) - 1).flatten(1)[:, None, None, :]


def _read_bias(bias: Tensor, axes: tuple[Partition, ...]) -> Tensor:
    """[N, t, t]: the table [N, 2w-1, ...] read at the displacement of every query and key."""
    for a, axis in enumerate(axes):
        slots, rank = axis.layout()[1], torch.arange(axis.layout()[1], device=bias.device)
        where = rank - rank[:, None] + axis.window - 1  # [query, key]
        bias = bias.index_select(1 + 2 * a, where.flatten()).unflatten(1 + 2 * a, (slots, slots))
    number = len(axes)
    bias = bias.permute(0, *range(1, 2 * number, 2), *range(2, 2 * number + 1, 2))
    return bias.flatten(1 + number).flatten(1, number)


def window_eager(
    q: Tensor, k: Tensor, v: Tensor, axes: tuple[Partition, ...], bias: Tensor | None, scale: float
) -> Tensor:
    """See `visattn.ops.window_attention`. T windows of t slots."""
    masked = any(windows * slots != axis.length for axis in axes for windows, slots, _ in [axis.layout()])
    # A bias that trains would push SDPA off its flash path: explicit products are then faster on a CPU.
    explicit = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    dtype = torch.promote_types(q.dtype, torch.float32) if explicit else q.dtype
    table = None if bias is None else _read_bias(bias.to(dtype), axes)
    windows_first = masked and not explicit

    query, key, value = (_cut(x, axes, windows_first) for x in (q, k, v))
    hidden = _hidden(axes, q.device) if masked else None
    if explicit:
        scores = (query * scale @ key.mT).to(dtype).add_(table)
        if hidden is not None:
            scores = scores.masked_fill_(hidden, float("-inf"))
        out = scores.softmax(dim=-1).to(value.dtype) @ value
        return _join(out, axes, windows_first)

    if hidden is None:
        added = None if table is None else table[None]
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale)
        return _join(out.unflatten(0, (len(q), -1)), axes, windows_first)
    added = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, float("-inf"))  # [T, 1, 1, t]
    # Dimensions over which the mask is constant go together: (N, B) without a bias, B alone with one.
    dim = 1 if table is None else 0
    added = added if table is None else (added + table).flatten(0, 1)[:, None]
    heads = query.shape[1]
    query, key, value = (x.flatten(dim, dim + 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale)
    return _join(out.unflatten(dim, (heads, -1) if dim == 1 else (-1, heads)), axes, windows_first)
