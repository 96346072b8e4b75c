"""Triton kernels of dynamic depthwise convolutions. Launched by depthwise.py."""

from __future__ import annotations

import triton
import triton.language as tl

from visattn.ops.fused.map_kernels import head_of, load, place_of, store


@triton.jit
def locate(H, W, N, META: tl.constexpr):
    """Sample, head, tile of positions, its first BLOCK_P, and channels of a program; all channels lie side by side."""
    blocks: tl.constexpr = (META.C + META.BLOCK_C - 1) // META.BLOCK_C
    pid = tl.program_id(0)
    groups, tiles = N * blocks, tl.cdiv(H * W, META.BLOCK_P * META.STEPS)
    group, tile = pid % groups, pid // groups % tiles
    p = tile * META.STEPS * META.BLOCK_P + tl.arange(0, META.BLOCK_P)
    c = group % blocks * META.BLOCK_C + tl.arange(0, META.BLOCK_C)
    return (pid // (groups * tiles)).to(tl.int64), (group // blocks).to(tl.int64), tile, p, c


@triton.jit
def window_start(p, L, K: tl.constexpr, CLAMPED: tl.constexpr):
    """Where the window of position p of an axis starts, before its border unless CLAMPED to the map."""
    start = p - K // 2
    if CLAMPED:
        start = tl.minimum(tl.maximum(start, 0), L - K)
    return start


@triton.jit
def is_inside(r, s, H, W):
    return (r >= 0) & (r < H) & (s >= 0) & (s < W)


@triton.jit
def depthwise_kernel(x, weights, stride_j, out, H, W, N, META: tl.constexpr):
    """out[p, c] = sum_j weights[p, j] x[start(p) + j, c]; transposed: sum over q, start(q) + j = p, of w[q, j] x[q, c].

    With PER_CHANNEL weights depend on c, not on p.
    """
    KH: tl.constexpr = META.KH
    KW: tl.constexpr = META.KW
    BLOCK_P: tl.constexpr = META.BLOCK_P
    BLOCK_C: tl.constexpr = META.BLOCK_C
    b, n, _, p, c = locate(H, W, N, META)
    row, column = p // W, p % W
    x_head, weights_head = head_of(x, b, n), head_of(weights, b, n)

    # The clamped windows that hold a position near a border are those of up to 2 K - 1 others.
    SPREAD: tl.constexpr = META.TRANSPOSED and META.CLAMPED
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
            elif META.TRANSPOSED:
                r, s = row - (i - KH // 2), column - (j - KW // 2)
            else:
                r = window_start(row, H, KH, META.CLAMPED) + i
                s = window_start(column, W, KW, META.CLAMPED) + j
            there = is_inside(r, s, H, W)
            if SPREAD:
                there &= is_inside(u, t, KH, KW)
            value = load(x, x_head, place_of(x, r, s), c, there, META.C)
            if META.PER_CHANNEL:
                at = weights_head + c * weights.stride_c + tap * stride_j
                weight = tl.load(at, mask=c < META.C, other=0.0)[None, :]
            else:
                at = weights_head + tap * stride_j
                if META.TRANSPOSED:
                    at += place_of(weights, r, s)
                else:
                    at += place_of(weights, row, column)
                weight = tl.load(at, mask=there & (row < H), other=0.0)[:, None]
            acc += value.to(tl.float32) * weight.to(tl.float32)
    store(out, head_of(out, b, n), place_of(out, row, column), c, row < H, META.C, acc)


@triton.jit
def depthwise_weights_kernel(grad, x, out, H, W, N, META: tl.constexpr):
    """out[p, j] = sum_c grad[p, c] x[start(p) + j, c], for which one block holds all channels.

    With PER_CHANNEL: out[tile, c, j], the sums over the tile's STEPS * BLOCK_P positions.
    """
    KH: tl.constexpr = META.KH
    KW: tl.constexpr = META.KW
    BLOCK_P: tl.constexpr = META.BLOCK_P
    BLOCK_C: tl.constexpr = META.BLOCK_C
    TAPS: tl.constexpr = META.TAPS
    b, n, tile, first, c = locate(H, W, N, META)
    grad_head, x_head = head_of(grad, b, n), head_of(x, b, n)
    taps = tl.arange(0, TAPS)
    if META.PER_CHANNEL:
        tiles = tl.cdiv(H * W, META.BLOCK_P * META.STEPS)
        line = ((b * tiles + tile) * N + n) * META.C + c
        valid = c < META.C
    else:
        line = (b * H * W + first) * N + n
        valid = first < H * W
    at = out + line[:, None] * (KH * KW) + taps[None, :]
    mask = valid[:, None] & (taps < (KW if META.BY_ROW else KH * KW))[None, :]

    # The sums of few taps are stored together, those of many row by row: one by one they would lie apart in memory.
    LENGTH: tl.constexpr = BLOCK_C if META.PER_CHANNEL else BLOCK_P
    result = tl.zeros([LENGTH, TAPS], tl.float32)
    for i in range(KH):
        for j in tl.static_range(KW):
            acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            for step in range(META.STEPS):
                p = first + step * BLOCK_P
                row, column = p // W, p % W
                r = window_start(row, H, KH, META.CLAMPED) + i
                s = window_start(column, W, KW, META.CLAMPED) + j
                there = is_inside(r, s, H, W) & (row < H)
                left = load(grad, grad_head, place_of(grad, row, column), c, there, META.C)
                right = load(x, x_head, place_of(x, r, s), c, there, META.C)
                acc += left.to(tl.float32) * right.to(tl.float32)
            total = tl.sum(acc, 0 if META.PER_CHANNEL else 1)
            slot = j if META.BY_ROW else i * KW + j
            result = tl.where(taps[None, :] == slot, total[:, None], result)
        if META.BY_ROW:
            tl.store(at + i * KW, result, mask=mask)
    if not META.BY_ROW:
        tl.store(at, result, mask=mask)
