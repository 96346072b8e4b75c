"""Triton kernels of dynamic depthwise convolutions. Launched by depthwise.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(H, W, groups, BLOCK_P: tl.constexpr):
    """The sample, the tile of positions and the group of channels of this program; groups lie side by side."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(H * W, BLOCK_P)
    return (pid // (groups * tiles)).to(tl.int64), pid // groups % tiles, pid % groups


@triton.jit
def window_start(p, L, K: tl.constexpr, CLAMPED: tl.constexpr):
    """Where the window of position p of an axis starts, before its border unless CLAMPED to the map."""
    start = p - K // 2
    if CLAMPED:
        start = tl.minimum(tl.maximum(start, 0), L - K)
    return start


@triton.jit
def depthwise_kernel(
    x,
    weights,
    out,
    x_b,
    x_h,
    x_w,
    x_n,
    x_c,
    w_b,
    w_h,
    w_w,
    w_n,
    w_c,
    w_j,
    H,
    W,
    N,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    X_UNIT: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CLAMPED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[p, c] = sum_j weights[p, j] x[start(p) + j, c]; transposed: sum over q, start(q) + j = p, of w[q, j] x[q, c].

    With PER_CHANNEL weights depend on c, not on p.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    b, tile, group = locate(H, W, N * blocks, BLOCK_P)
    n = (group // blocks).to(tl.int64)
    c = group % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    row, column = p // W, p % W
    x += (b * x_b + n * x_n) * X_UNIT
    weights += b * w_b + n * w_n

    # The clamped windows that hold a position near a border are those of up to 2 K - 1 others.
    SPREAD: tl.constexpr = TRANSPOSED and CLAMPED
    COLUMNS: tl.constexpr = 2 * KW - 1 if SPREAD else KW
    first, last = 0, KH
    if SPREAD:
        first = tl.min(tl.where(row < KH, KH - 1 - row, KH // 2), 0)
        last = tl.max(tl.where(row >= H - KH, H - row, KH // 2 + 1), 0) + KH - 1

    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for i in range(first, last):
        for j in tl.static_range(COLUMNS):
            tap = i * KW + j
            if SPREAD:
                r, s = row + (i - KH + 1), column + (j - KW + 1)
                u = row - window_start(r, H, KH, True)
                t = column - window_start(s, W, KW, True)
                tap = u * KW + t
            elif TRANSPOSED:
                r, s = row - (i - KH // 2), column - (j - KW // 2)
            else:
                r = window_start(row, H, KH, CLAMPED) + i
                s = window_start(column, W, KW, CLAMPED) + j
            inside = (r >= 0) & (r < H) & (s >= 0) & (s < W)
            if SPREAD:
                inside &= (u >= 0) & (u < KH) & (t >= 0) & (t < KW)
            place = (r.to(tl.int64) * x_h + s.to(tl.int64) * x_w) * X_UNIT
            value = tl.load(
                x + place[:, None] + (c * x_c)[None, :],
                mask=inside[:, None] & (c < C)[None, :],
                other=0.0,
            )
            if PER_CHANNEL:
                weight = tl.load(weights + c * w_c + tap * w_j, mask=c < C, other=0.0)[None, :]
            else:
                if TRANSPOSED:
                    place = r.to(tl.int64) * w_h + s.to(tl.int64) * w_w
                else:
                    place = row.to(tl.int64) * w_h + column.to(tl.int64) * w_w
                weight = tl.load(weights + place + tap * w_j, mask=inside & (row < H), other=0.0)[
                    :, None
                ]
            acc += value.to(tl.float32) * weight.to(tl.float32)

    place = (b * H * W + p)[:, None] * (N * C) + n * C + c[None, :]
    tl.store(out + place, acc, mask=(p < H * W)[:, None] & (c < C)[None, :])


@triton.jit
def depthwise_weights_kernel(
    grad,
    x,
    out,
    g_b,
    g_h,
    g_w,
    g_n,
    g_c,
    x_b,
    x_h,
    x_w,
    x_n,
    x_c,
    H,
    W,
    N,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    G_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr,
    TAPS: tl.constexpr,
    STEPS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    CLAMPED: tl.constexpr,
    BY_ROW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[p, j] = sum_c grad[p, c] x[start(p) + j, c], for which one block holds all channels.

    With PER_CHANNEL: out[tile, c, j], the sums over the tile's STEPS * BLOCK_P positions.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    b, tile, group = locate(H, W, N * blocks, BLOCK_P * STEPS)
    n = (group // blocks).to(tl.int64)
    c = group % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    grad += (b * g_b + n * g_n) * G_UNIT
    x += (b * x_b + n * x_n) * X_UNIT
    taps = tl.arange(0, TAPS)
    LENGTH: tl.constexpr = BLOCK_C if PER_CHANNEL else BLOCK_P
    first = tile * (BLOCK_P * STEPS) + tl.arange(0, BLOCK_P)

    if PER_CHANNEL:
        tiles = tl.cdiv(H * W, BLOCK_P * STEPS)
        line = ((b * tiles + tile) * N + n) * C + c
        valid = c < C
    else:
        line = (b * H * W + first) * N + n
        valid = first < H * W
    place = line[:, None] * (KH * KW) + taps[None, :]
    mask = valid[:, None] & (taps < (KW if BY_ROW else KH * KW))[None, :]

    # The sums of few taps are stored together, those of many row by row: one by one they would lie apart in memory.
    result = tl.zeros([LENGTH, TAPS], tl.float32)
    for i in range(KH):
        for j in tl.static_range(KW):
            acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            for step in range(STEPS):
                p = first + step * BLOCK_P
                row, column = p // W, p % W
                r = window_start(row, H, KH, CLAMPED) + i
                s = window_start(column, W, KW, CLAMPED) + j
                inside = (row < H) & (r >= 0) & (r < H) & (s >= 0) & (s < W)
                there = inside[:, None] & (c < C)[None, :]
                at = (row.to(tl.int64) * g_h + column.to(tl.int64) * g_w) * G_UNIT
                left = tl.load(grad + at[:, None] + (c * g_c)[None, :], mask=there, other=0.0)
                at = (r.to(tl.int64) * x_h + s.to(tl.int64) * x_w) * X_UNIT
                right = tl.load(x + at[:, None] + (c * x_c)[None, :], mask=there, other=0.0)
                acc += left.to(tl.float32) * right.to(tl.float32)
            total = tl.sum(acc, 0 if PER_CHANNEL else 1)
            slot = j if BY_ROW else i * KW + j
            result = tl.where(taps[None, :] == slot, total[:, None], result)
        if BY_ROW:
            tl.store(out + place + i * KW, result, mask=mask)
    if not BY_ROW:
        tl.store(out + place, result, mask=mask)
