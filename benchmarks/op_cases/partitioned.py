"""`scaled_dot_product_attention` over windows that are cut out of the map and put back: no kernel needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.maxxvit import grid_partition, grid_reverse, window_partition, window_reverse
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from op_cases import Attend, Case, Providers

BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def bias_entries(window: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the position table [2 * window - 1, 2 * window - 1] for all pairs of a window's tokens."""
    rank = torch.arange(window**2)
    rows, columns = rank // window, rank % window
    return rows - rows[:, None] + window - 1, columns - columns[:, None] + window - 1


class _Projected(torch.autograd.Function):
    """Stands for the projection of windows to queries, which are given; passes their gradient on to the windows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor) -> Tensor:
        return q.view_as(q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad.flatten(2), grad


def _parts(case: Case, window: int, grid: bool) -> tuple[Callable, Callable]:
    cut, join = (grid_partition, grid_reverse) if grid else (window_partition, window_reverse)
    size = (window, window)
    entries = bias_entries(window)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """[windows, tokens, N, D] -> [B, H, W, N, D]"""
        if bias is not None:
            bias = bias[:, entries[0].to(q.device), entries[1].to(q.device)].to(q.dtype)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
        return join(out.reshape(-1, *size, case.heads * case.dim), size, case.size).unflatten(-1, (case.heads, -1))

    def windows(t: Tensor) -> Tensor:
        """[B, H, W, C] -> [windows, tokens, C]"""
        return cut(t, size).flatten(1, 2)

    return windows, sdpa


def _with_backend(attend: Attend, backend: SDPBackend | None) -> Attend:
    """Attention by one backend of SDPA alone; one that does not take a bias, say, raises."""
    if backend is None:
        return attend

    def attend_by_backend(*args: Tensor, **kwargs: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attend(*args, **kwargs)

    vars(attend_by_backend).update(vars(attend))
    return attend_by_backend


def _qkv_partitioned(case: Case, window: int, grid: bool) -> Attend:
    """Queries, keys and values are cut, the output is put back."""
    windows, sdpa = _parts(case, window, grid)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return sdpa(*(windows(t.flatten(3)).unflatten(-1, (case.heads, -1)) for t in (q, k, v)), bias)

    return attend


def _x_partitioned(case: Case, window: int, grid: bool) -> Attend:
    """As timm does: the block's input is cut, before the projection, and the output is put back.

    The projection does not count: its result, in windows, is given.
    """
    windows, sdpa = _parts(case, window, grid)

    def attend(x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return sdpa(_Projected.apply(windows(x), q), k, v, bias)

    def into(q: Tensor, k: Tensor, v: Tensor, **table: Tensor) -> dict[str, Tensor]:
        joined = windows(torch.stack([q, k, v], dim=3).flatten(3)).unflatten(-1, (3, case.heads, case.dim))
        q_windows, k_windows, v_windows = joined.unbind(2)
        return {"x": q.flatten(3).contiguous(), "q": q_windows, "k": k_windows, "v": v_windows, **table}

    attend.into = into
    return attend


def providers(partition: Callable[[Any], tuple[int, bool] | str]) -> Providers:
    """Both ways; `partition(case)` is the window and whether it is a grid, or why there is none."""

    def can_run(case: Any, mode: str) -> str | None:
        found = partition(case)
        return found if isinstance(found, str) else None

    def build(way: Callable[..., Attend], backend: SDPBackend | None) -> Callable[[Any], Attend]:
        return lambda case: _with_backend(way(case, *partition(case)), backend)

    return {
        "SDPA, x partitioned": (build(_x_partitioned, None), can_run),
        "SDPA, q k v partitioned": (build(_qkv_partitioned, None), can_run),
        **{f"SDPA {name}, x partitioned": (build(_x_partitioned, b), can_run) for name, b in BACKENDS.items()},
    }
