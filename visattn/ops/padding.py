"""Padding and cropping of channels-last maps x [B, *spatial, C] with zeros; sizes have one entry per spatial axis.

Most work at the bottom and right and are one operation, `fit`: give a map a new spatial size. `pad_same` pads both
sides for a strided window, `fit_centered` pads or crops both sides. In graphs with symbolic sizes they are custom ops,
so that the graph does not come to depend on whether anything was padded or cropped at the traced size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from visattn.ops.geometry import ceil_div, is_symbolic, plain, sym_max
from visattn.ops.registration import custom_op, traced_as_one


def spatial_sizes(x: Tensor) -> list[int]:
    """List the sizes of the axes between batch and channels."""
    return plain(x.shape[1:-1])


def _move(x: Tensor, size: Sequence[int], first: Sequence[int]) -> Tensor:
    """Move [B, *spatial, C] -> [B, *size, C]: token i of axis a to place i + first[a]; other places are zero."""
    pads, axes = [0, 0], zip(spatial_sizes(x), size, first, strict=True)
    for axis, (old, new, start) in reversed(list(enumerate(axes, 1))):
        # Neither comparison nor slice of symbols, which would tie the graph to one case.
        if is_symbolic(old, new):
            pads += [0, 0]
            if not statically_known_true(old == new):
                token = torch.arange(new, device=x.device) - start  # [new]
                there = ((token >= 0) & (token < old)).to(x.dtype)
                there = there.view(-1, *[1] * (x.ndim - 1 - axis))  # [new, 1, ...]
                x = x.index_select(axis, token.clamp(0, old - 1)) * there  # [..., new, ...]
        else:
            x = x.narrow(axis, -start, new) if new < old else x
            pads += [0, 0] if new <= old else [start, new - old - start]
    return F.pad(x, pads) if any(pads) else x


def empty_map(x: Tensor, size: Sequence[int]) -> Tensor:
    """Make an empty map [B, *size, C] for x [B, *spatial, C]."""
    return x.new_empty((x.shape[0], *size, x.shape[-1]))


@custom_op(fake=empty_map)
def fit(x: Tensor, size: Sequence[int]) -> Tensor:
    """Crop or zero-pad at the bottom and right, [B, *spatial, C] -> [B, *size, C]; a view if nothing is padded."""
    return _move(x, size, [0] * len(size))


@custom_op(fake=empty_map)
def fit_centered(x: Tensor, size: Sequence[int]) -> Tensor:
    """Crop or zero-pad a map on both sides, [B, *spatial, C] -> [B, *size, C].

    CSWin's rule: half of the padding lies before the map, the odd one after it. Cropping to the old size undoes it.
    """
    size = plain(size)  # of another map, perhaps
    more = [new - old for old, new in zip(spatial_sizes(x), size, strict=True)]
    return _move(x, size, [sym_max(n, 0) // 2 - sym_max(-n, 0) // 2 for n in more])


def _at_least(n: int, low: int) -> int:
    """Their maximum; n itself where its range says so, which later arithmetic need not carry along."""
    return n if statically_known_true(n >= low) else sym_max(n, low)


@traced_as_one
def pad_to_at_least(x: Tensor, size: Sequence[int]) -> Tensor:
    """Zero-pad a map [B, *spatial, C] at the bottom and right to at least `size`."""
    return fit(x, [_at_least(n, s) for n, s in zip(spatial_sizes(x), size, strict=True)])


def _multiples(x: Tensor, multiple: Sequence[int]) -> list[int]:
    return [ceil_div(n, m) * m for n, m in zip(spatial_sizes(x), multiple, strict=True)]


@traced_as_one
def pad_to_multiple(x: Tensor, multiple: Sequence[int]) -> Tensor:
    """Zero-pad a map [B, *spatial, C] at the bottom and right to a multiple of `multiple`."""
    return fit(x, _multiples(x, multiple))


@traced_as_one
def pad_centered_to_multiple(x: Tensor, multiple: Sequence[int]) -> Tensor:
    """Zero-pad a map [B, *spatial, C] on both sides, as `fit_centered` does, to a multiple of `multiple`."""
    return fit_centered(x, _multiples(x, multiple))


@traced_as_one
def floor_to_multiple(x: Tensor, multiple: Sequence[int]) -> Tensor:
    """Crop a map [B, *spatial, C] at the bottom and right to a multiple of `multiple`, or zero-pad it to one."""
    return fit(x, [sym_max(1, n // m) * m for n, m in zip(spatial_sizes(x), multiple, strict=True)])


@traced_as_one
def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Zero-pad a map [B, *spatial, C] by TensorFlow's rule "SAME" for windows of `kernel` every `stride`.

    The bottom and right get the odd zero: before a window of 3 every 2, an even length is padded by (0, 1), an odd one
    by (1, 1).

    Raises:
        ValueError: A kernel below the stride.
    """
    if any(k < s for k, s in zip(kernel, stride, strict=True)):
        got = f"{list(kernel)} and {list(stride)}"
        raise ValueError(f"expected a kernel of at least the stride, got {got}")
    sizes = zip(spatial_sizes(x), kernel, stride, strict=True)
    return fit_centered(x, [(n - 1) // s * s + k for n, k, s in sizes])
