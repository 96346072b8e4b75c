"""The Triton kernels of the fused core.

A program holds BLOCK_M rows of a tile and streams the tile's columns, BLOCK_N at a time. In three kernels rows are
queries and columns keys, in `keys_backward_kernel` it is the reverse. Where they lie is read from tables of tokens. The
groups of arguments are the tuples of attention_arguments.py.

With META.TILES > 1 a program holds so many whole tiles of few rows, each with its own columns: everything has one more
axis in front, and products are batched.

Shapes: M = BLOCK_M rows, N = BLOCK_N columns, D and DV padded channels, R lanes of positions. Logits are kept before
they are scaled, by sm_scale > 0, so that positions are added by the tensor cores; position tiles come that way.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def column(x):
    """[..., M] -> [..., M, 1]"""
    return tl.expand_dims(x, -1)


@triton.jit
def row(x):
    """[..., N] -> [..., 1, N]"""
    return tl.expand_dims(x, -2)


@triton.jit
def mT(x):
    """Transpose [..., M, N]."""
    if len(x.shape) == 3:
        y = tl.permute(x, (0, 2, 1))
    else:
        y = tl.trans(x)
    return y


@triton.jit
def zeros(token, BLOCK: tl.constexpr):
    """[..., M, BLOCK]"""
    if len(token.shape) == 2:
        x = tl.zeros([token.shape[0], token.shape[1], BLOCK], tl.float32)
    else:
        x = tl.zeros([token.shape[0], BLOCK], tl.float32)
    return x


@triton.jit
def place_of(mask, sizes, META: tl.constexpr, BLOCK_M: tl.constexpr):
    """What this program holds.

    Head; image, and where its results are: behind those of all images for the splits of columns before; the tile, its
    block and the rows in the tile, or tiles [TILES, 1] and rows [1, M]; the tokens of the rows.
    """
    pid, head, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b = z % sizes.images if META.SPLIT else z
    BLOCKS: tl.constexpr = META.ROWS // BLOCK_M
    if META.TILES > 1:
        tile = (pid * META.TILES + tl.arange(0, META.TILES))[:, None]
        block, offs_m = pid * 0, tl.arange(0, BLOCK_M)[None, :]
    else:
        tile, block = pid // BLOCKS, pid % BLOCKS
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.load(mask.rows + tile * META.ROWS + offs_m)
    return head, b.to(tl.int64), z.to(tl.int64), tile, block, offs_m, token


@triton.jit
def columns_to_do(total, z, sizes, META: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which columns this program goes over: all, most of any tile, or a split of them."""
    begin, end = tl.program_id(2) * 0, total
    if META.SEGMENT > 0 and META.TILES > 1:
        end = tl.max(tl.max(total, 0), 0)
    if META.SPLIT:
        size = tl.cdiv(tl.cdiv(total, BLOCK_N), sizes.splits) * BLOCK_N
        begin = (z // sizes.images).to(tl.int32) * size
        end = tl.minimum(begin + size, total)
    if META.ONE_STEP:
        begin, end = 0, BLOCK_N  # no loop
    return begin, end


@triton.jit
def wide(token, META: tl.constexpr):
    """Tokens as wide as the offsets within an image."""
    return token.to(tl.int64) if META.WIDE else token


@triton.jit
def at_rows(x, b, head, token, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, META: tl.constexpr):
    """[rows, BLOCK] where the channels of tokens are, and which there are; strides are in UNITs."""
    offs_d = tl.arange(0, BLOCK)
    keep = column(token) >= 0
    if CHANNELS < BLOCK:
        keep = keep & row(offs_d < CHANNELS)
    base = x.ptr + b * (x.stride_b * META.UNIT) + head.to(tl.int64) * (x.stride_n * META.UNIT)
    place = column(wide(token, META)) * (x.stride_t * META.UNIT)
    return base + place + row(offs_d), keep


@triton.jit
def load_rows(x, b, head, token, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, META: tl.constexpr):
    """[rows, BLOCK] channels of the tokens; zero where there is no token or channel."""
    at, keep = at_rows(x, b, head, token, CHANNELS, BLOCK, META)
    rows = tl.load(at, mask=keep, other=0.0)
    return rows.to(tl.float32) if META.UPCAST else rows


@triton.jit
def store_rows(
    x, b, head, token, rows, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, META: tl.constexpr
):
    """Write [rows, BLOCK] to the tokens."""
    at, keep = at_rows(x, b, head, token, CHANNELS, BLOCK, META)
    tl.store(at, rows.to(x.ptr.dtype.element_ty), mask=keep)


@triton.jit
def at_lanes(x, b, head, token, mask, META: tl.constexpr):
    """[rows, R] where the lanes of queries are among their relative terms, and which there are."""
    place = column(wide(token, META))
    line = mask.terms + place * META.LANES + row(tl.arange(0, META.LANES))
    term = tl.load(line, mask=column(token) >= 0, other=-1).to(tl.int32)
    base = x.ptr + b * x.stride_b + head.to(tl.int64) * x.stride_n
    return base + place * x.stride_t + term, term >= 0


@triton.jit
def load_rel_pos(mask, b, head, token, META: tl.constexpr):
    """[rows, R] relative terms of queries by lanes."""
    at, keep = at_lanes(mask.rel_pos, b, head, token, mask, META)
    lanes = tl.load(at, mask=keep, other=0.0)
    return lanes.to(tl.float32) if META.UPCAST else lanes


@triton.jit
def at_line(ptr, b, head, token, sizes, META: tl.constexpr):
    """[rows] where the numbers of queries are, of [B, queries, heads]."""
    return ptr + (b * sizes.queries * sizes.heads + head) + wide(token, META) * sizes.heads


@triton.jit
def load_stats(stats, b, head, token, sizes, META: tl.constexpr):
    """[rows] lse times log2(e) and delta; weights are 0 where there is no token."""
    there = token >= 0
    lse_i = tl.load(at_line(stats.lse, b, head, token, sizes, META), mask=there, other=float("inf"))
    return lse_i, tl.load(at_line(stats.delta, b, head, token, sizes, META), mask=there, other=0.0)


@triton.jit
def load_tokens(
    mask, listed, first, tile, start_n, total, META: tl.constexpr, BLOCK_N: tl.constexpr
):
    """[N] tokens of the columns from `start_n` on, -2 past the end: of a row of the table, or of the regions listed."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    inside = tile * 0 + offs_n < total
    place = tile * mask.columns_number + offs_n
    if META.SEGMENT > 0:
        region = tl.load(listed.indices + first + offs_n // META.SEGMENT, mask=inside, other=0)
        place = region * META.SEGMENT + offs_n % META.SEGMENT
    return tl.load(mask.columns + place, mask=inside, other=-2)


@triton.jit
def load_factors(listed, first, start_n, total, META: tl.constexpr, BLOCK_N: tl.constexpr):
    """[N] factors of the regions of columns."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    return tl.load(
        listed.weight + first + offs_n // META.SEGMENT, mask=offs_n < total, other=0.0
    ).to(tl.float32)


@triton.jit
def without_hidden(token, mask, b, sizes):
    """Tokens of keys, -2 in the place of those that the key mask hides."""
    if mask.key_mask is not None:
        seen = tl.load(mask.key_mask + b * sizes.keys + token, mask=token >= 0, other=1)
        token = tl.where(seen != 0, token, -2)
    return token


@triton.jit
def one_hot(code, META: tl.constexpr, dtype: tl.constexpr):
    """[keys, R] ones and zeros: which two relative positions a key's pairs get, its row's and its column's."""
    lane = tl.arange(0, META.LANES)[None, :]
    hit = (lane == (code & 65535)[:, None]) | (lane == META.LANES // 2 + (code >> 16)[:, None])
    return hit.to(dtype)


@triton.jit
def load_lanes(table, line, META: tl.constexpr):
    """[lines, R] of a table of lanes."""
    lanes = tl.load(table + column(line) * META.LANES + row(tl.arange(0, META.LANES)))
    return lanes.to(tl.float32) if META.UPCAST else lanes


@triton.jit
def load_hidden(mask, tile, offs_m, META: tl.constexpr):
    """[M, R] what lanes add to the logits of the rows of a tile."""
    return load_lanes(mask.hidden, tl.load(mask.kind + tile) * META.ROWS + offs_m, META)


@triton.jit
def lanes_of_keys(mask, tile, total, offs_n, held, META: tl.constexpr):
    """[N, R] ones in the lanes of the keys that are columns."""
    lanes = held  # stands for none
    if mask.rel_pos is not None:
        code = tl.load(mask.codes + tile * total + offs_n, mask=offs_n < total, other=0)
        lanes = one_hot(code, META, held.dtype)
    if mask.hidden is not None:
        lanes = load_lanes(mask.spread, tile * 0 + offs_n, META)  # the same for all tiles
    return lanes


@triton.jit
def tile_of(mask, head, tile, META: tl.constexpr):
    """Where the position tile of a tile begins."""
    base = head.to(tl.int64) * mask.stride_n
    if mask.tiles is not None:
        base += tl.load(mask.kind + tile).to(tl.int64) * META.ROWS * mask.width
    return base


@triton.jit
def columns_of(mask, listed, b, head, tile, sizes, META: tl.constexpr):
    """Where the list of a tile of queries begins, if there is one, and how many columns the tile meets."""
    first, total = b * 0, mask.columns_number
    if META.SEGMENT > 0:
        first = b * listed.stride_b + head * listed.stride_n + tile * listed.topk
        total = listed.topk * META.SEGMENT
        if META.TILES > 1:
            total = tl.where(tile < sizes.tiles, total, 0)
    return first, total


@triton.jit
def dot(a, b, META: tl.constexpr):
    return tl.dot(a, b, input_precision=META.PRECISION)


@triton.jit
def dot_add(a, b, acc, META: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=META.PRECISION)


@triton.jit
def add_positions(
    qk, mask, held, streamed, base, offs_m, offs_n, token_n, sm_scale,
    META: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Logits [M, N] plus what is known of positions, -inf where a key takes no part."""
    if mask.tiles is not None:
        tile = tl.load(mask.tiles + column(base + offs_m * mask.width) + row(offs_n))
        if META.EYE:
            qk = tl.dot(held, tile.to(held.dtype), qk)
        else:
            qk += tile.to(tl.float32) * META.TILE_UNIT
    if mask.rel_pos is not None:
        rel_pos = dot(held, mT(streamed), META)
        qk += rel_pos * (1.0 / sm_scale)
    if mask.hidden is not None:
        qk = dot_add(held, mT(streamed), qk, META)
    if CHECKED:
        qk = tl.where(row(token_n >= META.LOWEST), qk, float("-inf"))
    return qk


@triton.jit
def load_extra_bias(extra, b, head, token, offs_e, sizes, META: tl.constexpr):
    """[tokens, extra keys] bias."""
    keep = (token >= 0)[:, None] & (offs_e < sizes.extra)[None, :]
    base = extra.bias + b * extra.stride_b + head * extra.stride_n
    at = base + wide(token, META)[:, None] * extra.stride_t + offs_e[None, :] * extra.stride_e
    return tl.load(at, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def extra_logits(q, k, extra, b, head, token, offs_e, sizes, sm_scale, META: tl.constexpr):
    """[queries, extra keys], -inf where there is none."""
    qk = dot(q, tl.trans(k), META)
    if extra.bias is not None:
        qk += load_extra_bias(extra, b, head, token, offs_e, sizes, META) * (1.0 / sm_scale)
    return tl.where((offs_e < sizes.extra)[None, :], qk, float("-inf"))


@triton.jit
def extra_step(q, extra, b, head, token, start_e, sizes, sm_scale, META: tl.constexpr):
    """Extra keys [E, D] and values [E, DV] from `start_e` on, and the logits of queries [M, E]."""
    offs_e = start_e + tl.arange(0, META.EXTRA)
    token_e = tl.where(offs_e < sizes.extra, offs_e, -2)
    k = load_rows(extra.k, b, head, token_e, META.D, META.BLOCK_D, META)
    v = load_rows(extra.v, b, head, token_e, META.DV, META.BLOCK_DV, META)
    return k, v, extra_logits(q, k, extra, b, head, token, offs_e, sizes, sm_scale, META)


@triton.jit
def weights(qk, lse, sm_scale):
    """softmax of logits, for lse times log2(e)."""
    return tl.exp2(qk * (sm_scale * LOG2E) - lse)


@triton.jit
def join(qk, v, m_i, l_i, acc, sm_scale, META: tl.constexpr):
    """Let logits [M, N] and their values into a running softmax: maxima m_i, sums l_i, unnormalised acc."""
    m_ij = tl.maximum(m_i, tl.max(qk, len(qk.shape) - 1))
    shift = tl.where(m_ij == float("-inf"), 0.0, m_ij) if META.CHECKED else m_ij
    c = sm_scale * LOG2E
    shift = shift * c
    p, alpha = tl.exp2(qk * c - column(shift)), tl.exp2(m_i * c - shift)
    l_i = l_i * alpha + tl.sum(p, len(qk.shape) - 1)
    return m_ij, l_i, dot_add(p.to(v.dtype), v, acc * column(alpha), META)


@triton.jit
def eye(mask, rows, META: tl.constexpr, ROWS: tl.constexpr):
    """[M, M] by which a position tile is added in a product, if META.EYE; else `rows`."""
    if META.EYE:
        line = tl.arange(0, ROWS)
        rows = tl.load(mask.eye + line[:, None] * 128 + line[None, :]).to(rows.dtype)
    return rows


@triton.jit
def positions_of(
    mask, q_i, b, head, tile, offs_m, token, META: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Where the position tile of a tile of queries begins, and what they hold to be added to logits, if anything."""
    held = eye(mask, q_i, META, BLOCK_M)
    if mask.rel_pos is not None:
        held = load_rel_pos(mask, b, head, token, META)  # [M, R]
    if mask.hidden is not None:
        held = load_hidden(mask, tile, offs_m, META)  # [M, R]
    return tile_of(mask, head, tile, META), held


@triton.jit
def forward_kernel(
    q, k, v, out, mask, listed, extra, sizes, sm_scale,
    META: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of the queries of a tile."""
    head, b, z, tile, _, offs_m, token = place_of(mask, sizes, META, BLOCK_M)
    q_i = load_rows(q, b, head, token, META.D, META.BLOCK_D, META)  # [M, D]
    base, held = positions_of(mask, q_i, b, head, tile, offs_m, token, META, BLOCK_M)
    first, total = columns_of(mask, listed, b, head, tile, sizes, META)

    acc, l_i = zeros(token, META.BLOCK_DV), tl.zeros_like(token).to(tl.float32)
    m_i = l_i - float("inf")
    begin, end = columns_to_do(total, z, sizes, META, BLOCK_N)
    # Tokens are read a step ahead, so that copies overlap with products.
    ahead = load_tokens(mask, listed, first, tile, begin, total, META, BLOCK_N)
    for start_n in range(begin, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        token_n = without_hidden(ahead, mask, b, sizes)
        ahead = load_tokens(mask, listed, first, tile, start_n + BLOCK_N, total, META, BLOCK_N)
        k_j = load_rows(k, b, head, token_n, META.D, META.BLOCK_D, META)  # [N, D]
        v_j = load_rows(v, b, head, token_n, META.DV, META.BLOCK_DV, META)  # [N, DV]
        qk = dot(q_i, mT(k_j), META)  # [M, N]
        if META.WEIGHTED:
            factor = load_factors(listed, first, start_n, total, META, BLOCK_N)
            qk = qk * row(factor)
            v_j = (v_j * column(factor)).to(v_j.dtype)
        streamed = lanes_of_keys(mask, tile, total, offs_n, held, META)  # [N, R]
        qk = add_positions(
            qk, mask, held, streamed, base, offs_m, offs_n, token_n, sm_scale, META, META.CHECKED
        )
        m_i, l_i, acc = join(qk, v_j, m_i, l_i, acc, sm_scale, META)
    if META.EXTRA > 0:
        for start_e in range(0, sizes.extra, META.EXTRA):
            k_j, v_j, qk = extra_step(q_i, extra, b, head, token, start_e, sizes, sm_scale, META)
            m_i, l_i, acc = join(qk, v_j, m_i, l_i, acc, sm_scale, META)
    if (
        mask.key_mask is not None
    ):  # what tiles hide is finite, so that a query without keys may have seen that
        blind = m_i < META.HIDDEN * 0.8
        m_i, l_i = tl.where(blind, float("-inf"), m_i), tl.where(blind, 0.0, l_i)
        acc = tl.where(column(blind), 0.0, acc)
    l_i = tl.where(l_i == 0.0, 1.0, l_i)  # of rows that are not there or see no key
    store_rows(out.o, z, head, token, acc * column(1.0 / l_i), META.DV, META.BLOCK_DV, META)
    tl.store(
        at_line(out.lse, z, head, token, sizes, META),
        m_i * sm_scale + tl.log2(l_i) * LN2,
        mask=token >= 0,
    )


@triton.jit
def queries_backward_kernel(
    q, k, v, do, saved, stats, grads, mask, listed, extra, sizes, sm_scale,
    META: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries, gradients of their relative positions and of the factors of regions; and `stats`.

    Those are [B, queries, heads], for all kernels that follow: lse times log2(e), inf where a query sees nothing so
    that weights are 0, and delta, which softmax's derivative subtracts: sum of o * do, less the gradient of the lse.
    """
    head, b, z, tile, block, offs_m, token = place_of(mask, sizes, META, BLOCK_M)
    q_i = load_rows(q, b, head, token, META.D, META.BLOCK_D, META)  # [M, D]
    do_i = load_rows(do, b, head, token, META.DV, META.BLOCK_DV, META)  # [M, DV]
    o_i = load_rows(saved.o, b, head, token, META.DV, META.BLOCK_DV, META)
    delta_i = tl.sum(do_i.to(tl.float32) * o_i.to(tl.float32), len(o_i.shape) - 1)
    there = token >= 0
    lse_i = (
        tl.load(at_line(saved.lse, b, head, token, sizes, META), mask=there, other=float("inf"))
        * LOG2E
    )
    blind = lse_i == float("-inf")
    if saved.dlse is not None:
        dlse_i = tl.load(at_line(saved.dlse, b, head, token, sizes, META), mask=there, other=0.0)
        delta_i -= tl.where(blind, 0.0, dlse_i)
    lse_i = tl.where(blind, float("inf"), lse_i)
    first_split = there & (z < sizes.images)
    tl.store(at_line(stats.lse, b, head, token, sizes, META), lse_i, mask=first_split)
    tl.store(at_line(stats.delta, b, head, token, sizes, META), delta_i, mask=first_split)
    base, held = positions_of(mask, q_i, b, head, tile, offs_m, token, META, BLOCK_M)
    first, total = columns_of(mask, listed, b, head, tile, sizes, META)

    acc = zeros(token, META.BLOCK_D)
    if mask.rel_pos is not None:
        acc_rel_pos = zeros(token, META.LANES)
    begin, end = columns_to_do(total, z, sizes, META, BLOCK_N)
    # Tokens are read a step ahead, so that copies overlap with products.
    ahead = load_tokens(mask, listed, first, tile, begin, total, META, BLOCK_N)
    for start_n in range(begin, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        token_n = without_hidden(ahead, mask, b, sizes)
        ahead = load_tokens(mask, listed, first, tile, start_n + BLOCK_N, total, META, BLOCK_N)
        k_j = load_rows(k, b, head, token_n, META.D, META.BLOCK_D, META)  # [N, D]
        v_j = load_rows(v, b, head, token_n, META.DV, META.BLOCK_DV, META)  # [N, DV]
        qk = dot(q_i, mT(k_j), META)  # [M, N]
        dp = dot(do_i, mT(v_j), META)  # [M, N]
        logits = qk
        if META.WEIGHTED:
            factor = load_factors(listed, first, start_n, total, META, BLOCK_N)
            logits = qk * row(factor)
        streamed = lanes_of_keys(mask, tile, total, offs_n, held, META)  # [N, R]
        logits = add_positions(
            logits,
            mask,
            held,
            streamed,
            base,
            offs_m,
            offs_n,
            token_n,
            sm_scale,
            META,
            META.CHECKED,
        )
        p = weights(logits, column(lse_i), sm_scale)
        if META.WEIGHTED:
            ds = p * (dp * row(factor) - column(delta_i))
            line = (b * sizes.heads + head) * sizes.tiles + tile
            line = (line * (META.ROWS // BLOCK_M) + block) * (listed.topk * META.SEGMENT)
            tl.store(
                grads.dweight + line + offs_n,
                tl.sum(ds * qk * sm_scale + p * dp, len(p.shape) - 2),
                mask=offs_n < total,
            )
            ds = ds * row(factor)
        else:
            ds = p * (dp - column(delta_i))
        acc = dot_add(ds.to(k_j.dtype), k_j, acc, META)
        if mask.rel_pos is not None:
            acc_rel_pos = dot_add(ds.to(streamed.dtype), streamed, acc_rel_pos, META)
    if META.EXTRA > 0:
        for start_e in range(0, sizes.extra, META.EXTRA):
            k_j, v_j, qk = extra_step(q_i, extra, b, head, token, start_e, sizes, sm_scale, META)
            p = weights(qk, column(lse_i), sm_scale)
            dp = dot(do_i, mT(v_j), META)
            acc = dot_add((p * (dp - column(delta_i))).to(k_j.dtype), k_j, acc, META)
    store_rows(grads.dq, z, head, token, acc * sm_scale, META.D, META.BLOCK_D, META)
    if mask.rel_pos is not None:
        at, keep = at_lanes(grads.drel_pos, b, head, token, mask, META)
        tl.store(at, acc_rel_pos.to(grads.drel_pos.ptr.dtype.element_ty), mask=keep)


@triton.jit
def keys_backward_kernel(
    q, k, v, do, stats, grads, mask, listed, sizes, sm_scale,
    META: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, from the queries that see them.

    With SEGMENT > 0 these are the queries of the regions that list this region: entries first[region] to
    first[region + 1] of a list that is sorted by listed region.
    """
    head, b, z, tile, _, offs_m, token = place_of(mask, sizes, META, BLOCK_M)
    k_i = load_rows(k, b, head, token, META.D, META.BLOCK_D, META)  # [M, D]
    v_i = load_rows(v, b, head, token, META.DV, META.BLOCK_DV, META)  # [M, DV]
    base, held = tile_of(mask, head, tile, META), eye(mask, k_i, META, BLOCK_M)
    if mask.rel_pos is not None:
        held = one_hot(tl.load(mask.codes + tile * META.ROWS + offs_m), META, k_i.dtype)  # [M, R]
    if mask.hidden is not None:
        held = load_hidden(mask, tile, offs_m, META)  # [M, R]
    first = b * 0
    total = mask.columns_number
    if META.SEGMENT > 0:
        entry = listed.first + b * listed.first_b + head * listed.first_n + tile
        there = tile < sizes.tiles
        start = tl.load(entry, mask=there, other=0)
        total = (tl.load(entry + 1, mask=there, other=0) - start) * META.SEGMENT
        first = b * listed.stride_b + head * listed.stride_n + start

    acc_dk = zeros(token, META.BLOCK_D)
    acc_dv = zeros(token, META.BLOCK_DV)
    begin, end = columns_to_do(total, z, sizes, META, BLOCK_N)
    # Tokens are read a step ahead, so that copies overlap with products.
    ahead = load_tokens(mask, listed, first, tile, begin, total, META, BLOCK_N)
    for start_n in range(begin, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        token_n = ahead
        ahead = load_tokens(mask, listed, first, tile, start_n + BLOCK_N, total, META, BLOCK_N)
        q_j = load_rows(q, b, head, token_n, META.D, META.BLOCK_D, META)  # [N, D]
        do_j = load_rows(do, b, head, token_n, META.DV, META.BLOCK_DV, META)  # [N, DV]
        lse_j, delta_j = load_stats(stats, b, head, token_n, sizes, META)
        qk = dot(k_i, mT(q_j), META)  # [M, N]
        if META.WEIGHTED:
            factor = load_factors(listed, first, start_n, total, META, BLOCK_N)
            qk = qk * row(factor)
        streamed = held  # stands for none
        if mask.rel_pos is not None:
            streamed = load_rel_pos(mask, b, head, token_n, META)  # [N, R]
        if mask.hidden is not None:
            streamed = load_lanes(mask.spread, tile * 0 + offs_n, META)  # [N, R]
        qk = add_positions(
            qk, mask, held, streamed, base, offs_m, offs_n, token_n, sm_scale, META, False
        )
        p = weights(qk, row(lse_j), sm_scale)
        dp = dot(v_i, mT(do_j), META)
        if META.WEIGHTED:
            ds = p * (dp * row(factor) - row(delta_j)) * row(factor)
            p = p * row(factor)
        else:
            ds = p * (dp - row(delta_j))
        acc_dv = dot_add(p.to(do_j.dtype), do_j, acc_dv, META)
        acc_dk = dot_add(ds.to(q_j.dtype), q_j, acc_dk, META)
    if mask.key_mask is not None:
        seen = column(without_hidden(token, mask, b, sizes) >= 0)
        acc_dk, acc_dv = tl.where(seen, acc_dk, 0.0), tl.where(seen, acc_dv, 0.0)
    store_rows(grads.dk, z, head, token, acc_dk * sm_scale, META.D, META.BLOCK_D, META)
    store_rows(grads.dv, z, head, token, acc_dv, META.DV, META.BLOCK_DV, META)


@triton.jit
def tiles_backward_kernel(
    q, k, v, do, stats, dtiles, parts, mask, sizes, sm_scale,
    META: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient [parts, N, M, U] of the position tiles: a program sums a part of the images of the tiles of a kind.

    With META.TILES > 1 it goes over so many tiles at a time.
    """
    pid = tl.program_id(0)
    column_blocks = tl.cdiv(mask.columns_number, BLOCK_N)
    start_n = (pid % column_blocks) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    pid = pid // column_blocks
    offs_m = (pid % (META.ROWS // BLOCK_M)) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid = pid // (META.ROWS // BLOCK_M)
    head = pid % sizes.heads
    pid = pid // sizes.heads
    part = parts.parts + pid * 4
    kind, first = tl.load(part), tl.load(part + 1)
    start, stop = tl.load(part + 2), tl.load(part + 3)
    base = head.to(tl.int64) * mask.stride_n + kind.to(tl.int64) * META.ROWS * mask.width
    at_tile = offs_m[:, None] * mask.width + offs_n[None, :]
    held = tl.arange(0, META.TILES)[:, None] if META.TILES > 1 else 0  # [TILES, 1]
    acc = zeros(held + offs_m, BLOCK_N)  # [M, N], or of each tile
    tile_ij = acc + tl.load(mask.tiles + base + at_tile).to(tl.float32) * META.TILE_UNIT
    for i in range(start, stop):
        tile = tl.load(parts.members + (first + i // sizes.images) * META.TILES + held)
        b = (i % sizes.images).to(tl.int64)
        total = mask.columns_number
        if META.TILES > 1:  # the last group of a kind may have fewer
            total = tl.where(tile >= 0, total, 0)
            tile = tl.maximum(tile, 0)
        token = tl.load(mask.rows + tile * META.ROWS + offs_m)
        if META.TILES > 1:
            token = tl.where(total > 0, token, -2)
        token_n = load_tokens(mask, None, 0, tile, start_n, total, META, BLOCK_N)
        token_n = without_hidden(token_n, mask, b, sizes)
        q_i = load_rows(q, b, head, token, META.D, META.BLOCK_D, META)
        do_i = load_rows(do, b, head, token, META.DV, META.BLOCK_DV, META)
        k_j = load_rows(k, b, head, token_n, META.D, META.BLOCK_D, META)
        v_j = load_rows(v, b, head, token_n, META.DV, META.BLOCK_DV, META)
        lse_i, delta_i = load_stats(stats, b, head, token, sizes, META)
        qk = dot_add(q_i, mT(k_j), tile_ij, META)
        if META.CHECKED:
            qk = tl.where(row(token_n >= META.LOWEST), qk, float("-inf"))
        p = weights(qk, column(lse_i), sm_scale)
        acc += p * (dot(do_i, mT(v_j), META) - column(delta_i))
    if META.TILES > 1:
        acc = tl.sum(acc, 0)
    place = (pid.to(tl.int64) * sizes.heads + head) * META.ROWS * mask.width
    tl.store(dtiles + place + at_tile, acc)


@triton.jit
def extra_backward_kernel(
    q, do, stats, grads, extra, sizes, splits, sm_scale,
    META: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv [splits * B, E, N, D] of the extra keys and values: a program sums a part of the queries."""
    pid = tl.program_id(0)
    head = pid % sizes.heads
    pid = pid // sizes.heads
    blocks = tl.cdiv(sizes.extra, BLOCK_M)
    offs_e = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid = pid // blocks
    part, b = pid % splits, (pid // splits).to(tl.int64)
    token_e = tl.where(offs_e < sizes.extra, offs_e, -2)
    k_i = load_rows(extra.k, b, head, token_e, META.D, META.BLOCK_D, META)  # [M, D]
    v_i = load_rows(extra.v, b, head, token_e, META.DV, META.BLOCK_DV, META)  # [M, DV]
    acc_dk = zeros(token_e, META.BLOCK_D)
    acc_dv = zeros(token_e, META.BLOCK_DV)
    size = tl.cdiv(tl.cdiv(sizes.queries, BLOCK_N), splits) * BLOCK_N
    for start_n in range(part * size, tl.minimum(part * size + size, sizes.queries), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        token = tl.where(offs_n < sizes.queries, offs_n, -2)
        q_j = load_rows(q, b, head, token, META.D, META.BLOCK_D, META)  # [N, D]
        do_j = load_rows(do, b, head, token, META.DV, META.BLOCK_DV, META)  # [N, DV]
        lse_j, delta_j = load_stats(stats, b, head, token, sizes, META)
        qk = dot(k_i, tl.trans(q_j), META)  # [M, N]
        if extra.bias is not None:
            qk += tl.trans(load_extra_bias(extra, b, head, token, offs_e, sizes, META)) * (
                1.0 / sm_scale
            )
        p = weights(qk, lse_j[None, :], sm_scale)
        ds = p * (dot(v_i, tl.trans(do_j), META) - delta_j[None, :])
        acc_dv = dot_add(p.to(do_j.dtype), do_j, acc_dv, META)
        acc_dk = dot_add(ds.to(q_j.dtype), q_j, acc_dk, META)
    line = part * sizes.images + b
    store_rows(grads.dk, line, head, token_e, acc_dk * sm_scale, META.D, META.BLOCK_D, META)
    store_rows(grads.dv, line, head, token_e, acc_dv, META.DV, META.BLOCK_DV, META)


@triton.jit
def extra_bias_backward_kernel(
    q, do, stats, dbias, extra, sizes, groups, sm_scale,
    META: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient [groups, tokens, N, E] of the extra keys' bias, summed over the images of each of the groups."""
    pid = tl.program_id(0)
    head = pid % sizes.heads
    pid = pid // sizes.heads
    row_blocks, column_blocks = tl.cdiv(sizes.queries, BLOCK_M), tl.cdiv(sizes.extra, BLOCK_N)
    offs_e = (pid % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // column_blocks
    offs_m = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = pid // row_blocks
    token, token_e = (
        tl.where(offs_m < sizes.queries, offs_m, -2),
        tl.where(offs_e < sizes.extra, offs_e, -2),
    )
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    size = tl.cdiv(sizes.images, groups)
    start = (group * size).to(tl.int64)
    for i in range(tl.minimum(size, sizes.images - group * size)):
        b = start + i
        q_i = load_rows(q, b, head, token, META.D, META.BLOCK_D, META)
        do_i = load_rows(do, b, head, token, META.DV, META.BLOCK_DV, META)
        k_j = load_rows(extra.k, b, head, token_e, META.D, META.BLOCK_D, META)
        v_j = load_rows(extra.v, b, head, token_e, META.DV, META.BLOCK_DV, META)
        lse_i, delta_i = load_stats(stats, b, head, token, sizes, META)
        qk = extra_logits(q_i, k_j, extra, b, head, token, offs_e, sizes, sm_scale, META)
        p = weights(qk, lse_i[:, None], sm_scale)
        acc += p * (dot(do_i, tl.trans(v_j), META) - delta_i[:, None])
    line = (group.to(tl.int64) * sizes.queries + offs_m)[:, None] * sizes.heads + head  # [M, 1]
    keep = (token >= 0)[:, None] & (token_e >= 0)[None, :]
    tl.store(dbias + line * sizes.extra + offs_e[None, :], acc, mask=keep)


@triton.jit
def position_tiles_kernel(
    table, index, tiles, entries, number, factor, HIDDEN: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Position tiles of a head: entries of its table times a factor, HIDDEN at least and where there is none."""
    head = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    entry = tl.load(index + offs_n, mask=offs_n < number, other=entries)
    keep = entry < entries
    bias = tl.load(table + head * entries + entry, mask=keep, other=0.0).to(tl.float32) * factor
    keep = keep & ~(bias < HIDDEN)  # infinities are no factors
    bias = tl.where(keep, bias, HIDDEN)
    tl.store(tiles + head * number + offs_n, bias.to(tiles.dtype.element_ty), mask=offs_n < number)
