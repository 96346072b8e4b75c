"""Pooling of 2 x 2 pixels that rounds odd sizes up, as an op that traces, scripts and exports.

PyTorch's own pooling decides whether there is a last, smaller window by comparing sizes, which ties a graph with
symbolic sizes to even or odd ones.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from visattn.ops.registration import composite, opaque, sizes_are_known


def _run_pool2x2(x: Tensor, kind: str) -> Tensor:
    x = x.permute(0, 3, 1, 2)
    x = F.max_pool2d(x, 2, ceil_mode=True) if kind == "max" else F.avg_pool2d(x, 2, ceil_mode=True)
    return x.permute(0, 2, 3, 1)


def _fake_pool2x2(x: Tensor, kind: str) -> tuple[Tensor]:
    b, h, w, c = x.shape
    return (x.new_empty((b, (h - 1) // 2 + 1, (w - 1) // 2 + 1, c)),)


_opaque = opaque("pool2x2", "Tensor x, str kind", 1, lambda *args: (_run_pool2x2(*args),), _fake_pool2x2)


def _pool2x2(x: Tensor, kind: str) -> Tensor:
    if kind not in ("avg", "max"):
        raise ValueError(f"expected kind 'avg' or 'max', got {kind!r}")
    return _run_pool2x2(x, kind) if sizes_are_known((x,)) else _opaque(x, kind)[0]


# x: [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C]. The last window of an odd axis holds one pixel, not a zero.
pool2x2 = composite("pool2x2(Tensor x, str kind) -> Tensor", _pool2x2)
