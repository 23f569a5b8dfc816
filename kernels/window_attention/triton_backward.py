"""Backward pass of fused window attention: gradients of queries and bias, then of keys and values; no atomics.

Letters as in `triton_forward`; the probabilities are computed again from the saved log-sum-exp. The gradient of the
relative bias at distance d is the sum of dS over all pairs at that distance. In each row dS sums to 0, null keys
included, so the constant bias of all distances from 128 on needs no sum of its own. The few tiles near the diagonal are
stored and added up afterwards, cell by cell: to add them up where they are made takes registers that spill.
"""

# mypy: allow-untyped-defs
# arguments of kernels are pointers, numbers and constants of the compiler's own types

from __future__ import annotations

import triton
import triton.language as tl

from longspan.kernels.window_attention.triton_forward import (
    PRECISION,
    document_starts,
    drop_tile,
    key_address,
    key_ranges,
    key_tile,
    load_tile,
    near_tile,
    scores,
)
from longspan.kernels.window_attention.triton_prepare import BUCKETS, CONSTS, HIDDEN, HUGE, NEAR, REACH, near_bias

LN2 = tl.constexpr(0.6931471805599453)
NULL_ROWS = tl.constexpr(16)
FINISH_TILES = tl.constexpr(1024)  # what the last kernel reads at once
FINISH_PARTS = tl.constexpr(32)


@triton.jit
def _pair_cell(r, c, BQ: tl.constexpr):
    """Place of row r, column c in a stored tile of BQ rows: so ordered, a warp writes whole cache lines."""
    return (c // 8 * BQ + r) * 8 + c % 8


@triton.jit
def _query_gradient(
    acc, for_scale, q, go, unit_i, lse_i, delta_i, left_i, k_of, heads, pairs, first, low, high, T,
    STEP: tl.constexpr, GAP: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, BACK: tl.constexpr, EVEN: tl.constexpr, HAS_DROP: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """Add up dS k and dS (q . k) of a tile of queries over the keys low .. high-1; store dS where it is near."""
    inv_head, near_head, drop_head = heads
    r = tl.arange(0, BQ)
    c = tl.arange(0, BK)
    for n in range(0, tl.maximum(tl.cdiv(high - low, BK), 1)):  # as the compiler sees, never empty
        first_j = low + n * BK
        at = key_address(k_of, first_j, STEP, W)
        s, product, k_tile, inv = scores(
            q, unit_i, lse_i, left_i, at, inv_head, near_head, first, first_j, T, STEP, W, D, BQ, BK, EVEN
        )
        p = tl.exp2(s)
        v_tile = key_tile(at + GAP, first_j, T, STEP, W, D, BK, EVEN)
        dp = tl.dot(go, tl.trans(v_tile), input_precision=PRECISION)
        if HAS_DROP:
            dp *= drop_tile(drop_head, (first + r)[:, None], (first_j + c)[None, :], W)
        ds = p * (dp - delta_i[:, None])
        for_scale += tl.sum(ds * product, 1)
        if HAS_TABLE:  # noqa: SIM102 - decided at compile time, the next line at run time
            if first_j >= first - BACK:
                place = (first_j - first + BACK) * BQ + _pair_cell(r[:, None], c[None, :], BQ)
                tl.store(pairs + place, ds.to(pairs.dtype.element_ty))
        acc = tl.dot((ds * inv[None, :]).to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    return acc, for_scale


@triton.jit(do_not_specialize=["T", "begin"])
def query_gradient_kernel(
    qkv, past, inv_k, starts, near_keys, consts, drop, out, go, lse, inv_q, delta, dqkv, pairs, for_scale,
    qkv_b: tl.int64, go_b: tl.int64,
    T, begin,
    STEP: tl.constexpr, GO_STEP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BACK: tl.constexpr, ROUND: tl.constexpr, EVEN: tl.constexpr,
    HAS_DROP: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """Gradient of BQ queries of one head, and what those of bias and scale need.

    Args:
        qkv .. inv_q: as in `attend_kernel`; go: gradient of out, [B, T, H, D] with strides (go_b, GO_STEP, D, 1).
        delta: fp32 like lse, written: sum of go * out.
        dqkv: [B, T, 3, H, D], part 0 is written.
        pairs: [tiles, H, BACK + BQ, BQ] if HAS_TABLE, written: dS of each tile of queries and the keys from BACK
            before its first query to its last one, a piece for each tile of keys, in the order of `_pair_cell`.
        for_scale: fp32 [B * tiles in a row, H], written: the part of d|scale| that comes from q . k.
        begin: the first tile of queries, counted over all rows.
        BACK: as many tokens as the window has, but no more than have a bias of their own, in whole tiles of BK.
    """
    pid = tl.program_id(0)
    head = pid % H
    tiles = tl.cdiv(T, BQ)
    tile = begin + pid // H
    row = (tile // tiles).to(tl.int64)
    first = tile % tiles * BQ
    behind = tl.cdiv(W, ROUND) * ROUND
    padded = tl.cdiv(T, ROUND) * ROUND
    factor = tl.load(consts + head * CONSTS)
    i = first + tl.arange(0, BQ)
    at = (row * H + head) * padded + i
    unit_i = tl.load(inv_q + at) * factor
    lse_i = tl.load(lse + at)
    token = row * T + first
    q_at = qkv + row * qkv_b + head * D
    q_first = q_at + first.to(tl.int64) * STEP
    q_tile = load_tile(q_first, T - first, STEP, D, BQ, EVEN)
    go_at = go + row * go_b + first.to(tl.int64) * GO_STEP + head * D
    g = load_tile(go_at, T - first, GO_STEP, D, BQ, EVEN)
    o = load_tile(out + token * (H * D) + head * D, T - first, H * D, D, BQ, EVEN)
    delta_i = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + at, delta_i)
    start, first_start = document_starts(starts + row * T, first, T, BQ)
    left_i = tl.maximum(start, i - W)
    # all tiles that are summed by distance are written, even if a document starts in them
    low, high = key_ranges(first, first_start, T, W, BACK if HAS_TABLE else 0, BQ, BK)
    k_of = (q_at + H * D, past + row * (W * STEP) + head * D)
    inv_head = inv_k + (row * H + head) * (behind + padded) + behind
    heads = (inv_head, near_keys + head * (NEAR * REACH), drop + head * (2 * W * W))
    acc = tl.zeros([BQ, D], tl.float32)
    along = tl.zeros([BQ], tl.float32)
    acc, along = _query_gradient(
        acc, along, q_tile, g, unit_i, lse_i, delta_i, left_i, k_of, heads,
        pairs + pid.to(tl.int64) * ((BACK + BQ) * BQ), first, low, high, T,
        STEP, H * D, W, D, BQ, BK, BACK, EVEN, HAS_DROP, HAS_TABLE,
    )  # fmt: skip
    # backward of the normalisation
    inv = tl.load(inv_q + at)
    tl.store(for_scale + tile * H + head, tl.sum(along * inv))
    y = load_tile(q_first, T - first, STEP, D, BQ, EVEN).to(tl.float32) * inv[:, None]
    dx = (acc - y * tl.sum(acc * y, 1)[:, None]) * (inv * factor * LN2)[:, None]
    to = dqkv + token * (3 * H * D) + head * D
    to += tl.arange(0, BQ)[:, None] * (3 * H * D) + tl.arange(0, D)[None, :]
    tl.store(to, dx.to(dqkv.dtype.element_ty), mask=(i < T)[:, None])


@triton.jit
def _null_gradient(by_distance, bias_head, starts_row, lse_row, delta_row, first, T, BQ: tl.constexpr):
    """by_distance [128] plus the sum over BQ queries of dS = -p delta of their null keys at distances 0 .. 127."""
    d = tl.arange(0, NEAR)[None, :]
    logits = tl.load(bias_head + d)
    for top in range(first, first + BQ, NULL_ROWS):  # all at once, it would take more registers than all the rest
        i = top + tl.arange(0, NULL_ROWS)
        start = tl.load(starts_row + i, mask=i < T, other=0)
        shift = tl.load(lse_row + i)[:, None]
        p = tl.exp2(tl.where(d > (i - start)[:, None], logits - shift, -HUGE))
        by_distance -= tl.sum(p * tl.load(delta_row + i)[:, None], 0)
    return by_distance


@triton.jit(do_not_specialize=["T", "begin", "count", "strips"])
def distance_kernel(
    pairs, starts, bias, lse, delta, scratch, sums,
    T, begin, count, strips,
    H: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BACK: tl.constexpr, ROUND: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Sums of dS by distance, of one tile of keys in each strips-th group of AT_ONCE tiles of queries of one head.

    Args:
        pairs: of `query_gradient_kernel`, which wrote `count` tiles from tile `begin` on; starts, lse, delta: as there.
        bias: of `prepare_kernel`.
        scratch: fp32 [strips, SLOTS, H, BQ * BK] with SLOTS = (BACK + BQ) / BK.
        sums: fp32 [strips, SLOTS, H, 128], written; null keys are part of it.
    """
    SLOTS: tl.constexpr = (BACK + BQ) // BK
    pid = tl.program_id(0)
    head = pid % H
    slot = pid // H % SLOTS
    tiles = tl.cdiv(T, BQ)
    padded = tl.cdiv(T, ROUND) * ROUND
    cells = tl.arange(0, BQ * BK)
    acc = tl.zeros([BQ * BK], tl.float32)
    by_distance = tl.zeros([NEAR], tl.float32)
    for group in range(pid // (H * SLOTS) * AT_ONCE, count, strips * AT_ONCE):
        for m in tl.static_range(AT_ONCE):
            piece = ((tl.cast(group + m, tl.int64) * H + head) * SLOTS + slot) * (BQ * BK)
            acc += tl.load(pairs + piece + cells, mask=group + m + 0 * cells < count, other=0.0).to(tl.float32)
        if slot == 0:
            for n in range(begin + group, begin + tl.minimum(group + AT_ONCE, count)):
                row = tl.cast(n // tiles, tl.int64)
                first = n % tiles * BQ
                starts_row = starts + row * T
                first_start, last_start = tl.load(starts_row + first), tl.load(starts_row + min(first + BQ, T) - 1)
                if (first - first_start < NEAR) | (last_start > first_start):
                    at = (row * H + head) * padded
                    by_distance = _null_gradient(
                        by_distance, bias + head * NEAR, starts_row, lse + at, delta + at, first, T, BQ
                    )
    own = scratch + pid.to(tl.int64) * (BQ * BK)
    tl.store(own + cells, acc)
    tl.debug_barrier()
    d = tl.arange(0, NEAR)[None, :]
    for top in range(0, BQ, 32):
        r = top + tl.arange(0, 32)[:, None]
        c = r + BACK - slot * BK - d
        by_distance += tl.sum(tl.load(own + _pair_cell(r, c, BQ), mask=(c >= 0) & (c < BK), other=0.0), 0)
    tl.store(sums + pid.to(tl.int64) * NEAR + tl.arange(0, NEAR), by_distance)


@triton.jit(do_not_specialize=["parts", "tiles"])
def finish_kernel(
    sums, for_scale, table, scale, buckets, dtable, dscale, parts, tiles,
    H: tl.constexpr, W: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """Gradients of the bias table [H, 32] and of scale [H].

    Args:
        sums: fp32 [parts, H, 128], dS by distance, if HAS_TABLE; for_scale: fp32 [tiles, H].
    """
    head = tl.program_id(0)
    d = tl.arange(0, NEAR)
    shares = tl.zeros([FINISH_TILES], tl.float32)
    for start in range(0, tiles, FINISH_TILES):
        n = start + tl.arange(0, FINISH_TILES)
        shares += tl.load(for_scale + n * H + head, mask=n < tiles, other=0.0)
    d_scale = tl.sum(shares)
    raw = tl.load(scale + head).to(tl.float32)
    if HAS_TABLE:
        by_distance = tl.zeros([NEAR], tl.float32)
        for start in range(0, parts, FINISH_PARTS):
            n = start + tl.arange(0, FINISH_PARTS)[:, None]
            by_distance += tl.sum(tl.load(sums + (n * H + head) * NEAR + d[None, :], mask=n < parts, other=0.0), 0)
        exists = (d >= 1) & (d <= W)
        by_distance = tl.where(exists, by_distance, 0.0)
        d_scale += tl.sum(by_distance * near_bias(table, buckets, head, 1.0, d, W, HAS_TABLE))
        bucket = tl.load(buckets + d)
        last = tl.load(buckets + min(W, NEAR - 1))
        by_distance = tl.where(bucket == last, 0.0, by_distance)
        b = tl.arange(0, BUCKETS)
        value = tl.sum(tl.where(bucket[None, :] == b[:, None], by_distance[None, :], 0.0), 1)
        value = tl.where(b == last, -tl.sum(by_distance), value) * tl.abs(raw)
        tl.store(dtable + head * BUCKETS + b, value.to(dtable.dtype.element_ty))
    sign = tl.where(raw > 0, 1.0, tl.where(raw < 0, -1.0, 0.0))
    tl.store(dscale + head, (d_scale * sign).to(dscale.dtype.element_ty))


@triton.jit
def _key_gradient(
    dk, dv, k_tile, v_tile, inv_j, right_j, q_at, go_at, rows, heads, first_j, low, high, T,
    STEP: tl.constexpr, GO_STEP: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, EVEN: tl.constexpr, HAS_DROP: tl.constexpr,
):  # fmt: skip
    """Add dS^T q to dk and P^T go to dv of BK keys over the queries low .. high-1; scores are transposed.

    Args:
        inv_j, right_j: [BK] what normalises the keys, last query that may see them.
    """
    lse_row, delta_row, inv_row = rows
    factor, near_head, drop_head = heads
    for first in range(low, high, BQ):
        i = first + tl.arange(0, BQ)
        far = tl.cast(first, tl.int64)
        q = load_tile(q_at + far * STEP, T - first, STEP, D, BQ, EVEN)
        unit_i = tl.load(inv_row + i) * factor
        s = tl.dot(k_tile, tl.trans(q), input_precision=PRECISION) * unit_i[None, :] * inv_j[:, None]
        s -= tl.load(lse_row + i)[None, :]
        s += near_tile(near_head, tl.minimum(first - first_j, 2 * NEAR), BK, BQ)
        p = tl.exp2(tl.where(i[None, :] <= right_j[:, None], s, HIDDEN))
        go = load_tile(go_at + far * GO_STEP, T - first, GO_STEP, D, BQ, EVEN)
        dp = tl.dot(v_tile, tl.trans(go), input_precision=PRECISION)
        seen = p
        if HAS_DROP:
            j = first_j + tl.arange(0, BK)
            keep = drop_tile(drop_head, i[None, :], j[:, None], W)
            seen = p * keep
            dp *= keep
        dv = tl.dot(seen.to(go.dtype), go, dv, input_precision=PRECISION)
        ds = p * (dp - tl.load(delta_row + i)[None, :]) * unit_i[None, :]
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T", "tiles"])
def key_gradient_kernel(
    qkv, past, inv_k, starts, nexts, near_queries, consts, drop, go, lse, inv_q, delta, dnew_k, dnew_v,
    dqkv, dcached_k, dcached_v,
    qkv_b: tl.int64, go_b: tl.int64,
    T, tiles,
    STEP: tl.constexpr, GO_STEP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, ROUND: tl.constexpr, EVEN: tl.constexpr, HAS_DROP: tl.constexpr,
    HAS_NEW: tl.constexpr, HAS_CACHE: tl.constexpr,
):  # fmt: skip
    """Gradients of BK keys and values of one head.

    Args:
        qkv .. delta: as in `query_gradient_kernel`; nexts: of `prepare_kernel`.
        dnew_k, dnew_v: [B, W, H, D] gradients of the returned cache, if HAS_NEW.
        dqkv: [B, T, 3, H, D], parts 1 and 2 are written; dcached_k, dcached_v: [B, W, H, D], written if HAS_CACHE.
        tiles: tiles of BK keys in a row, those of the cache included if HAS_CACHE.
    """
    pid = tl.program_id(0)
    head = pid % H
    row = (pid // (H * tiles)).to(tl.int64)
    first = (tl.cdiv(T, BK) - tiles + (pid // H) % tiles) * BK
    j = first + tl.arange(0, BK)
    exists = ((j >= -W) & (j < T))[:, None]
    behind = tl.cdiv(W, ROUND) * ROUND
    padded = tl.cdiv(T, ROUND) * ROUND
    q_at = qkv + row * qkv_b + head * D
    k_at = key_address((q_at + H * D, past + row * (W * STEP) + head * D), first, STEP, W)
    k_tile = key_tile(k_at, first, T, STEP, W, D, BK, EVEN)
    v_tile = key_tile(k_at + H * D, first, T, STEP, W, D, BK, EVEN)
    inv = tl.load(inv_k + (row * H + head) * (behind + padded) + behind + j)

    # a query sees a key until its window has passed or another document has started
    next_row = nexts + row * (T + 1) + 1
    right_j = tl.minimum(j + W, tl.load(next_row + tl.maximum(j, -1), mask=j < T, other=0) - 1)
    last_j = tl.minimum(first + BK, T) - 1
    high = tl.minimum(tl.minimum(last_j + W + 1, T), tl.load(next_row + tl.maximum(last_j, -1)))
    low = tl.maximum(first, 0)
    low -= low & (BQ - 1)
    high = tl.maximum(high, low + 1)  # an empty loop would make the compiler wait after each matrix instruction
    at = (row * H + head) * padded
    rows = (lse + at, delta + at, inv_q + at)
    heads = (tl.load(consts + head * CONSTS), near_queries + head * (NEAR * REACH), drop + head * (2 * W * W))
    go_at = go + row * go_b + head * D
    dk = tl.zeros([BK, D], tl.float32)
    dv = tl.zeros([BK, D], tl.float32)
    dk, dv = _key_gradient(
        dk, dv, k_tile, v_tile, inv, right_j, q_at, go_at, rows, heads, first, low, high, T,
        STEP, GO_STEP, W, D, BQ, BK, EVEN, HAS_DROP,
    )  # fmt: skip
    dk *= LN2
    c = tl.arange(0, D)[None, :]
    if HAS_NEW:
        place = (j - (T - W))[:, None]
        kept = (place >= 0) & exists & (j >= tl.load(starts + row * T + T - 1))[:, None]
        new = row * (W * H * D) + head * D + place * (H * D) + c
        dk += tl.load(dnew_k + new, mask=kept, other=0.0).to(tl.float32)
        dv += tl.load(dnew_v + new, mask=kept, other=0.0).to(tl.float32)
    if first >= 0:
        y = key_tile(k_at, first, T, STEP, W, D, BK, EVEN).to(tl.float32) * inv[:, None]
        dx = (dk - y * tl.sum(dk * y, 1)[:, None]) * inv[:, None]
        to = dqkv + (row * T + first) * (3 * H * D) + (H + head) * D + (j - first)[:, None] * (3 * H * D) + c
        tl.store(to, dx.to(dqkv.dtype.element_ty), mask=exists)
        tl.store(to + H * D, dv.to(dqkv.dtype.element_ty), mask=exists)
    elif HAS_CACHE:
        old = row * (W * H * D) + head * D + (j + W)[:, None] * (H * D) + c
        tl.store(dcached_k + old, dk.to(dcached_k.dtype.element_ty), mask=exists)
        tl.store(dcached_v + old, dv.to(dcached_v.dtype.element_ty), mask=exists)
