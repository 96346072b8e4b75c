"""Which regions a query region attends to (BiFormer's region-level routing), and pooled keys per region."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops.cut import cut_blocks
from visattn.ops.geometry import Partition, bins, is_symbolic

Axes = tuple[Partition, Partition]
Router = tuple[Tensor | None, Tensor | None]  # weight and bias of a linear layer


def region_of(axes: Axes, device: torch.device) -> Tensor:
    """Find the region of every token, row by row: [H * W]."""
    rows, columns = (axis.place(device)[0] for axis in axes)
    return (rows[:, None] * axes[1].layout()[0] + columns).flatten()  # [H W]


def token_table(axes: Axes, device: torch.device) -> Tensor:
    """List the row-major index of every token of every region, [R, t]; the number of tokens where there is none."""
    rows, columns = axes
    (ra, sa, _), (rb, sb, _) = rows.layout(), columns.layout()
    number = rows.length * columns.length
    table = torch.full((ra, sa, rb, sb), number, device=device)
    (wa, ia), (wb, ib) = (axis.place(device) for axis in axes)
    token = torch.arange(number, device=device).view(rows.length, columns.length)
    table[wa[:, None], ia[:, None], wb, ib] = token
    return table.transpose(1, 2).flatten(2).flatten(0, 1)  # [R, t]


def _means(x: Tensor, axes: Axes) -> Tensor:
    """Average [B, H, W, N, D] over the tokens of each region, in at least float32: [B, R, N, D]."""
    layouts, dtype = (
        [axis.layout()[:2] for axis in axes],
        torch.promote_types(x.dtype, torch.float32),
    )
    slots = [per_region for _, per_region in layouts]
    if is_symbolic(*(axis.length for axis in axes)) and not is_symbolic(*slots):
        # Pooling would tie the graph to a size.
        places = [torch.arange(n * s, device=x.device).view(n, s) for n, s in layouts]
        valid = [place < axis.length for place, axis in zip(places, axes, strict=True)]
        tokens = valid[0].sum(-1)[:, None] * valid[1].sum(-1)  # [rows, columns] of regions
        total = cut_blocks(x.to(dtype), places).sum(4)  # [B, rows, columns, ...]
        return (total / tokens[..., None, None]).flatten(1, 2)  # [B, R, N, D]
    maps = x.flatten(3).permute(0, 3, 1, 2).to(dtype)  # [B, N D, H, W]
    maps = F.avg_pool2d(maps, slots, ceil_mode=True)
    return maps.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, x.shape[3:])  # [B, R, N, D]


def _best(logits: Tensor, topk: int, counting: bool) -> tuple[Tensor, Tensor]:
    """Find the largest of logits [..., R], and where: [..., topk] twice; of those that tie the first, on every device.

    With `counting` by counting a region's rank: exported programs should not hold a stable sort, which ONNX has not.
    """
    if not counting:
        logits, index = logits.sort(dim=-1, descending=True, stable=True)
        return logits[..., :topk], index[..., :topk]  # all of them, if there are fewer
    order = torch.arange(logits.shape[-1], device=logits.device)
    one, other = logits[..., :, None], logits[..., None, :]
    rank = ((other > one) | ((other == one) & (order < order[:, None]))).sum(-1)  # [..., R]
    first = torch.arange(min(topk, logits.shape[-1]), device=logits.device)
    index = (rank[..., None, :] == first[:, None]).to(torch.uint8).argmax(-1)  # [..., topk]
    return logits.gather(-1, index), index


def choose(
    means: Sequence[Tensor],
    topk: int,
    scale: float,
    per_head: bool,
    router: Router,
    empty: Tensor | None = None,
    counting: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose for means [B, R, N, D] of queries and of keys: index and weights [B, 1 or N, query regions, topk].

    Key regions that are `empty` [R] come last, with weight 0.
    """
    weight, bias = (None if x is None else x.to(means[0].dtype) for x in router)
    if weight is not None:
        routed = [F.linear(m.flatten(2), weight, bias) for m in means]  # [B, R, N D]
        means = [r.unflatten(2, m.shape[2:]) for r, m in zip(routed, means, strict=True)]
    query, key = ((m if per_head else m.flatten(2)[:, :, None]).transpose(1, 2) for m in means)
    logits = (query * scale) @ key.mT  # [B, 1 or N, query regions, key regions]
    logits = logits if empty is None else logits.masked_fill(empty, float("-inf"))
    logits, index = _best(logits, topk, counting or torch.compiler.is_exporting())
    return index, logits.softmax(dim=-1)


def region_means(maps: Sequence[Tensor], axes: Sequence[Axes], diff: bool) -> list[Tensor]:
    """Average maps [B, H, W, N, D] over their regions [B, R, N, D]; without `diff` gradients end there."""
    maps = maps if diff else [x.detach() for x in maps]
    return [_means(x, a) for x, a in zip(maps, axes, strict=True)]


def pool_regions(x: Tensor, axes: Axes, kind: str, size: int) -> tuple[Tensor, Axes]:
    """Pool each region of [B, H, W, N, D]: [B, H', W', N, D] with the same regions, and its axes.

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
    # [B, regions_h, t_h, regions_w, t_w, N, D]
    x = x.unflatten(2, (-1, slots[1])).unflatten(1, (-1, slots[0]))
    (rows, columns), parts = (len(e) for e in edges), itertools.product(*edges)
    pooled = [pool(x[:, :, a:b, :, c:d], dim=(2, 4)) for (a, b), (c, d) in parts]
    x = torch.stack(pooled, 2).unflatten(2, (rows, columns))  # [B, R_h, rows, columns, R_w, N, D]
    x = x.transpose(3, 4).flatten(3, 4).flatten(1, 2)  # [B, H', W', N, D]
    return x, (Partition(x.shape[1], rows), Partition(x.shape[2], columns))
