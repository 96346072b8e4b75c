"""Which regions a query region attends to (BiFormer's region-level routing), and pooled keys per region."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.geometry import Partition, bins

Axes = tuple[Partition, Partition]


def region_of(axes: Axes, device: torch.device) -> Tensor:
    """[H * W] the region of every token, row by row."""
    rows, columns = (axis.place(device)[0] for axis in axes)
    return (rows[:, None] * axes[1].layout()[0] + columns).flatten()


def token_table(axes: Axes, device: torch.device) -> Tensor:
    """[R, t] the row-major index of every token of every region; the number of tokens where there is none."""
    rows, columns = axes
    (ra, sa, _), (rb, sb, _) = rows.layout(), columns.layout()
    number = rows.length * columns.length
    table = torch.full((ra, sa, rb, sb), number, device=device)
    (wa, ia), (wb, ib) = (axis.place(device) for axis in axes)
    token = torch.arange(number, device=device).view(rows.length, columns.length)
    table[wa[:, None], ia[:, None], wb, ib] = token
    return table.transpose(1, 2).flatten(2).flatten(0, 1)


def _means(x: Tensor, axes: Axes) -> Tensor:
    """[B, H, W, N, D] -> [B, R, N, D], the mean over the tokens of each region, in at least float32."""
    size, heads = [axis.layout()[1] for axis in axes], x.shape[3]
    x = x.flatten(3).permute(0, 3, 1, 2).to(torch.promote_types(x.dtype, torch.float32))
    x = F.avg_pool2d(x, size, ceil_mode=True)
    return x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (heads, -1))


def route(
    q: Tensor,
    k: Tensor,
    q_axes: Axes,
    k_axes: Axes,
    topk: int,
    scale: float,
    per_head: bool,
    diff: bool,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `visattn.ops.region_routing`; the weights are in at least float32."""
    if not diff:
        q, k = q.detach(), k.detach()
    means = [_means(x, axes) for x, axes in ((q, q_axes), (k, k_axes))]
    if router_weight is not None:
        bias = None if router_bias is None else router_bias.to(means[0].dtype)
        weight = router_weight.to(means[0].dtype)
        means = [F.linear(m.flatten(2), weight, bias).unflatten(2, m.shape[2:]) for m in means]
    query, key = ((m if per_head else m.flatten(2)[:, :, None]).transpose(1, 2) for m in means)
    logits = (query * scale) @ key.mT  # [B, 1 or N, query regions, key regions]
    # A stable sort, so that of regions that tie the first wins on every device.
    logits, index = logits.sort(dim=-1, descending=True, stable=True)
    index, logits = index[..., :topk], logits[..., :topk]  # all of them, if there are fewer
    return index, logits.softmax(dim=-1)


def pool_regions(x: Tensor, axes: Axes, kind: str, size: int) -> tuple[Tensor, Axes]:
    """[B, H, W, N, D] -> a smaller map with the same regions, each pooled; and its axes.

    Kinds "avg" and "max" pool `size` x `size` tokens and drop what is left over in a region, "ada_avg" and "ada_max"
    make `size` x `size` tokens of a region.
    """
    pool = {"avg": torch.mean, "max": torch.amax}.get(kind.removeprefix("ada_"))
    slots = [axis.layout()[1] for axis in axes]
    if pool is None or size < 1 or (not kind.startswith("ada_") and size > min(slots)):
        raise ValueError(
            f"expected kv_pool 'none', 'avg', 'max', 'ada_avg' or 'ada_max' and kv_size from 1 to the size of a region "
            f"{slots}, got {kind!r} and {size}"
        )
    if any(axis.length % axis.layout()[1] for axis in axes):
        raise ValueError(
            f"expected regions that fill the map to pool keys, got regions of {slots} on a map of "
            f"{[axis.length for axis in axes]}; try to pad the map first"
        )
    if kind.startswith("ada_"):
        edges = [bins(n, size) for n in slots]
    else:
        edges = [[(i * size, i * size + size) for i in range(n // size)] for n in slots]
    x = x.unflatten(2, (-1, slots[1])).unflatten(1, (-1, slots[0]))  # [B, rows, slots, columns, slots, N, D]
    rows, columns = (len(e) for e in edges)
    pooled = [pool(x[:, :, a:b, :, c:d], dim=(2, 4)) for (a, b), (c, d) in itertools.product(*edges)]
    x = torch.stack(pooled, dim=2).unflatten(2, (rows, columns)).transpose(3, 4)
    x = x.flatten(3, 4).flatten(1, 2)
    return x, (Partition(x.shape[1], rows), Partition(x.shape[2], columns))
