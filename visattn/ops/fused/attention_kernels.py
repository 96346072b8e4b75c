"""The Triton kernels of the fused core.

A program holds `BLOCK_M` rows of a tile and streams the tile's columns, `BLOCK_N` at a time. In three kernels rows are
queries and columns keys, in `keys_backward_kernel` it is the reverse. Where they lie is read from tables of tokens.

Shapes: maps are [B, tokens, N, D] with strides for image (b), token (t) and head (n) and channel stride 1; results are
contiguous. T tiles of M rows and U columns. Logits are kept times log2(e), so that `exp2` makes the weights; position
tiles come that way.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def at_head(base, b, head, stride_b, stride_n, UNIT: tl.constexpr):
    """Where a head of an image begins; strides are multiples of UNIT, which the compiler is shown."""
    return base + b * (stride_b // UNIT * UNIT) + head.to(tl.int64) * (stride_n // UNIT * UNIT)


@triton.jit
def take(
    base,
    token,
    stride,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """[rows, BLOCK] channels of the tokens; zero where there is no token or channel."""
    channel = tl.arange(0, BLOCK)
    keep = (token >= 0)[:, None]
    if CHANNELS < BLOCK:
        keep = keep & (channel < CHANNELS)[None, :]
    place = token.to(tl.int64) if WIDE else token
    at = base + place[:, None] * (stride // UNIT * UNIT)
    x = tl.load(at + channel[None, :], mask=keep, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def put(
    base,
    token,
    stride,
    x,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write [rows, BLOCK] to the tokens."""
    channel = tl.arange(0, BLOCK)
    keep = (token >= 0)[:, None]
    if CHANNELS < BLOCK:
        keep = keep & (channel < CHANNELS)[None, :]
    place = token.to(tl.int64) if WIDE else token
    at = base + place[:, None] * (stride // UNIT * UNIT)
    tl.store(at + channel[None, :], x.to(base.dtype.element_ty), mask=keep)


@triton.jit
def take_number(base, token, stride, other, WIDE: tl.constexpr):
    """[rows] one number per token; `other` where there is no token."""
    place = token.to(tl.int64) if WIDE else token
    return tl.load(base + place * stride, mask=token >= 0, other=other)


@triton.jit
def columns_of(
    table,
    indices,
    weight,
    tile,
    first,
    step,
    total,
    SEGMENT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tokens [BLOCK] of the columns from `step` on, -2 past the end, and the factors of their regions.

    With SEGMENT = 0 they are a row of the table; else those of the regions in `indices`, SEGMENT each.
    """
    u = step + tl.arange(0, BLOCK)
    inside = u < total
    factor = tl.full([BLOCK], 1.0, tl.float32)
    if SEGMENT == 0:
        token = tl.load(table + tile * total + u, mask=inside, other=-2)
    else:
        entry = first + u // SEGMENT
        region = tl.load(indices + entry, mask=inside, other=0)
        token = tl.load(table + region * SEGMENT + u % SEGMENT, mask=inside, other=-2)
        if WEIGHTED:
            factor = tl.load(weight + entry, mask=inside, other=0.0).to(tl.float32)
    return token, factor


@triton.jit
def visible(key_mask, token, b, keys, HAS_KEY_MASK: tl.constexpr):
    """The tokens of keys, -2 in the place of those that the mask hides."""
    if HAS_KEY_MASK:
        token = tl.where(
            tl.load(key_mask + b * keys + token, mask=token >= 0, other=1) != 0, token, -2
        )
    return token


@triton.jit
def spread_of(codes, REL_POS: tl.constexpr, dtype: tl.constexpr):
    """[slots, REL_POS] ones and zeros: which two relative positions a key's pairs get, its row's and its column's."""
    rel_pos_i = tl.arange(0, REL_POS)[None, :]
    hit = (rel_pos_i == (codes & 65535)[:, None]) | (
        rel_pos_i == REL_POS // 2 + (codes >> 16)[:, None]
    )
    return hit.to(dtype)


@triton.jit
def add_tile(s, tiles, base, row, M, U, step, BIASED: tl.constexpr, BLOCK_N: tl.constexpr):
    """s plus the numbers [M, U] at `base` of the position tiles, -inf around them."""
    if BIASED:
        u = step + tl.arange(0, BLOCK_N)
        keep = (row < M)[:, None] & (u < U)[None, :]
        s += tl.load(
            tiles + base + row[:, None] * U + u[None, :], mask=keep, other=float("-inf")
        ).to(tl.float32)
    return s


@triton.jit
def extra_tile(base, token, e, stride_t, stride_e, extra, WIDE: tl.constexpr):
    """[tokens, extra keys] of the extra keys' bias, times log2(e)."""
    place = token.to(tl.int64) if WIDE else token
    keep = (token >= 0)[:, None] & (e < extra)[None, :]
    added = tl.load(base + place[:, None] * stride_t + e[None, :] * stride_e, mask=keep, other=0.0)
    return added.to(tl.float32) * LOG2E


@triton.jit
def add_positions(
    s, rel_pos_i, tiles, codes, base, tile, row, key_token, M, U, step,
    REL_POS: tl.constexpr, BIASED: tl.constexpr, LOWEST: tl.constexpr, CHECKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """s [queries, keys] plus what is known of positions, -inf where a key takes no part; and `spread_of` them."""
    s = add_tile(s, tiles, base, row, M, U, step, BIASED, BLOCK_N)
    spread = s
    if REL_POS > 0:
        u = step + tl.arange(0, BLOCK_N)
        spread = spread_of(
            tl.load(codes + tile * U + u, mask=u < U, other=0), REL_POS, rel_pos_i.dtype
        )
        s += tl.dot(rel_pos_i, tl.trans(spread), input_precision=PRECISION) * LOG2E
    if CHECKED:
        s = tl.where((key_token >= LOWEST)[None, :], s, float("-inf"))
    return s, spread


@triton.jit
def extra_logits(
    query, key, bias, first, token, e, stride_t, stride_e, extra, scale,
    EXTRA_BIASED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[queries, extra keys], -inf where there is none."""
    s = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
    if EXTRA_BIASED:
        s += extra_tile(bias + first, token, e, stride_t, stride_e, extra, WIDE)
    return tl.where((e < extra)[None, :], s, float("-inf"))


@triton.jit
def join(s, value, m_i, l_i, acc, PRECISION: tl.constexpr):
    """Let logits [rows, columns] and their values into a running softmax: maxima m_i, sums l_i, unnormalised acc."""
    m_ij = tl.maximum(m_i, tl.max(s, 1))
    shift = tl.where(m_ij == float("-inf"), 0.0, m_ij)
    p, alpha = tl.exp2(s - shift[:, None]), tl.exp2(m_i - shift)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None] + tl.dot(p.to(value.dtype), value, input_precision=PRECISION)
    return m_ij, l_i, acc


@triton.jit
def queries_forward_kernel(
    q, k, v, out, lse,
    rows, columns, kind, tiles, rel_pos, codes, kv_indices, weight, key_mask, extra_k, extra_v, extra_bias,
    q_b, q_t, q_n, k_b, k_t, k_n, v_b, v_t, v_n, ek_b, ek_t, ek_n, ev_b, ev_t, ev_n, eb_b, eb_t, eb_n, eb_e,
    queries, keys, heads, number, M, U, extra, tiles_n, indices_b, indices_n, topk, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, REL_POS: tl.constexpr,
    SEGMENT: tl.constexpr, BIASED: tl.constexpr, WEIGHTED: tl.constexpr, LOWEST: tl.constexpr, CHECKED: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, EXTRA: tl.constexpr, EXTRA_BIASED: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of the queries of a tile."""
    pid, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile = pid // BLOCKS
    row = (pid % BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)

    token = tl.load(rows + tile * M + row, mask=row < M, other=-2)
    query = take(at_head(q, b, head, q_b, q_n, UNIT), token, q_t, D, BD, UNIT, WIDE, UPCAST)
    line = b * queries * heads + head
    rel_pos_i = query  # stands for none
    if REL_POS > 0:
        rel_pos_i = take(
            rel_pos + line * REL_POS, token, heads * REL_POS, REL_POS, REL_POS, UNIT, WIDE, UPCAST
        )
    base = head * tiles_n + tl.load(kind + tile).to(tl.int64) * (M * U) if BIASED else 0
    first = b * indices_b + head * indices_n + tile * topk
    total = U if SEGMENT == 0 else topk * SEGMENT

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BDV], tl.float32)
    for step in range(0, total, BLOCK_N):
        other, factor = columns_of(
            columns, kv_indices, weight, tile, first, step, total, SEGMENT, WEIGHTED, BLOCK_N
        )
        other = visible(key_mask, other, b, keys, HAS_KEY_MASK)
        key = take(at_head(k, b, head, k_b, k_n, UNIT), other, k_t, D, BD, UNIT, WIDE, UPCAST)
        value = take(at_head(v, b, head, v_b, v_n, UNIT), other, v_t, DV, BDV, UNIT, WIDE, UPCAST)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
        if WEIGHTED:
            s = s * factor[None, :]
            value = (value * factor[:, None]).to(value.dtype)
        s, _ = add_positions(
            s, rel_pos_i, tiles, codes, base, tile, row, other, M, U, step,
            REL_POS, BIASED, LOWEST, CHECKED, PRECISION, BLOCK_N,
        )  # fmt: skip
        m_i, l_i, acc = join(s, value, m_i, l_i, acc, PRECISION)
    if EXTRA > 0:
        for step in range(0, extra, EXTRA):
            e = step + tl.arange(0, EXTRA)
            other = tl.where(e < extra, e, -2)
            key = take(
                at_head(extra_k, b, head, ek_b, ek_n, UNIT), other, ek_t, D, BD, UNIT, WIDE, UPCAST
            )
            value = take(
                at_head(extra_v, b, head, ev_b, ev_n, UNIT),
                other,
                ev_t,
                DV,
                BDV,
                UNIT,
                WIDE,
                UPCAST,
            )
            s = extra_logits(
                query, key, extra_bias, b * eb_b + head * eb_n, token, e, eb_t, eb_e, extra, scale,
                EXTRA_BIASED, WIDE, PRECISION,
            )  # fmt: skip
            m_i, l_i, acc = join(s, value, m_i, l_i, acc, PRECISION)
    l_i = tl.where(l_i == 0.0, 1.0, l_i)  # of rows that are not there or see no key
    put(out + line * DV, token, heads * DV, acc / l_i[:, None], DV, BDV, UNIT, WIDE)
    place = token.to(tl.int64) if WIDE else token
    tl.store(lse + line + place * heads, (m_i + tl.log2(l_i)) * LN2, mask=token >= 0)


@triton.jit
def queries_backward_kernel(
    q, k, v, do, out, lse, dlse, delta, dq, drel_pos, dweight,
    rows, columns, kind, tiles, rel_pos, codes, kv_indices, weight, key_mask, extra_k, extra_v, extra_bias,
    q_b, q_t, q_n, k_b, k_t, k_n, v_b, v_t, v_n, do_b, do_t, do_n,
    ek_b, ek_t, ek_n, ev_b, ev_t, ev_n, eb_b, eb_t, eb_n, eb_e,
    queries, keys, heads, number, M, U, extra, tiles_n, indices_b, indices_n, topk, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, REL_POS: tl.constexpr,
    SEGMENT: tl.constexpr, BIASED: tl.constexpr, WEIGHTED: tl.constexpr, LOWEST: tl.constexpr, CHECKED: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, EXTRA: tl.constexpr, EXTRA_BIASED: tl.constexpr, HAS_LSE: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries, gradients of their relative positions and of the factors of regions; and `delta`.

    delta [B, tokens, N] is what softmax's derivative subtracts: the sum of out * do, less the gradient of the lse.
    """
    pid, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile, block = pid // BLOCKS, pid % BLOCKS
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)

    token = tl.load(rows + tile * M + row, mask=row < M, other=-2)
    query = take(at_head(q, b, head, q_b, q_n, UNIT), token, q_t, D, BD, UNIT, WIDE, UPCAST)
    do_i = take(at_head(do, b, head, do_b, do_n, UNIT), token, do_t, DV, BDV, UNIT, WIDE, UPCAST)
    line = b * queries * heads + head
    result = take(out + line * DV, token, heads * DV, DV, BDV, UNIT, WIDE, UPCAST)
    delta_i = tl.sum(do_i.to(tl.float32) * result.to(tl.float32), 1)
    if HAS_LSE:
        delta_i -= take_number(dlse + line, token, heads, 0.0, WIDE)
    place = token.to(tl.int64) if WIDE else token
    tl.store(delta + line + place * heads, delta_i, mask=token >= 0)
    lse_i = take_number(lse + line, token, heads, float("inf"), WIDE) * LOG2E
    rel_pos_i = query  # stands for none
    if REL_POS > 0:
        rel_pos_i = take(
            rel_pos + line * REL_POS, token, heads * REL_POS, REL_POS, REL_POS, UNIT, WIDE, UPCAST
        )
        acc_rel_pos = tl.zeros([BLOCK_M, REL_POS], tl.float32)
    base = head * tiles_n + tl.load(kind + tile).to(tl.int64) * (M * U) if BIASED else 0
    first = b * indices_b + head * indices_n + tile * topk
    total = U if SEGMENT == 0 else topk * SEGMENT

    acc = tl.zeros([BLOCK_M, BD], tl.float32)
    for step in range(0, total, BLOCK_N):
        other, factor = columns_of(
            columns, kv_indices, weight, tile, first, step, total, SEGMENT, WEIGHTED, BLOCK_N
        )
        other = visible(key_mask, other, b, keys, HAS_KEY_MASK)
        key = take(at_head(k, b, head, k_b, k_n, UNIT), other, k_t, D, BD, UNIT, WIDE, UPCAST)
        value = take(at_head(v, b, head, v_b, v_n, UNIT), other, v_t, DV, BDV, UNIT, WIDE, UPCAST)
        qk = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        dp = tl.dot(do_i, tl.trans(value), input_precision=PRECISION)
        s = qk * factor[None, :] * LOG2E if WEIGHTED else qk * LOG2E
        s, spread = add_positions(
            s, rel_pos_i, tiles, codes, base, tile, row, other, M, U, step,
            REL_POS, BIASED, LOWEST, CHECKED, PRECISION, BLOCK_N,
        )  # fmt: skip
        p = tl.exp2(s - lse_i[:, None])
        if WEIGHTED:
            ds = p * (dp * factor[None, :] - delta_i[:, None])
            u = step + tl.arange(0, BLOCK_N)
            place_w = (((b * heads + head) * number + tile) * BLOCKS + block) * total + u
            tl.store(dweight + place_w, tl.sum(ds * qk + p * dp, 0), mask=u < total)
            ds = ds * factor[None, :]
        else:
            ds = p * (dp - delta_i[:, None])
        acc += tl.dot(ds.to(key.dtype), key, input_precision=PRECISION)
        if REL_POS > 0:
            acc_rel_pos += tl.dot(ds.to(spread.dtype), spread, input_precision=PRECISION)
    if EXTRA > 0:
        for step in range(0, extra, EXTRA):
            e = step + tl.arange(0, EXTRA)
            other = tl.where(e < extra, e, -2)
            key = take(
                at_head(extra_k, b, head, ek_b, ek_n, UNIT), other, ek_t, D, BD, UNIT, WIDE, UPCAST
            )
            value = take(
                at_head(extra_v, b, head, ev_b, ev_n, UNIT),
                other,
                ev_t,
                DV,
                BDV,
                UNIT,
                WIDE,
                UPCAST,
            )
            s = extra_logits(
                query, key, extra_bias, b * eb_b + head * eb_n, token, e, eb_t, eb_e, extra, scale,
                EXTRA_BIASED, WIDE, PRECISION,
            )  # fmt: skip
            p = tl.exp2(s - lse_i[:, None])
            dp = tl.dot(do_i, tl.trans(value), input_precision=PRECISION)
            acc += tl.dot(
                (p * (dp - delta_i[:, None])).to(key.dtype), key, input_precision=PRECISION
            )
    put(dq + line * D, token, heads * D, acc * scale, D, BD, UNIT, WIDE)
    if REL_POS > 0:
        put(
            drel_pos + line * REL_POS,
            token,
            heads * REL_POS,
            acc_rel_pos,
            REL_POS,
            REL_POS,
            UNIT,
            WIDE,
        )


@triton.jit
def keys_backward_kernel(
    q, k, v, do, lse, delta, dk, dv,
    rows, columns, kind, tiles, rel_pos, codes, q_indices, weight, key_mask, first_entry,
    q_b, q_t, q_n, k_b, k_t, k_n, v_b, v_t, v_n, do_b, do_t, do_n,
    queries, keys, heads, M, U, tiles_n, indices_b, indices_n, first_b, first_n, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, REL_POS: tl.constexpr,
    SEGMENT: tl.constexpr, BIASED: tl.constexpr, WEIGHTED: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, from the queries that see them.

    With SEGMENT > 0 these are the queries of the regions that list this region: entries first_entry[region] to
    first_entry[region + 1] of a list that is sorted by listed region.
    """
    pid, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile = pid // BLOCKS
    row = (pid % BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)

    token = tl.load(rows + tile * M + row, mask=row < M, other=-2)
    key = take(at_head(k, b, head, k_b, k_n, UNIT), token, k_t, D, BD, UNIT, WIDE, UPCAST)
    value = take(at_head(v, b, head, v_b, v_n, UNIT), token, v_t, DV, BDV, UNIT, WIDE, UPCAST)
    line = b * queries * heads + head
    if REL_POS > 0:
        spread = spread_of(
            tl.load(codes + tile * M + row, mask=row < M, other=0), REL_POS, key.dtype
        )
    base = head * tiles_n + tl.load(kind + tile).to(tl.int64) * (M * U) if BIASED else 0
    first = b * 0
    total = U
    if SEGMENT > 0:
        entry = first_entry + b * first_b + head * first_n + tile
        start = tl.load(entry)
        total = (tl.load(entry + 1) - start) * SEGMENT
        first = b * indices_b + head * indices_n + start

    acc_dk = tl.zeros([BLOCK_M, BD], tl.float32)
    acc_dv = tl.zeros([BLOCK_M, BDV], tl.float32)
    for step in range(0, total, BLOCK_N):
        other, factor = columns_of(
            columns, q_indices, weight, tile, first, step, total, SEGMENT, WEIGHTED, BLOCK_N
        )
        query = take(at_head(q, b, head, q_b, q_n, UNIT), other, q_t, D, BD, UNIT, WIDE, UPCAST)
        do_i = take(
            at_head(do, b, head, do_b, do_n, UNIT), other, do_t, DV, BDV, UNIT, WIDE, UPCAST
        )
        lse_i = take_number(lse + line, other, heads, float("inf"), WIDE) * LOG2E
        delta_i = take_number(delta + line, other, heads, 0.0, WIDE)
        s = tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scale * LOG2E)
        if WEIGHTED:
            s = s * factor[None, :]
        s = add_tile(s, tiles, base, row, M, U, step, BIASED, BLOCK_N)
        if REL_POS > 0:
            rel_pos_i = take(
                rel_pos + line * REL_POS,
                other,
                heads * REL_POS,
                REL_POS,
                REL_POS,
                UNIT,
                WIDE,
                UPCAST,
            )
            s += tl.dot(spread, tl.trans(rel_pos_i), input_precision=PRECISION) * LOG2E
        p = tl.exp2(s - lse_i[None, :])
        dp = tl.dot(value, tl.trans(do_i), input_precision=PRECISION)
        if WEIGHTED:
            ds = p * (dp * factor[None, :] - delta_i[None, :]) * factor[None, :]
            p = p * factor[None, :]
        else:
            ds = p * (dp - delta_i[None, :])
        acc_dv += tl.dot(p.to(do_i.dtype), do_i, input_precision=PRECISION)
        acc_dk += tl.dot(ds.to(query.dtype), query, input_precision=PRECISION)
    if HAS_KEY_MASK:
        seen = (visible(key_mask, token, b, keys, HAS_KEY_MASK) >= 0)[:, None]
        acc_dk, acc_dv = tl.where(seen, acc_dk, 0.0), tl.where(seen, acc_dv, 0.0)
    put(dk + (b * keys * heads + head) * D, token, heads * D, acc_dk * scale, D, BD, UNIT, WIDE)
    put(dv + (b * keys * heads + head) * DV, token, heads * DV, acc_dv, DV, BDV, UNIT, WIDE)


@triton.jit
def tiles_backward_kernel(
    q, k, v, do, lse, delta, dtiles,
    rows, columns, tiles, members, parts, key_mask,
    q_b, q_t, q_n, k_b, k_t, k_n, v_b, v_t, v_n, do_b, do_t, do_n,
    images, queries, keys, heads, kinds, M, U, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, LOWEST: tl.constexpr, CHECKED: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient [parts, N, M, U] of the position tiles: a program sums a part of the images of the tiles of a kind.

    Parts [parts, 4]: kind, first of its tiles in `members`, start and stop among their images.
    """
    pid = tl.program_id(0)
    row_blocks, column_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(U, BLOCK_N)
    step = (pid % column_blocks) * BLOCK_N
    pid = pid // column_blocks
    row = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid = pid // row_blocks
    head = pid % heads
    pid = pid // heads
    part = parts + pid * 4
    which, first, start, stop = (
        tl.load(part),
        tl.load(part + 1),
        tl.load(part + 2),
        tl.load(part + 3),
    )
    nothing = pid.to(tl.int64) * 0  # makes the numbers of images 64 bits wide
    base = (head * kinds + which).to(tl.int64) * (M * U)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    added = add_tile(acc, tiles, base, row, M, U, step, True, BLOCK_N)
    for i in range(start, stop):
        tile = tl.load(members + first + i // images)
        b = nothing + i % images
        token = tl.load(rows + tile * M + row, mask=row < M, other=-2)
        u = step + tl.arange(0, BLOCK_N)
        other = tl.load(columns + tile * U + u, mask=u < U, other=-2)
        other = visible(key_mask, other, b, keys, HAS_KEY_MASK)
        query = take(at_head(q, b, head, q_b, q_n, UNIT), token, q_t, D, BD, UNIT, WIDE, UPCAST)
        do_i = take(
            at_head(do, b, head, do_b, do_n, UNIT), token, do_t, DV, BDV, UNIT, WIDE, UPCAST
        )
        key = take(at_head(k, b, head, k_b, k_n, UNIT), other, k_t, D, BD, UNIT, WIDE, UPCAST)
        value = take(at_head(v, b, head, v_b, v_n, UNIT), other, v_t, DV, BDV, UNIT, WIDE, UPCAST)
        line = b * queries * heads + head
        lse_i = take_number(lse + line, token, heads, float("inf"), WIDE) * LOG2E
        delta_i = take_number(delta + line, token, heads, 0.0, WIDE)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E) + added
        if CHECKED:
            s = tl.where((other >= LOWEST)[None, :], s, float("-inf"))
        p = tl.exp2(s - lse_i[:, None])
        acc += p * (tl.dot(do_i, tl.trans(value), input_precision=PRECISION) - delta_i[:, None])
    u = step + tl.arange(0, BLOCK_N)
    place = pid.to(tl.int64) * heads + head
    keep = (row < M)[:, None] & (u < U)[None, :]
    tl.store(dtiles + place * (M * U) + row[:, None] * U + u[None, :], acc, mask=keep)


@triton.jit
def extra_backward_kernel(
    q, do, lse, delta, extra_k, extra_v, extra_bias, dk, dv,
    q_b, q_t, q_n, do_b, do_t, do_n, ek_b, ek_t, ek_n, ev_b, ev_t, ev_n, eb_b, eb_t, eb_n, eb_e,
    images, queries, heads, extra, splits, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, EXTRA_BIASED: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv [splits, B, E, N, D] of the extra keys and values: a program sums a part of the queries."""
    pid = tl.program_id(0)
    head = pid % heads
    pid = pid // heads
    blocks = tl.cdiv(extra, BLOCK_M)
    e = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid = pid // blocks
    part = pid % splits
    b = (pid // splits).to(tl.int64)

    token = tl.where(e < extra, e, -2)
    key = take(at_head(extra_k, b, head, ek_b, ek_n, UNIT), token, ek_t, D, BD, UNIT, WIDE, UPCAST)
    value = take(
        at_head(extra_v, b, head, ev_b, ev_n, UNIT), token, ev_t, DV, BDV, UNIT, WIDE, UPCAST
    )
    line = b * queries * heads + head
    acc_dk = tl.zeros([BLOCK_M, BD], tl.float32)
    acc_dv = tl.zeros([BLOCK_M, BDV], tl.float32)
    size = tl.cdiv(tl.cdiv(queries, BLOCK_N), splits) * BLOCK_N
    for step in range(part * size, tl.minimum(part * size + size, queries), BLOCK_N):
        t = step + tl.arange(0, BLOCK_N)
        other = tl.where(t < queries, t, -2)
        query = take(at_head(q, b, head, q_b, q_n, UNIT), other, q_t, D, BD, UNIT, WIDE, UPCAST)
        do_i = take(
            at_head(do, b, head, do_b, do_n, UNIT), other, do_t, DV, BDV, UNIT, WIDE, UPCAST
        )
        lse_i = take_number(lse + line, other, heads, float("inf"), WIDE) * LOG2E
        delta_i = take_number(delta + line, other, heads, 0.0, WIDE)
        s = tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scale * LOG2E)
        if EXTRA_BIASED:
            s += tl.trans(
                extra_tile(extra_bias + b * eb_b + head * eb_n, other, e, eb_t, eb_e, extra, WIDE)
            )
        p = tl.exp2(s - lse_i[None, :])
        ds = p * (tl.dot(value, tl.trans(do_i), input_precision=PRECISION) - delta_i[None, :])
        acc_dv += tl.dot(p.to(do_i.dtype), do_i, input_precision=PRECISION)
        acc_dk += tl.dot(ds.to(query.dtype), query, input_precision=PRECISION)
    at = (part * images + b) * extra * heads + head
    put(dk + at * D, token, heads * D, acc_dk * scale, D, BD, UNIT, WIDE)
    put(dv + at * DV, token, heads * DV, acc_dv, DV, BDV, UNIT, WIDE)


@triton.jit
def extra_bias_backward_kernel(
    q, do, lse, delta, extra_k, extra_v, extra_bias, dbias,
    q_b, q_t, q_n, do_b, do_t, do_n, ek_b, ek_t, ek_n, ev_b, ev_t, ev_n, eb_b, eb_t, eb_n, eb_e,
    images, groups, queries, heads, extra, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient [groups, tokens, N, E] of the extra keys' bias, summed over the images of each of the groups."""
    pid = tl.program_id(0)
    head = pid % heads
    pid = pid // heads
    row_blocks, column_blocks = tl.cdiv(queries, BLOCK_M), tl.cdiv(extra, BLOCK_N)
    e = (pid % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // column_blocks
    t = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = pid // row_blocks

    token, other = tl.where(t < queries, t, -2), tl.where(e < extra, e, -2)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    size = tl.cdiv(images, groups)
    start = (group * size).to(tl.int64)
    for i in range(tl.minimum(size, images - group * size)):
        b = start + i
        query = take(at_head(q, b, head, q_b, q_n, UNIT), token, q_t, D, BD, UNIT, WIDE, UPCAST)
        do_i = take(
            at_head(do, b, head, do_b, do_n, UNIT), token, do_t, DV, BDV, UNIT, WIDE, UPCAST
        )
        key = take(
            at_head(extra_k, b, head, ek_b, ek_n, UNIT), other, ek_t, D, BD, UNIT, WIDE, UPCAST
        )
        value = take(
            at_head(extra_v, b, head, ev_b, ev_n, UNIT), other, ev_t, DV, BDV, UNIT, WIDE, UPCAST
        )
        line = b * queries * heads + head
        lse_i = take_number(lse + line, token, heads, float("inf"), WIDE) * LOG2E
        delta_i = take_number(delta + line, token, heads, 0.0, WIDE)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
        s += extra_tile(extra_bias + b * eb_b + head * eb_n, token, e, eb_t, eb_e, extra, WIDE)
        p = tl.exp2(s - lse_i[:, None])
        acc += p * (tl.dot(do_i, tl.trans(value), input_precision=PRECISION) - delta_i[:, None])
    place = group.to(tl.int64) * queries * heads + head + t.to(tl.int64)[:, None] * heads
    tl.store(
        dbias + place * extra + e[None, :], acc, mask=(t < queries)[:, None] & (e < extra)[None, :]
    )
