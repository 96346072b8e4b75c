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
    K: tl.constexpr,
    X_UNIT: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[p, c] = sum_j weights[p, j] x[p + d_j, c]; transposed: sum_j weights[p - d_j, j] x[p - d_j, c].

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

    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for i in range(K):
        for j in tl.static_range(K):
            if TRANSPOSED:
                r, s = row - (i - K // 2), column - (j - K // 2)
            else:
                r, s = row + (i - K // 2), column + (j - K // 2)
            inside = (r >= 0) & (r < H) & (s >= 0) & (s < W)
            place = (r.to(tl.int64) * x_h + s.to(tl.int64) * x_w) * X_UNIT
            value = tl.load(
                x + place[:, None] + (c * x_c)[None, :],
                mask=inside[:, None] & (c < C)[None, :],
                other=0.0,
            )
            if PER_CHANNEL:
                weight = tl.load(weights + c * w_c + (i * K + j) * w_j, mask=c < C, other=0.0)[
                    None, :
                ]
            else:
                if TRANSPOSED:
                    place = r.to(tl.int64) * w_h + s.to(tl.int64) * w_w
                else:
                    place = row.to(tl.int64) * w_h + column.to(tl.int64) * w_w
                weight = tl.load(
                    weights + place + (i * K + j) * w_j, mask=inside & (row < H), other=0.0
                )[:, None]
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
    K: tl.constexpr,
    G_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr,
    TAPS: tl.constexpr,
    STEPS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[p, j] = sum_c grad[p, c] x[p + d_j, c], for which one block holds all channels.

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

    # The sums of all taps are stored together: one by one they would lie apart in memory.
    result = tl.zeros([LENGTH, TAPS], tl.float32)
    for i in range(K):
        for j in tl.static_range(K):
            acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            for step in range(STEPS):
                p = first + step * BLOCK_P
                row, column = p // W, p % W
                r, s = row + (i - K // 2), column + (j - K // 2)
                inside = (row < H) & (r >= 0) & (r < H) & (s >= 0) & (s < W)
                mask = inside[:, None] & (c < C)[None, :]
                place = (row.to(tl.int64) * g_h + column.to(tl.int64) * g_w) * G_UNIT
                left = tl.load(grad + place[:, None] + (c * g_c)[None, :], mask=mask, other=0.0)
                place = (r.to(tl.int64) * x_h + s.to(tl.int64) * x_w) * X_UNIT
                right = tl.load(x + place[:, None] + (c * x_c)[None, :], mask=mask, other=0.0)
                acc += left.to(tl.float32) * right.to(tl.float32)
            total = tl.sum(acc, 0 if PER_CHANNEL else 1)
            result = tl.where(taps[None, :] == i * K + j, total[:, None], result)

    if PER_CHANNEL:
        tiles = tl.cdiv(H * W, BLOCK_P * STEPS)
        place = ((b * tiles + tile) * N + n) * C + c
        valid = c < C
    else:
        place = (b * H * W + first) * N + n
        valid = first < H * W
    tl.store(
        out + place[:, None] * (K * K) + taps[None, :],
        result,
        mask=valid[:, None] & (taps < K * K)[None, :],
    )
