"""Backward pass of fused window attention: gradients of keys and values, then of bias and of queries; no atomics.

Letters as in `triton_forward`; the probabilities are computed again from the saved log-sum-exp, once: the pass over
the keys stores dS, and that over the queries reads it. The gradient of the relative bias at distance d is the sum of dS
over all pairs at that distance. In each row dS sums to 0, null keys included, so the constant bias of all distances
from 128 on needs no sum of its own. Each program over keys adds up its own few tiles near the diagonal when all else is
done, from memory: to add them up where they are made takes registers that spill.

With TMA, tensors that the loops read come as descriptors made by the host, and the copy engine fetches tiles: zeros
where a row has no tokens. Without it, on GPUs below compute capability 9.0, they are contiguous tensors.
"""

# mypy: allow-untyped-defs
# arguments of kernels are pointers, numbers and constants of the compiler's own types

from __future__ import annotations

import triton
import triton.language as tl

from longspan.kernels.direct_launches import launched_directly
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
FINISH_PARTS = tl.constexpr(64)
FINISH_STAGES = tl.constexpr(4)  # copies in flight: 12 us on an H100; 256 parts at once, without copies, 15
DISTANCE_ROWS = tl.constexpr(32)  # keys whose dS is added up at once


@launched_directly
@triton.jit(do_not_specialize=["T"])
def delta_kernel(
    out, go, delta, go_b: tl.int64, T,
    GO_STEP: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """delta [B, H, T rounded up to ROUND] = sum of go * out, 0 beyond T; fp32. The last tokens go first: their go was
    written last and still lies in the cache.

    Args:
        out: [B, T, H, D]; go: gradient of out, with strides (go_b, GO_STEP, D, 1).
    """
    padded = tl.cdiv(T, ROUND) * ROUND
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    head = pid % H
    tiles = padded // BT
    row = (pid // (H * tiles)).to(tl.int64)
    first = (pid // H) % tiles * BT
    g = load_tile(go + row * go_b + first.to(tl.int64) * GO_STEP + head * D, T - first, GO_STEP, D, BT, False)
    o = load_tile(out + (row * T + first) * (H * D) + head * D, T - first, H * D, D, BT, False)
    to = delta + (row * H + head) * padded + first + tl.arange(0, BT)
    tl.store(to, tl.sum(g.to(tl.float32) * o.to(tl.float32), 1))


@triton.jit
def _token_piece(
    of, row, head, first, T,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[ROWS, D] of one head of [B, T, H * D] from token `first` on; zeros beyond T."""
    if TMA:
        piece = of.load([row, first, head * D]).reshape(ROWS, D)
    else:
        at = of + (tl.cast(row, tl.int64) * T + first) * (H * D) + head * D
        piece = load_tile(at, T - first, H * D, D, ROWS, EVEN)
    return piece


@triton.jit
def _number_piece(of, row, first, length, COUNT: tl.constexpr, TMA: tl.constexpr):
    """[COUNT] of [any, length] from number `first` of a row on."""
    if TMA:
        piece = of.load([row, first]).reshape(COUNT)
    else:
        piece = tl.load(of + tl.cast(row, tl.int64) * length + first + tl.arange(0, COUNT))
    return piece


@launched_directly
@triton.jit(do_not_specialize=["T", "begin", "count", "tiles", "ring"])
def query_gradient_kernel(
    qkv, unit_k, starts, consts, inv_q, pairs, dqkv, for_scale,
    qkv_b: tl.int64,
    T, begin, count, tiles, ring,
    STEP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    SPAN: tl.constexpr, ROUND: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradient of BQ queries of one head from stored dS, and what that of scale needs.

    Args:
        qkv .. inv_q: as in `attend_kernel`; unit_k: as [B, W + T, H * D], pieces of [1, BK, D].
        pairs: as [ring * H * BK, SPAN], pieces of [BK, BQ]; tiles, ring: of `key_gradient_kernel`, which has written
            all tiles of keys that are read.
        dqkv: [B, T, 3, H, D], part 0 is written.
        for_scale: fp32 [B * tiles of queries in a row, H], written: the part of d|scale| that comes from q . k.
        begin, count: the first tile of queries, counted over all rows, and how many there are. The last go first:
            their dS was stored last and still lies in the cache.
    """
    pid = tl.program_id(0)
    head = pid % H
    per_row = tl.cdiv(T, BQ)
    tile = begin + count - 1 - pid // H
    row = tile // per_row
    first = tile % per_row * BQ
    behind: tl.constexpr = (W + BK - 1) // BK * BK
    padded = tl.cdiv(T, ROUND) * ROUND
    wide_row = tl.cast(row, tl.int64)
    first_start = tl.load(starts + wide_row * T + first)
    low = tl.maximum(first - W, first_start) + behind
    end = tl.minimum(first + BQ, T) + behind
    acc = tl.zeros([BQ, D], tl.float32)
    # as the compiler sees, never empty
    for n in range(low // BK, tl.maximum(tl.cdiv(end, BK), low // BK + 1)):
        slot = (row * tiles + n) % ring * H + head
        left, j = first + behind - n * BK, n * BK - behind
        if TMA:
            ds = pairs.load([slot * BK, left])
            k = unit_k.load([row, j + W, head * D]).reshape(BK, D)
        else:
            i = left + tl.arange(0, BQ)[None, :]
            at = tl.cast(slot, tl.int64) * (SPAN * BK) + tl.arange(0, BK)[:, None] * SPAN + i
            ds = tl.load(pairs + at, mask=(i >= 0) & (i < SPAN), other=0.0)
            k_at = unit_k + (wide_row * (T + W) + W + j) * (H * D) + head * D
            k = key_tile(k_at, j, T, H * D, W, D, BK, EVEN)
        acc = tl.dot(tl.trans(ds), k, acc, input_precision=PRECISION)
    # backward of the normalisation
    r = tl.arange(0, BQ)
    i = first + r
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


@triton.jit
def _sum_by_distance(
    to, pairs, bias_head, starts_row, lse_row, delta_row, first, T, BK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Write [128] sums by distance of stored dS of BK keys, and of dS of null keys of the queries in their places."""
    d = tl.arange(0, NEAR)[None, :]
    acc = tl.zeros([DISTANCE_ROWS, NEAR], tl.float32)
    for top in tl.static_range(0, BK, DISTANCE_ROWS):
        r = top + tl.arange(0, DISTANCE_ROWS)[:, None]
        i = first + r + d
        exists = (i >= 0) & (i < T) & (r + d < SPAN)  # the others are not written
        acc += tl.load(pairs + r * (SPAN + 1) + d, mask=exists, other=0.0).to(tl.float32)
    by_distance = tl.sum(acc, 0)
    if (first >= 0) & (first < T):
        first_start, last_start = tl.load(starts_row + first), tl.load(starts_row + min(first + BK, T) - 1)
        if (first - first_start < NEAR) | (last_start > first_start):
            by_distance = _null_gradient(by_distance, bias_head, starts_row, lse_row, delta_row, first, T, BK)
    tl.store(to + tl.arange(0, NEAR), by_distance)


@launched_directly
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
    n = tl.arange(0, FINISH_TILES)
    # first all that waits for memory: one program a head has nothing else to wait with
    raw = tl.load(scale + head).to(tl.float32)
    shares = tl.load(for_scale + n * H + head, mask=n < tiles, other=0.0)
    if HAS_TABLE:
        relative = near_bias(table, buckets, head, 1.0, d, W, HAS_TABLE)
        bucket = tl.load(buckets + d)
        last = tl.load(buckets + min(W, NEAR - 1))
        acc = tl.zeros([FINISH_PARTS, NEAR], tl.float32)
        for start in tl.range(0, parts, FINISH_PARTS, num_stages=FINISH_STAGES):
            m = (start + tl.arange(0, FINISH_PARTS)[:, None]).to(tl.int64)
            acc += tl.load(sums + (m * H + head) * NEAR + d[None, :], mask=m < parts, other=0.0)
        by_distance = tl.sum(acc, 0)
    for start in range(FINISH_TILES, tiles, FINISH_TILES):
        shares += tl.load(for_scale + (start + n) * H + head, mask=start + n < tiles, other=0.0)
    d_scale = tl.sum(shares)
    if HAS_TABLE:
        by_distance = tl.where((d >= 1) & (d <= W), by_distance, 0.0)
        d_scale += tl.sum(by_distance * relative)
        by_distance = tl.where(bucket == last, 0.0, by_distance)
        b = tl.arange(0, BUCKETS)
        value = tl.sum(tl.where(bucket[None, :] == b[:, None], by_distance[None, :], 0.0), 1)
        value = tl.where(b == last, -tl.sum(by_distance), value) * tl.abs(raw)
        tl.store(dtable + head * BUCKETS + b, value.to(dtable.dtype.element_ty))
    sign = tl.where(raw > 0, 1.0, tl.where(raw < 0, -1.0, 0.0))
    tl.store(dscale + head, (d_scale * sign).to(dscale.dtype.element_ty))


@triton.jit
def _key_gradient(
    dk, dv, k_tile, v_tile, right_j, of, drop_head, pairs, row, head, first_j, low, high, T, padded,
    H: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr,
    EVEN: tl.constexpr, HAS_DROP: tl.constexpr, TMA: tl.constexpr, IS_NEAR: tl.constexpr,
):  # fmt: skip
    """Add dS^T q to dk and P^T go to dv of BK keys over the queries low .. high-1 and store dS^T; all is transposed.

    Args:
        k_tile: normalised; right_j: [BK] last query that may see each key.
        of: q_of, go_of, lse_of, delta_of, near_of of `key_gradient_kernel`.
        row: as int32; padded: length of a row of lse and delta.
        IS_NEAR: queries may have a bias; others are further away than that from each key.
    """
    q_of, go_of, lse_of, delta_of, near_of = of
    r = tl.arange(0, BQ)
    cell = tl.arange(0, BK)[:, None] * SPAN + r[None, :]
    for first in range(low, high, BQ):
        i = first + r
        q = _token_piece(q_of, row, head, first, T, H, D, BQ, EVEN, TMA)
        go = _token_piece(go_of, row, head, first, T, H, D, BQ, EVEN, TMA)
        # both products before the exponent: the second runs while the first is worked on
        s = tl.dot(k_tile, tl.trans(q), input_precision=PRECISION)
        dp = tl.dot(v_tile, tl.trans(go), input_precision=PRECISION)
        s -= _number_piece(lse_of, row * H + head, first, padded, BQ, TMA)[None, :]
        if IS_NEAR:
            offset = tl.minimum(first - first_j, 2 * NEAR)
            if TMA:
                s += near_of.load([head * NEAR, offset]).to(tl.float32)
            else:
                s += near_tile(near_of + head * (NEAR * REACH), offset, BK, BQ)
        p = tl.exp2(tl.where(i[None, :] <= right_j[:, None], s, HIDDEN))
        seen = p
        if HAS_DROP:
            j = first_j + tl.arange(0, BK)
            keep = drop_tile(drop_head, i[None, :], j[:, None], W)
            seen = p * keep
            dp *= keep
        dv = tl.dot(seen.to(go.dtype), go, dv, input_precision=PRECISION)
        delta = _number_piece(delta_of, row * H + head, first, padded, BQ, TMA)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        # the division tells the compiler that rows may be written in wide pieces
        tl.store(pairs + (first - first_j) // BQ * BQ + cell, ds)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _query_range(next_row, first, T, W: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr):
    """[BK] last query that may see each of the keys from `first` on; (first query, end) of all: the first a multiple of
    BQ, and never empty, since an empty loop would make the compiler wait after each matrix instruction."""
    j = first + tl.arange(0, BK)
    # a query sees a key until its window has passed or another document has started
    right_j = tl.minimum(j + W, tl.load(next_row + tl.maximum(j, -1), mask=j < T, other=0) - 1)
    last_j = tl.minimum(first + BK, T) - 1
    high = tl.minimum(tl.minimum(last_j + W + 1, T), tl.load(next_row + tl.maximum(last_j, -1)))
    low = tl.maximum(first, 0)
    low -= low & (BQ - 1)
    return right_j, low, tl.maximum(high, low + 1)


@triton.jit
def _new_gradient(new, j, kept, T, H: tl.constexpr, W: tl.constexpr, D: tl.constexpr):
    """fp32 [BK, D] of the gradient `new` of the returned cache, at positions j; zeros where not kept there."""
    place = (j - (T - W))[:, None]
    at = new + place * (H * D) + tl.arange(0, D)[None, :]
    return tl.load(at, mask=kept & (place >= 0), other=0.0).to(tl.float32)


@triton.jit
def _fill_with_zeros(pairs, first, low, high, BQ: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr):
    """dS of keys from `first` on and queries low .. high-1 that see none of them."""
    zeros = tl.zeros([BK, BQ], pairs.dtype.element_ty)
    cell = tl.arange(0, BK)[:, None] * SPAN + tl.arange(0, BQ)[None, :]
    for i in range(low, high, BQ):
        tl.store(pairs + (i - first) // BQ * BQ + cell, zeros)


@launched_directly
@triton.jit(do_not_specialize=["T", "begin", "tiles", "ring"])
def key_gradient_kernel(
    qkv, unit_k, past, inv_k, starts, nexts, bias, drop, lse, delta, q_of, go_of, lse_of, delta_of, near_of,
    dnew_k, dnew_v, dqkv, dcached_k, dcached_v, pairs, sums,
    qkv_b: tl.int64,
    T, begin, tiles, ring,
    STEP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    SPAN: tl.constexpr, ROUND: tl.constexpr, EVEN: tl.constexpr, HAS_DROP: tl.constexpr, HAS_NEW: tl.constexpr,
    HAS_CACHE: tl.constexpr, HAS_TABLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradients of BK keys and values of one head; dS for the queries, and its sums by distance.

    Args:
        qkv .. lse: as in `attend_kernel`; inv_k, nexts, bias: of `prepare_kernel`; delta: of `delta_kernel`.
        q_of, go_of: unit_q of `attend_kernel` and the gradient of out as [B, T, H * D], pieces of [1, BQ, D]: rows are
            a dimension of their own, so that no piece reaches into the next one.
        lse_of, delta_of: lse and delta as [B * H, T rounded up], pieces of [1, BQ]; near_of: near_queries of
            `prepare_kernel` as [H * 128, 384], pieces of [BK, BQ].
        dnew_k, dnew_v: [B, W, H, D] gradients of the returned cache, if HAS_NEW.
        dqkv: [B, T, 3, H, D], parts 1 and 2 are written; dcached_k, dcached_v: [B, W, H, D], written if HAS_CACHE.
        pairs: [ring, H, BK, SPAN], written: dS of each tile of keys and the SPAN tokens from its first one on, those
            that exist; 0 where a query sees none of the tile's keys.
        sums: fp32 [B * tiles, H, 128], written if HAS_TABLE: dS by distance, null keys included.
        begin: the first tile of keys, counted over all rows; tile n lies in place n mod ring.
        tiles: tiles of BK keys in a row, those of the cache in front.
    """
    pid = tl.program_id(0)
    head = pid % H
    tile = begin + pid // H
    thin_row = tile // tiles
    row = thin_row.to(tl.int64)
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
    right_j, low, high = _query_range(nexts + row * (T + 1) + 1, first, T, W, BQ, BK)
    at = (row * H + head) * padded
    of = (q_of, go_of, lse_of, delta_of, near_of)
    drop_head = drop + head * (2 * W * W)
    dk = tl.zeros([BK, D], tl.float32)
    dv = tl.zeros([BK, D], tl.float32)
    # first the queries so near that they may have a bias
    middle = tl.minimum(high, tl.maximum(first + NEAR + BK, low + BQ))
    dk, dv = _key_gradient(
        dk, dv, k_tile, v_tile, right_j, of, drop_head, pairs, thin_row, head, first, low, middle, T,
        padded, H, W, D, BQ, BK, SPAN, EVEN, HAS_DROP, TMA, True,
    )  # fmt: skip
    middle = low + tl.cdiv(middle - low, BQ) * BQ
    dk, dv = _key_gradient(
        dk, dv, k_tile, v_tile, right_j, of, drop_head, pairs, thin_row, head, first, middle, high, T,
        padded, H, W, D, BQ, BK, SPAN, EVEN, HAS_DROP, TMA, False,
    )  # fmt: skip
    _fill_with_zeros(pairs, first, low + tl.cdiv(high - low, BQ) * BQ, tl.minimum(first + SPAN, padded), BQ, BK, SPAN)
    dk *= LN2
    if HAS_NEW:
        new = row * (W * H * D) + head * D
        kept = exists & (j >= tl.load(starts + row * T + T - 1))[:, None]
        dk += _new_gradient(dnew_k + new, j, kept, T, H, W, D)
        dv += _new_gradient(dnew_v + new, j, kept, T, H, W, D)
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
    if HAS_TABLE:
        tl.debug_barrier()  # dS of other threads
        to = sums + (tl.cast(tile, tl.int64) * H + head) * NEAR
        _sum_by_distance(to, pairs, bias + head * NEAR, starts + row * T, lse + at, delta + at, first, T, BK, SPAN)
