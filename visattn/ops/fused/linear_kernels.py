"""Triton kernels of the two products of linear attention. Launched by linear.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def outer_kernel(
    k,
    v,
    out,
    k_b,
    k_m,
    k_n,
    k_d,
    v_b,
    v_m,
    v_n,
    v_e,
    B,
    M,
    N,
    rows,
    D: tl.constexpr,
    E: tl.constexpr,
    K_UNIT: tl.constexpr,
    V_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out[part, b, n] = k^T v over the part's `rows` of M positions, a block of D x E per program."""
    across: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D * across
    pid = tl.program_id(0)
    block, group = pid % blocks, pid // blocks  # group: part, sample, head
    n = (group % N).to(tl.int64)
    b = (group // N % B).to(tl.int64)
    first = group // (N * B) * rows
    last = tl.minimum(first + rows, M)
    d = block // across * BLOCK_D + tl.arange(0, BLOCK_D)
    e = block % across * BLOCK_E + tl.arange(0, BLOCK_E)
    m = first + tl.arange(0, BLOCK_M)
    k += ((b * k_b + n * k_n + m.to(tl.int64) * k_m) * K_UNIT)[:, None] + (d * k_d)[None, :]
    v += ((b * v_b + n * v_n + m.to(tl.int64) * v_m) * V_UNIT)[:, None] + (e * v_e)[None, :]

    acc = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    for start in range(first, last, BLOCK_M):
        valid = (start + tl.arange(0, BLOCK_M) < last)[:, None]
        key = tl.load(k, mask=valid & (d < D)[None, :], other=0.0)
        value = tl.load(v, mask=valid & (e < E)[None, :], other=0.0)
        if UPCAST:
            key, value = key.to(tl.float32), value.to(tl.float32)
        acc = tl.dot(tl.trans(key), value, acc, input_precision=PRECISION)
        k += k_m * (BLOCK_M * K_UNIT)
        v += v_m * (BLOCK_M * V_UNIT)

    place = group.to(tl.int64) * (D * E) + d[:, None] * E + e[None, :]
    tl.store(out + place, acc, mask=(d < D)[:, None] & (e < E)[None, :])


@triton.jit
def apply_kernel(
    q,
    context,
    out,
    q_b,
    q_l,
    q_n,
    q_d,
    c_b,
    c_n,
    c_d,
    c_e,
    L,
    N,
    D: tl.constexpr,
    E: tl.constexpr,
    Q_UNIT: tl.constexpr,
    C_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out[b, l, n] = q context for BLOCK_L positions and BLOCK_E channels."""
    across: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    pid = tl.program_id(0)
    tiles = tl.cdiv(L, BLOCK_L)
    e = pid % across * BLOCK_E + tl.arange(0, BLOCK_E)
    n = (pid // across % N).to(tl.int64)
    l = pid // (across * N) % tiles * BLOCK_L + tl.arange(0, BLOCK_L)  # noqa: E741
    b = (pid // (across * N * tiles)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    q += ((b * q_b + n * q_n + l.to(tl.int64) * q_l) * Q_UNIT)[:, None] + (d * q_d)[None, :]
    context += ((b * c_b + n * c_n + d * c_d) * C_UNIT)[:, None] + (e * c_e)[None, :]

    acc = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
    for start in range(0, D, BLOCK_D):
        query = tl.load(q, mask=(l < L)[:, None] & (start + d < D)[None, :], other=0.0)
        if UPCAST:
            query = query.to(tl.float32)
        weight = tl.load(context, mask=(start + d < D)[:, None] & (e < E)[None, :], other=0.0).to(
            query.dtype
        )
        acc = tl.dot(query, weight, acc, input_precision=PRECISION)
        q += BLOCK_D * q_d
        context += c_d * (BLOCK_D * C_UNIT)

    place = ((b * L + l) * N + n)[:, None] * E + e[None, :]
    tl.store(out + place, acc, mask=(l < L)[:, None] & (e < E)[None, :])
