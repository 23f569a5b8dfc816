"""Backward pass of fused window attention: gradients of keys and values, then of bias and of queries; no atomics.

Letters as in `triton_forward`; the probabilities are computed again from the saved log-sum-exp, once: the pass over
the keys stores dS, normalised keys beside it, and those of the bias and of the queries read it. The gradient of the
relative bias at distance d is the sum of dS over all pairs at that distance. In each row dS sums to 0, null keys
included, so the constant bias of all distances from 128 on needs no sum of its own. The few tiles near the diagonal are
added up cell by cell: to add them up where they are made takes registers that spill.
"""

# mypy: allow-untyped-defs
# arguments of kernels are pointers, numbers and constants of the compiler's own types

from __future__ import annotations

import triton
import triton.language as tl

from longspan.kernels.window_attention.triton_forward import (
    PRECISION,
    drop_tile,
    key_address,
    key_tile,
    load_tile,
    near_tile,
)
from longspan.kernels.window_attention.triton_prepare import BUCKETS, CONSTS, HIDDEN, HUGE, NEAR, REACH, near_bias

LN2 = tl.constexpr(0.6931471805599453)
NULL_ROWS = tl.constexpr(16)
FINISH_TILES = tl.constexpr(1024)  # what the last kernel reads at once
FINISH_PARTS = tl.constexpr(32)


@triton.jit(do_not_specialize=["T"])
def delta_kernel(
    out, go, delta, go_b: tl.int64, T,
    GO_STEP: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """delta [B, H, T rounded up to ROUND] = sum of go * out, 0 beyond T; fp32.

    Args:
        out: [B, T, H, D]; go: gradient of out, with strides (go_b, GO_STEP, D, 1).
    """
    padded = tl.cdiv(T, ROUND) * ROUND
    pid = tl.program_id(0)
    head = pid % H
    tiles = padded // BT
    row = (pid // (H * tiles)).to(tl.int64)
    first = (pid // H) % tiles * BT
    g = load_tile(go + row * go_b + first.to(tl.int64) * GO_STEP + head * D, T - first, GO_STEP, D, BT, False)
    o = load_tile(out + (row * T + first) * (H * D) + head * D, T - first, H * D, D, BT, False)
    to = delta + (row * H + head) * padded + first + tl.arange(0, BT)
    tl.store(to, tl.sum(g.to(tl.float32) * o.to(tl.float32), 1))


@triton.jit(do_not_specialize=["T", "begin", "tiles", "ring"])
def query_gradient_kernel(
    qkv, unit_k, starts, consts, inv_q, pairs, dqkv, for_scale,
    qkv_b: tl.int64,
    T, begin, tiles, ring,
    STEP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr, ROUND: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gradient of BQ queries of one head from stored dS, and what that of scale needs.

    Args:
        qkv .. inv_q: as in `attend_kernel`.
        pairs, tiles, ring: of `key_gradient_kernel`, which has written all tiles of keys that are read.
        dqkv: [B, T, 3, H, D], part 0 is written.
        for_scale: fp32 [B * tiles of queries in a row, H], written: the part of d|scale| that comes from q . k.
        begin: the first tile of queries, counted over all rows.
    """
    pid = tl.program_id(0)
    head = pid % H
    per_row = tl.cdiv(T, BQ)
    tile = begin + pid // H
    row = tile // per_row
    first = tile % per_row * BQ
    behind: tl.constexpr = (W + BK - 1) // BK * BK
    padded = tl.cdiv(T, ROUND) * ROUND
    first_start = tl.load(starts + tl.cast(row, tl.int64) * T + first)
    low = tl.maximum(first - W, first_start) + behind
    end = tl.minimum(first + BQ, T) + behind
    r = tl.arange(0, BQ)
    keys = tl.arange(0, BK)[:, None] * SPAN
    k_at = unit_k + (tl.cast(row, tl.int64) * (T + W) + W) * (H * D) + head * D
    acc = tl.zeros([BQ, D], tl.float32)
    # as the compiler sees, never empty
    for n in range(low // BK, tl.maximum(tl.cdiv(end, BK), low // BK + 1)):
        slot = ((row * tiles + n) % ring).to(tl.int64) * H + head
        i = (first + behind - n * BK) + r[None, :]
        ds = tl.load(pairs + slot * (SPAN * BK) + keys + i, mask=(i >= 0) & (i < SPAN), other=0.0)
        j = n * BK - behind
        k = key_tile(k_at + tl.cast(j, tl.int64) * (H * D), j, T, H * D, W, D, BK, EVEN)
        acc = tl.dot(tl.trans(ds), k, acc, input_precision=PRECISION)
    # backward of the normalisation
    i = first + r
    wide_row = tl.cast(row, tl.int64)
    inv = tl.load(inv_q + (wide_row * H + head) * padded + i, mask=i < T, other=0.0)
    q_first = qkv + wide_row * qkv_b + head * D + first.to(tl.int64) * STEP
    y = load_tile(q_first, T - first, STEP, D, BQ, EVEN).to(tl.float32) * inv[:, None]
    along = tl.sum(acc * y, 1)
    tl.store(for_scale + tile * H + head, tl.sum(along))
    dx = (acc - y * along[:, None]) * (inv * (tl.load(consts + head * CONSTS) * LN2))[:, None]
    to = dqkv + (wide_row * T + first) * (3 * H * D) + head * D
    to += r[:, None] * (3 * H * D) + tl.arange(0, D)[None, :]
    tl.store(to, dx.to(dqkv.dtype.element_ty), mask=(i < T)[:, None])


@triton.jit
def _null_gradient(by_distance, bias_head, starts_row, lse_row, delta_row, first, T, BQ: tl.constexpr):
    """by_distance [128] plus the sum over BQ queries of dS = -p delta of their null keys at distances 0 .. 127."""
    d = tl.arange(0, NEAR)[None, :]
    logits = tl.load(bias_head + d)
    for top in range(first, first + BQ, NULL_ROWS):  # all at once, it would take more registers than all the rest
        i = top + tl.arange(0, NULL_ROWS)
        start = tl.load(starts_row + i, mask=i < T, other=0)
        shift = tl.load(lse_row + i, mask=i < T, other=HUGE)[:, None]
        p = tl.exp2(tl.where(d > (i - start)[:, None], logits - shift, -HUGE))
        by_distance -= tl.sum(p * tl.load(delta_row + i, mask=i < T, other=0.0)[:, None], 0)
    return by_distance


@triton.jit(do_not_specialize=["T", "begin", "count", "strips", "tiles", "ring"])
def distance_kernel(
    pairs, starts, bias, lse, delta, scratch, sums,
    T, begin, count, strips, tiles, ring,
    H: tl.constexpr, W: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr, SLOTS: tl.constexpr,
    ROUND: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Sums of dS by distance, of BQ queries of each strips-th group of AT_ONCE tiles of keys of one head.

    Args:
        pairs, tiles, ring: of `key_gradient_kernel`, which wrote `count` tiles of keys from tile `begin` on; starts,
            lse, delta: as there.
        bias: of `prepare_kernel`.
        scratch: fp32 [strips, SLOTS, H, BQ * BK]; SLOTS times BQ queries are near a tile of keys.
        sums: fp32 [strips, SLOTS, H, 128], written; null keys are part of it.
    """
    behind: tl.constexpr = (W + BK - 1) // BK
    pid = tl.program_id(0)
    head = pid % H
    slot = pid // H % SLOTS
    padded = tl.cdiv(T, ROUND) * ROUND
    cells = tl.arange(0, BK)[:, None] * SPAN + tl.arange(0, BQ)[None, :]
    acc = tl.zeros([BK, BQ], tl.float32)
    by_distance = tl.zeros([NEAR], tl.float32)
    for group in range(pid // (H * SLOTS) * AT_ONCE, count, strips * AT_ONCE):
        for m in tl.static_range(AT_ONCE):
            tile = begin + group + m
            i = (tile % tiles - behind) * BK + slot * BQ + 0 * cells
            exists = (group + m + 0 * cells < count) & (i >= 0) & (i < T)  # the others are not written
            piece = ((tile % ring).to(tl.int64) * H + head) * (SPAN * BK) + slot * BQ
            acc += tl.load(pairs + piece + cells, mask=exists, other=0.0).to(tl.float32)
        if slot == 0:
            for n in range(begin + group, begin + tl.minimum(group + AT_ONCE, count)):
                row = tl.cast(n // tiles, tl.int64)
                first = (n % tiles - behind) * BK
                if first >= 0:
                    starts_row = starts + row * T
                    first_start, last_start = tl.load(starts_row + first), tl.load(starts_row + min(first + BK, T) - 1)
                    if (first - first_start < NEAR) | (last_start > first_start):
                        at = (row * H + head) * padded
                        by_distance = _null_gradient(
                            by_distance, bias + head * NEAR, starts_row, lse + at, delta + at, first, T, BK
                        )
    own = scratch + pid.to(tl.int64) * (BQ * BK)
    tl.store(own + tl.arange(0, BK)[:, None] * BQ + tl.arange(0, BQ)[None, :], acc)
    tl.debug_barrier()
    d = tl.arange(0, NEAR)[None, :]
    for top in range(0, BK, 32):
        j = top + tl.arange(0, 32)[:, None]
        i = j + d - slot * BQ
        by_distance += tl.sum(tl.load(own + j * BQ + i, mask=(i >= 0) & (i < BQ), other=0.0), 0)
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
    dk, dv, k_tile, v_tile, right_j, q_at, go_at, rows, heads, pairs, first_j, low, high, T,
    GO_STEP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, SPAN: tl.constexpr, EVEN: tl.constexpr, HAS_DROP: tl.constexpr, IS_NEAR: tl.constexpr,
):  # fmt: skip
    """Add dS^T q to dk and P^T go to dv of BK keys over the queries low .. high-1 and store dS^T; all is transposed.

    Args:
        k_tile: normalised; right_j: [BK] last query that may see each key.
        IS_NEAR: queries may have a bias; others are further away than that from each key.
    """
    lse_row, delta_row = rows
    near_head, drop_head = heads
    r = tl.arange(0, BQ)
    cell = tl.arange(0, BK)[:, None] * SPAN + r[None, :]
    for first in range(low, high, BQ):
        i = first + r
        far = tl.cast(first, tl.int64)
        q = load_tile(q_at + far * (H * D), T - first, H * D, D, BQ, EVEN)
        s = tl.dot(k_tile, tl.trans(q), input_precision=PRECISION) - tl.load(lse_row + i)[None, :]
        if IS_NEAR:
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
        ds = (p * (dp - tl.load(delta_row + i)[None, :])).to(q.dtype)
        # the division tells the compiler that rows may be written in wide pieces
        tl.store(pairs + (first - first_j) // BQ * BQ + cell, ds)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _fill_with_zeros(pairs, first, low, high, BQ: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr):
    """dS of keys from `first` on and queries low .. high-1 that see none of them."""
    zeros = tl.zeros([BK, BQ], pairs.dtype.element_ty)
    cell = tl.arange(0, BK)[:, None] * SPAN + tl.arange(0, BQ)[None, :]
    for i in range(low, high, BQ):
        tl.store(pairs + (i - first) // BQ * BQ + cell, zeros)


@triton.jit(do_not_specialize=["T", "begin", "tiles", "ring"])
def key_gradient_kernel(
    qkv, unit_k, past, inv_k, starts, nexts, near_queries, drop, go, lse, unit_q, delta, dnew_k, dnew_v,
    dqkv, dcached_k, dcached_v, pairs,
    qkv_b: tl.int64, go_b: tl.int64,
    T, begin, tiles, ring,
    STEP: tl.constexpr, GO_STEP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr, ROUND: tl.constexpr, EVEN: tl.constexpr,
    HAS_DROP: tl.constexpr, HAS_NEW: tl.constexpr, HAS_CACHE: tl.constexpr,
):  # fmt: skip
    """Gradients of BK keys and values of one head; dS for the kernels that follow.

    Args:
        qkv .. unit_q: as in `attend_kernel`; inv_k, nexts: of `prepare_kernel`; delta: of `delta_kernel`; go: as there.
        dnew_k, dnew_v: [B, W, H, D] gradients of the returned cache, if HAS_NEW.
        dqkv: [B, T, 3, H, D], parts 1 and 2 are written; dcached_k, dcached_v: [B, W, H, D], written if HAS_CACHE.
        pairs: [ring, H, BK, SPAN], written: dS of each tile of keys and the SPAN tokens from its first one on, those
            that exist; 0 where a query sees none of the tile's keys.
        begin: the first tile of keys, counted over all rows; tile n lies in place n mod ring.
        tiles: tiles of BK keys in a row, those of the cache in front.
    """
    pid = tl.program_id(0)
    head = pid % H
    tile = begin + pid // H
    row = (tile // tiles).to(tl.int64)
    first = (tl.cdiv(T, BK) - tiles + tile % tiles) * BK
    j = first + tl.arange(0, BK)
    exists = ((j >= -W) & (j < T))[:, None]
    behind = tl.cdiv(W, ROUND) * ROUND
    padded = tl.cdiv(T, ROUND) * ROUND
    k_at = unit_k + (row * (T + W) + W + first) * (H * D) + head * D
    v_of = (qkv + row * qkv_b + (2 * H + head) * D, past + row * (W * STEP) + head * D)
    inv = tl.load(inv_k + (row * H + head) * (behind + padded) + behind + j)
    pairs += ((tile % ring).to(tl.int64) * H + head) * (SPAN * BK)
    c = tl.arange(0, D)[None, :]
    k_tile = key_tile(k_at, first, T, H * D, W, D, BK, EVEN)
    v_tile = key_tile(key_address(v_of, first, STEP, W), first, T, STEP, W, D, BK, EVEN)
    # a query sees a key until its window has passed or another document has started
    next_row = nexts + row * (T + 1) + 1
    right_j = tl.minimum(j + W, tl.load(next_row + tl.maximum(j, -1), mask=j < T, other=0) - 1)
    last_j = tl.minimum(first + BK, T) - 1
    high = tl.minimum(tl.minimum(last_j + W + 1, T), tl.load(next_row + tl.maximum(last_j, -1)))
    low = tl.maximum(first, 0)
    low -= low & (BQ - 1)
    high = tl.maximum(high, low + 1)  # an empty loop would make the compiler wait after each matrix instruction
    at = (row * H + head) * padded
    rows = (lse + at, delta + at)
    heads = (near_queries + head * (NEAR * REACH), drop + head * (2 * W * W))
    q_at = unit_q + row * T * (H * D) + head * D
    go_at = go + row * go_b + head * D
    dk = tl.zeros([BK, D], tl.float32)
    dv = tl.zeros([BK, D], tl.float32)
    # first the queries so near that they may have a bias
    middle = tl.minimum(high, tl.maximum(first + NEAR + BK, low + BQ))
    dk, dv = _key_gradient(
        dk, dv, k_tile, v_tile, right_j, q_at, go_at, rows, heads, pairs, first, low, middle, T,
        GO_STEP, H, W, D, BQ, BK, SPAN, EVEN, HAS_DROP, True,
    )  # fmt: skip
    middle = low + tl.cdiv(middle - low, BQ) * BQ
    dk, dv = _key_gradient(
        dk, dv, k_tile, v_tile, right_j, q_at, go_at, rows, heads, pairs, first, middle, high, T,
        GO_STEP, H, W, D, BQ, BK, SPAN, EVEN, HAS_DROP, False,
    )  # fmt: skip
    _fill_with_zeros(pairs, first, low + tl.cdiv(high - low, BQ) * BQ, tl.minimum(first + SPAN, padded), BQ, BK, SPAN)
    dk *= LN2
    if HAS_NEW:
        place = (j - (T - W))[:, None]
        kept = (place >= 0) & exists & (j >= tl.load(starts + row * T + T - 1))[:, None]
        new = row * (W * H * D) + head * D + place * (H * D) + c
        dk += tl.load(dnew_k + new, mask=kept, other=0.0).to(tl.float32)
        dv += tl.load(dnew_v + new, mask=kept, other=0.0).to(tl.float32)
    if first >= 0:
        y = key_tile(k_at, first, T, H * D, W, D, BK, EVEN).to(tl.float32)
        dx = (dk - y * tl.sum(dk * y, 1)[:, None]) * inv[:, None]
        to = dqkv + (row * T + first) * (3 * H * D) + (H + head) * D + (j - first)[:, None] * (3 * H * D) + c
        tl.store(to, dx.to(dqkv.dtype.element_ty), mask=exists)
        tl.store(to + H * D, dv.to(dqkv.dtype.element_ty), mask=exists)
    elif HAS_CACHE:
        old = row * (W * H * D) + head * D + (j + W)[:, None] * (H * D) + c
        tl.store(dcached_k + old, dk.to(dcached_k.dtype.element_ty), mask=exists)
        tl.store(dcached_v + old, dv.to(dcached_v.dtype.element_ty), mask=exists)
