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

from visattn.ops.cut import contiguous_copy
from visattn.ops.geometry import Partition, is_symbolic, read_table

if TYPE_CHECKING:
    from visattn.ops.window import WindowProblem


def _pad(x: Tensor, axes: tuple[Partition, ...]) -> Tensor:
    """Pad [B, *spatial, N, D] to whole windows."""
    pads = [0, 0, 0, 0]
    for axis in reversed(axes):
        windows, slots, empty = axis.layout()
        pads += [empty, windows * slots - empty - axis.length]
    return F.pad(x, pads) if is_symbolic(*pads) or any(pads) else x


def _order(axes: tuple[Partition, ...], windows_first: bool) -> list[int]:
    """Find where the axes of [B, windows, N, slots, D], or [windows, N, B, slots, D], lie in [B, a_1, b_1, ..., D].

    An axis' two parts a_1, b_1 are its windows and the slots of each, in a grid the other way round.
    """
    windows = [1 + 2 * a + axis.is_grid for a, axis in enumerate(axes)]
    slots = [2 + 2 * a - axis.is_grid for a, axis in enumerate(axes)]
    head = 1 + 2 * len(axes)
    return [*((*windows, head, 0) if windows_first else (0, *windows, head)), *slots, head + 1]


def _cut(x: Tensor, axes: tuple[Partition, ...], windows_first: bool) -> Tensor:
    """Cut [B, *spatial, N, D] -> [B, T, N, t, D] (T windows of t slots), or [T, N, B, t, D]; one copy."""
    x, number = _pad(x, axes), len(axes)
    for a, axis in reversed(list(enumerate(axes, start=1))):
        windows, slots, _ = axis.layout()
        x = x.unflatten(a, (slots, windows) if axis.is_grid else (windows, slots))
    x = x.permute(_order(axes, windows_first))  # [B, T_1, ..., N, t_1, ..., D], or windows first
    x = contiguous_copy(x) if is_symbolic(*x.shape) else x
    x = x.flatten(-1 - number, -2)  # [B, T_1, ..., N, t, D], or [T_1, ..., N, B, t, D]
    return x.flatten(0, number - 1) if windows_first else x.flatten(1, number)


def _join(x: Tensor, axes: tuple[Partition, ...], windows_first: bool) -> Tensor:
    """Undo `_cut`: [B, T, N, t, D] or [T, N, B, t, D] -> [B, *spatial, N, D]."""
    layouts = [axis.layout() for axis in axes]
    x = x.unflatten(-2, [slots for _, slots, _ in layouts])
    x = x.unflatten(0 if windows_first else 1, [windows for windows, _, _ in layouts])
    order = _order(axes, windows_first)
    x = x.permute(sorted(range(x.ndim), key=order.__getitem__))  # [B, a_1, b_1, ..., N, Dv]
    x = contiguous_copy(x) if is_symbolic(*x.shape) else x
    for a, (axis, (_, _, empty)) in enumerate(zip(axes, layouts, strict=True), start=1):
        x = x.flatten(a, a + 1)  # [B, padded axes so far, ..., N, Dv]
        if is_symbolic(axis.length):  # a slice would compare its length with the padded axis'
            x = x.index_select(a, torch.arange(axis.length, device=x.device) + empty)
        else:
            x = x.narrow(a, empty, axis.length)
    return x.contiguous()  # [B, *spatial, N, Dv]


def _hidden(axes: tuple[Partition, ...], device: torch.device) -> Tensor:
    """Find the slots without a token: [T, 1, 1, t]."""
    empty = torch.zeros((), dtype=torch.bool, device=device)
    for a, axis in enumerate(axes):
        part = ~axis.occupied(device)  # [T_a, t_a]
        shape = [1] * (2 * len(axes))
        shape[a], shape[a + len(axes)] = part.shape
        empty = torch.logical_or(empty, part.reshape(shape))  # [T_1, ..., t_1, ...]
    return empty.flatten(0, len(axes) - 1).flatten(1)[:, None, None, :]  # [T, 1, 1, t]


def attend(problem: WindowProblem) -> Tensor | tuple[Tensor, Tensor]:
    """See `visattn.ops.window_attention`. T windows of t slots."""
    q, bias, axes, scale = problem.q, problem.bias, problem.axes, problem.scale
    layouts, symbolic = [axis.layout() for axis in axes], is_symbolic(*problem.size)
    places = zip(problem.size, layouts, strict=True)
    masked = symbolic or any(windows * slots != n for n, (windows, slots, _) in places)
    # A bias that trains would push SDPA off its flash path: explicit products are then faster on a CPU. With symbolic
    # sizes SDPA ties the graph to more than one image.
    trains = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    explicit = symbolic or trains or problem.return_lse
    dtype = problem.dtype if explicit else q.dtype
    added = None  # [N, t, t]
    if bias is not None:
        ranks = [torch.arange(slots, device=q.device) for _, slots, _ in layouts]
        pairs = zip(ranks, axes, strict=True)
        where = [r - r[:, None] + axis.window - 1 for r, axis in pairs]  # [t_a, t_a]
        added = read_table(bias.to(dtype), where)
    windows_first = masked and not explicit
    qkv = (q, problem.k, problem.v)
    # [B, T, N, t, D] or [T, N, B, t, D]
    query, key, value = (_cut(x, axes, windows_first) for x in qkv)
    hidden = _hidden(axes, q.device) if masked else None  # [T, 1, 1, t]
    if explicit:
        scores = (query * scale @ key.mT).to(dtype)  # [B, T, N, t, t]
        if symbolic:  # where nothing may be written to
            scores = scores if added is None else scores + added
            scores = scores if hidden is None else scores.masked_fill(hidden, float("-inf"))
        else:
            scores = scores if added is None else scores.add_(added)
            scores = scores if hidden is None else scores.masked_fill_(hidden, float("-inf"))
        out = _join(scores.softmax(dim=-1).to(value.dtype) @ value, axes, windows_first)
        if not problem.return_lse:
            return out
        lse = scores.logsumexp(dim=-1, keepdim=True)  # [B, T, N, t, 1]
        return out, _join(lse, axes, windows_first).squeeze(-1)

    lead = query.shape[:3]
    if hidden is None:
        dim, added = 0, None if added is None else added[None]  # [1, N, t, t]
    else:
        # Dimensions over which the mask is constant go together: (N, B) without a bias, B alone with one.
        dim = 1 if added is None else 0
        mask = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, float("-inf"))
        # [T, 1, 1, t] or [T N, 1, t, t]
        added = mask if added is None else (mask + added).flatten(0, 1)[:, None]
    query, key, value = (x.flatten(dim, dim + 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale)
    return _join(out.unflatten(dim, lead[dim : dim + 2]), axes, windows_first)
