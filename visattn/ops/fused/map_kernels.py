"""Loads and stores of maps, for depthwise_kernels.py and linear_kernels.py: `x` is a `Map` of launch.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def whole(x, place):
    """In numbers, from strides as the map gives them."""
    return place * 8 if x.by_8 is not None else place


@triton.jit
def head_of(x, b, n):
    """Where a head of a sample begins."""
    return x.ptr + whole(x, b * x.stride_b + n * x.stride_n)


@triton.jit
def place_of(x, row, column):
    """Where positions lie in it."""
    return whole(x, row.to(tl.int64) * x.stride_h + column.to(tl.int64) * x.stride_w)


@triton.jit
def at(x, head, place, c):
    """[P, C]"""
    return head + place[:, None] + (c * x.stride_c)[None, :]


@triton.jit
def load(x, head, place, c, there, channels):
    """[P, C], zero where there is no position or channel."""
    return tl.load(at(x, head, place, c), mask=there[:, None] & (c < channels)[None, :], other=0.0)


@triton.jit
def store(x, head, place, c, there, channels, acc):
    """Write [P, C]."""
    tl.store(at(x, head, place, c), acc, mask=there[:, None] & (c < channels)[None, :])
