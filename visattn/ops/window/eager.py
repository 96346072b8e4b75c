"""Window attention as one batched attention: pad to whole windows, reshape, attend, reshape back, crop.

Windows without empty slots need no mask, and the bias broadcasts over them. With empty slots the mask differs from
window to window but not from image to image: windows and heads are then the batch of
`scaled_dot_product_attention` and images its heads, so that bias and mask are held once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.geometry import Partition, is_symbolic, read_table

if TYPE_CHECKING:
    from visattn.ops.window import WindowProblem


def _pad(x: Tensor, axes: tuple[Partition, ...]) -> Tensor:
    pads = [0, 0, 0, 0]
    for axis in reversed(axes):
        windows, slots, empty = axis.layout()
        pads += [empty, windows * slots - empty - axis.length]
    return F.pad(x, pads) if is_symbolic(*pads) or any(pads) else x


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
    # Whether this copies is then not asked of symbolic sizes.
    x = x.clone(memory_format=torch.contiguous_format) if is_symbolic(*x.shape) else x
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
    x = x.permute(
        *sorted(range(x.ndim), key=order.__getitem__)
    )  # [B, a_1, b_1, a_2, b_2, ..., N, Dv]
    x = x.clone(memory_format=torch.contiguous_format) if is_symbolic(*x.shape) else x
    for a in range(1, len(axes) + 1):
        x = x.flatten(a, a + 1)
    for a, axis in enumerate(axes, start=1):
        if is_symbolic(
            axis.length
        ):  # a slice would compare its length with that of the padded axis
            x = x.index_select(a, torch.arange(axis.length, device=x.device) + axis.layout()[2])
        else:
            x = x.narrow(a, axis.layout()[2], axis.length)
    return x.contiguous()  # [B, *spatial, N, Dv]


def _hidden(axes: tuple[Partition, ...], device: torch.device) -> Tensor:
    """Find the slots without a token: [T, 1, 1, t]."""
    empty = torch.zeros((), dtype=torch.bool, device=device)
    for a, axis in enumerate(axes):
        part = ~axis.occupied(device)  # [T_a, t_a]
        shape = [1] * (2 * len(axes))
        shape[a], shape[a + len(axes)] = part.shape
        empty = torch.logical_or(empty, part.reshape(shape))  # [T_1, ..., t_1, ...]
    return empty.flatten(0, len(axes) - 1).flatten(1)[:, None, None, :]


def attend(problem: WindowProblem) -> Tensor:
    """See `visattn.ops.window_attention`. T windows of t slots."""
    q, k, v, bias, axes, scale = (
        problem.q,
        problem.k,
        problem.v,
        problem.bias,
        problem.axes,
        problem.scale,
    )
    layouts = [axis.layout() for axis in axes]
    symbolic = is_symbolic(*problem.size)
    masked = symbolic or any(
        w * s != axis.length for axis, (w, s, _) in zip(axes, layouts, strict=True)
    )
    # A bias that trains would push SDPA off its flash path: explicit products are then faster on a CPU. With symbolic
    # sizes SDPA ties the graph to more than one image.
    explicit = symbolic or (bias is not None and bias.requires_grad and torch.is_grad_enabled())
    dtype = torch.promote_types(q.dtype, torch.float32) if explicit else q.dtype
    added = None  # [N, t, t]
    if bias is not None:
        ranks = [torch.arange(slots, device=q.device) for _, slots, _ in layouts]
        where = [
            r - r[:, None] + axis.window - 1 for r, axis in zip(ranks, axes, strict=True)
        ]  # [t_a, t_a]
        added = read_table(bias.to(dtype), where)
    windows_first = masked and not explicit
    query, key, value = (
        _cut(x, axes, windows_first) for x in (q, k, v)
    )  # [B, T, N, t, D], or [T, N, B, t, D]
    hidden = _hidden(axes, q.device) if masked else None  # [T, 1, 1, t]
    if explicit:
        scores = (query * scale @ key.mT).to(dtype)  # [B, T, N, t, t]
        if symbolic:  # where nothing may be written to
            scores = scores if added is None else scores + added
            scores = scores if hidden is None else scores.masked_fill(hidden, float("-inf"))
        else:
            scores = scores if added is None else scores.add_(added)
            scores = scores if hidden is None else scores.masked_fill_(hidden, float("-inf"))
        return _join(scores.softmax(dim=-1).to(value.dtype) @ value, axes, windows_first)

    lead = query.shape[:3]
    if hidden is None:
        dim, added = 0, None if added is None else added[None]  # [1, N, t, t]
    else:
        # Dimensions over which the mask is constant go together: (N, B) without a bias, B alone with one.
        dim = 1 if added is None else 0
        mask = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, float("-inf"))
        added = (
            mask if added is None else (mask + added).flatten(0, 1)[:, None]
        )  # [T, 1, 1, t] or [T * N, 1, t, t]
    query, key, value = (x.flatten(dim, dim + 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale)
    return _join(out.unflatten(dim, lead[dim : dim + 2]), axes, windows_first)
