"""Arithmetic of sizes, which are ints or the symbols that stand for them while a graph is traced; products of axes."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

N = TypeVar("N", int, Tensor)

# PyTorch's own, as functions of what annotations call int.
sym_max = cast("Callable[[int, int], int]", torch.sym_max)
sym_min = cast("Callable[[int, int], int]", torch.sym_min)


def ceil_div(n: N, d: int) -> N:
    """Divide n by d, rounded up."""
    return (n + d - 1) // d


def is_symbolic(*sizes: Any) -> bool:
    """Tell whether one of the ints is not known while a graph is traced."""
    return torch.SymInt in map(type, sizes)


def plain(sizes: Sequence[int]) -> list[int]:
    """List sizes; as plain ints under `torch.jit.trace`, which is for one map size."""
    return list(sizes) if torch._C._get_tracing_state() is None else [int(n) for n in sizes]


def outer_index(per_axis: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Combine per-axis indices [L_a, K_a] below `sizes[a]` to the row-major index [L_1 L_2 ..., K_1 K_2 ...]."""
    index = per_axis[0]
    for values, size in zip(per_axis[1:], sizes[1:], strict=True):
        index = index[:, None, :, None] * size + values[None, :, None, :]  # [L, L_a, K, K_a]
        index = index.flatten(2).flatten(0, 1)  # [L L_a, K K_a]
    return index


def interleave(table: Tensor, axes: int) -> Tensor:
    """Sort [n, T_1, t_1, U_1, T_2, ...] -> [T_1 T_2 ..., n, t_1 t_2 ..., U_1 U_2 ...]; without T -> [n, t, U]."""
    parts = (table.ndim - 1) // axes  # 3, or 2 without T
    *tile, query, key = ([1 + parts * a + part for a in range(axes)] for part in range(parts))
    table = table.permute(*(tile[0] if tile else ()), 0, *query, *key)
    table = table.flatten(-axes).flatten(-1 - axes, -2)  # [T_1, T_2, ..., n, t, U]
    return table.flatten(0, axes - 1) if tile else table  # [T, n, t, U] or [n, t, U]


def read_table(table: Tensor, where: Sequence[Tensor]) -> Tensor:
    """Read a table [N, entries per axis] at `where[a]` [T_a, t_a, U_a] or [t_a, U_a]: [T, N, t, U] or [N, t, U].

    One `index_select` per axis, last axis first, so that the large gather copies whole rows.
    """
    for a in reversed(range(len(where))):
        table = table.index_select(a + 1, where[a].flatten())  # [N, ..., T_a t_a U_a, ...]
    for a in reversed(range(len(where))):
        table = table.unflatten(a + 1, where[a].shape)  # [N, ..., T_a, t_a, U_a, ...]
    return interleave(table, len(where))
