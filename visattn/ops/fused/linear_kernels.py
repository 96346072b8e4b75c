"""Triton kernels of the two products of linear attention. Launched by linear.py."""

from __future__ import annotations

import triton
import triton.language as tl

from visattn.ops.fused.map_kernels import head_of, load, store, whole


@triton.jit
def line(x, token):
    """Where tokens lie."""
    return whole(x, token.to(tl.int64) * x.stride_w)


@triton.jit
def tokens(x, b, n, token, c, total, channels, META: tl.constexpr):
    """[tokens, channels], zero from so many on."""
    found = load(x, head_of(x, b, n), line(x, token), c, token < total, channels)
    return found.to(tl.float32) if META.UPCAST else found


@triton.jit
def outer_kernel(k, v, out, B, M, N, rows, META: tl.constexpr):
    """out[part, b, n] = k^T v over the part's `rows` of M positions, a block of D x E per program."""
    across: tl.constexpr = (META.E + META.BLOCK_E - 1) // META.BLOCK_E
    blocks: tl.constexpr = (META.D + META.BLOCK_D - 1) // META.BLOCK_D * across
    pid = tl.program_id(0)
    block, group = pid % blocks, pid // blocks  # group: part, sample, head
    n, z = (group % N).to(tl.int64), (group // N).to(tl.int64)
    first = group // (N * B) * rows
    last = tl.minimum(first + rows, M)
    d = block // across * META.BLOCK_D + tl.arange(0, META.BLOCK_D)
    e = block % across * META.BLOCK_E + tl.arange(0, META.BLOCK_E)

    BLOCK_D: tl.constexpr = META.BLOCK_D
    BLOCK_E: tl.constexpr = META.BLOCK_E
    acc = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    for start in range(first, last, META.BLOCK_M):
        m = start + tl.arange(0, META.BLOCK_M)
        k_j = tokens(k, z % B, n, m, d, last, META.D, META)  # [M, D]
        v_j = tokens(v, z % B, n, m, e, last, META.E, META)  # [M, E]
        acc = tl.dot(tl.trans(k_j), v_j, acc, input_precision=META.PRECISION)
    store(out, head_of(out, z, n), line(out, d), e, d < META.D, META.E, acc)


@triton.jit
def apply_kernel(q, context, out, L, N, META: tl.constexpr):
    """out[b, l, n] = q context for BLOCK_M positions and BLOCK_E channels."""
    across: tl.constexpr = (META.E + META.BLOCK_E - 1) // META.BLOCK_E
    pid = tl.program_id(0)
    tiles = tl.cdiv(L, META.BLOCK_M)
    e = pid % across * META.BLOCK_E + tl.arange(0, META.BLOCK_E)
    n = (pid // across % N).to(tl.int64)
    m = pid // (across * N) % tiles * META.BLOCK_M + tl.arange(0, META.BLOCK_M)
    b = (pid // (across * N * tiles)).to(tl.int64)

    BLOCK_M: tl.constexpr = META.BLOCK_M
    BLOCK_E: tl.constexpr = META.BLOCK_E
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in range(0, META.D, META.BLOCK_D):
        d = start + tl.arange(0, META.BLOCK_D)
        q_i = tokens(q, b, n, m, d, L, META.D, META)  # [M, D]
        context_j = tokens(context, b, n, d, e, META.D, META.E, META)  # [D, E]
        acc = tl.dot(q_i, context_j.to(q_i.dtype), acc, input_precision=META.PRECISION)
    store(out, head_of(out, b, n), line(out, m), e, m < L, META.E, acc)
