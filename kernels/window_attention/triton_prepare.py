"""What all passes of fused window attention need: bias tables, norms of keys, document starts, and the new cache.

Letters: B rows, T tokens, W window, H heads, D width of a head. All logits are in base 2 (times log2 e), and relative
to the bias of distance W: a constant per head changes no softmax, and all distances from 128 on share that bias, so
that only tiles near the diagonal need any bias at all.
"""

# mypy: allow-untyped-defs
# arguments of kernels are pointers, numbers and constants of the compiler's own types

from __future__ import annotations

import triton
import triton.language as tl

from longspan.kernels.direct_launches import launched_directly
from longspan.kernels.window_attention.reference import MAX_DISTANCE, NUM_BUCKETS

NEAR = tl.constexpr(MAX_DISTANCE)  # from this distance on the bias is constant
BUCKETS = tl.constexpr(NUM_BUCKETS)
# Columns of a ready table of the bias: a tile of at most 128 tokens, 128 more that are near it, and 128 of no bias.
REACH_INT = 3 * MAX_DISTANCE
REACH = tl.constexpr(REACH_INT)
COLUMNS = tl.constexpr(4 * MAX_DISTANCE)  # the next power of two
HIDDEN = tl.constexpr(-60000.0)  # logit of a key that a query may not see; an fp16 number
HUGE = tl.constexpr(1e30)  # log-sum-exp of a query that does not exist: all its probabilities are 0
NEVER = tl.constexpr(1 << 30)  # a position that no token has
LOG2E = tl.constexpr(1.4426950408889634)
# Logits are bounded, since queries and keys have norm 1: up to this spread the softmax needs no maximum.
SPREAD = tl.constexpr(100.0)
CONSTS = tl.constexpr(4)  # a head's: |scale| log2 e; upper bound of its logits; 1 if they spread too far; unused
TABLE_ROWS = tl.constexpr(4)  # rows of the tables that one program writes
TABLE_PARTS_INT = MAX_DISTANCE // 4
TABLE_PARTS = tl.constexpr(TABLE_PARTS_INT)  # programs that write the tables of a head
CHUNK = tl.constexpr(512)  # reset flags that are searched at once


@triton.jit
def near_bias(table, buckets, head, factor, d, W: tl.constexpr, HAS_TABLE: tl.constexpr):
    """Bias of distances d < 128 relative to distance W, times `factor`; fp32 like d."""
    if HAS_TABLE:
        last = tl.load(buckets + min(W, NEAR - 1))
        bucket = tl.load(buckets + tl.minimum(tl.maximum(d, 0), NEAR - 1))
        bias = tl.load(table + head * BUCKETS + bucket).to(tl.float32)
        relative = (bias - tl.load(table + head * BUCKETS + last).to(tl.float32)) * factor
    else:
        relative = d.to(tl.float32) * 0.0
    return relative


@triton.jit
def _write_tables(
    table, scale, buckets, bias, near_keys, near_queries, nulls, consts, head, part,
    W: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    factor = tl.abs(tl.load(scale + head).to(tl.float32)) * LOG2E
    d = tl.arange(0, NEAR)
    near = near_bias(table, buckets, head, factor, d, W, HAS_TABLE)
    exists = (d >= 1) & (d <= W)
    if part == 0:
        upper = factor + tl.maximum(tl.max(tl.where(exists, near, 0.0)), 0.0)
        lower = tl.minimum(tl.min(tl.where(exists, near, 0.0)), 0.0) - factor
        tl.store(consts + head * CONSTS, factor)
        tl.store(consts + head * CONSTS + 1, upper)
        tl.store(consts + head * CONSTS + 2, tl.where(upper - lower <= SPREAD, 0.0, 1.0))
        tl.store(bias + head * NEAR + d, tl.where(exists, near, HIDDEN))
        for start in range(NEAR, W + 2, NEAR):
            t = start + tl.arange(0, NEAR)
            left = tl.maximum(W - t + 1, 0).to(tl.float32)
            tl.store(nulls + head * (W + 2) + t, tl.where(left > 0, tl.log2(left), HIDDEN), mask=t < W + 2)

    # log2 sum exp2 over the null keys at distances t .. W
    t = part * TABLE_ROWS + tl.arange(0, TABLE_ROWS)
    seen = (d[None, :] >= t[:, None]) & exists[None, :]
    far = W - NEAR + 1 if W >= NEAR else 0
    top = tl.max(tl.where(seen, near[None, :], HIDDEN), 1)
    if far > 0:
        top = tl.maximum(top, 0.0)
    top = tl.where(top == HIDDEN, 0.0, top)
    total = tl.sum(tl.where(seen, tl.exp2(near[None, :] - top[:, None]), 0.0), 1) + far * tl.exp2(-top)
    tl.store(nulls + head * (W + 2) + t, tl.where(total > 0, top + tl.log2(total), HIDDEN), mask=t <= W + 1)

    # the bias as tiles need it: [query r, key x - 256] and [key r, query x], counted from a tile's first token
    r = t[:, None]
    x = tl.arange(0, COLUMNS)[None, :]
    at = (head * NEAR + r) * REACH + x
    d = r + 2 * NEAR - x
    value = tl.where(d < NEAR, near_bias(table, buckets, head, factor, d, W, HAS_TABLE), 0.0)
    tl.store(near_keys + at, tl.where(d > 0, value, HIDDEN).to(near_keys.dtype.element_ty), mask=x < REACH)
    d = x - r
    value = tl.where(d < NEAR, near_bias(table, buckets, head, factor, d, W, HAS_TABLE), 0.0)
    tl.store(near_queries + at, tl.where(d > 0, value, HIDDEN).to(near_queries.dtype.element_ty), mask=x < REACH)


@triton.jit
def _latest(reset_row, low, high, T):
    """Position of the last flag from low to high - 1, or -NEVER."""
    found = tl.full([CHUNK], -NEVER, tl.int32)
    for start in range(low, high, CHUNK):
        q = start + tl.arange(0, CHUNK)
        flag = tl.load(reset_row + q, mask=(q >= 0) & (q < tl.minimum(high, T)), other=0) != 0
        found = tl.maximum(found, tl.where(flag, q, -NEVER))
    return tl.max(found)


@triton.jit
def _earliest(reset_row, low, high, T):
    """Position of the first flag from low to high - 1, or NEVER."""
    found = tl.full([CHUNK], NEVER, tl.int32)
    for start in range(low, high, CHUNK):
        q = start + tl.arange(0, CHUNK)
        flag = tl.load(reset_row + q, mask=(q >= 0) & (q < tl.minimum(high, T)), other=0) != 0
        found = tl.minimum(found, tl.where(flag, q, NEVER))
    return tl.min(found)


@triton.jit
def _write_starts(reset_row, starts_row, nexts_row, first, T, W: tl.constexpr, BT: tl.constexpr):
    """starts[p] = last document start at or before p, nexts[p + 1] = first one after p, looking W tokens far."""
    p = first + tl.arange(0, BT)
    inside = p < T
    flag = tl.load(reset_row + p, mask=inside, other=0) != 0
    position = tl.where(flag, p, -NEVER)
    own = tl.max(tl.where(p[None, :] <= p[:, None], position[None, :], -NEVER), 1)
    start = tl.maximum(own, _latest(reset_row, first - W, first, T))
    tl.store(starts_row + p, start, mask=inside)
    position = tl.where(flag, p, NEVER)
    own = tl.min(tl.where(p[None, :] > p[:, None], position[None, :], NEVER), 1)
    after = tl.minimum(own, _earliest(reset_row, first + BT, first + BT + W, T))
    tl.store(nexts_row + p + 1, after, mask=inside)
    if first == 0:
        fresh = tl.load(reset_row) != 0
        tl.store(nexts_row, tl.where(fresh, 0, tl.min(tl.where(p == 0, after, NEVER))))


@triton.jit
def _write_cache(
    x, y, new_k, new_v, reset_row, p, T,
    H: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The part of the next cache that lies in positions p; x, y: their keys, normalised, and their values."""
    # what lies before the last document start is of no use any more
    alive = (p >= _latest(reset_row, tl.maximum(T - W, 0), T, T))[:, None]
    place = p - (T - W)
    target = place[:, None] * (H * D) + tl.arange(0, D)[None, :]
    mask = ((place >= 0) & (p < T))[:, None]
    tl.store(new_k + target, tl.where(alive, x, 0.0).to(new_k.dtype.element_ty), mask=mask)
    tl.store(new_v + target, tl.where(alive, y, 0.0).to(new_v.dtype.element_ty), mask=mask)


@launched_directly
@triton.jit(do_not_specialize=["T"])
def prepare_kernel(
    k, v, turned_k, cached_k, cached_v, turned_cache, reset, table, scale, buckets, bias, near_keys, near_queries,
    nulls, consts, unit_k, inv_k, starts, nexts, new_k, new_v, past,
    kv_b: tl.int64, turned_b: tl.int64, ck_b: tl.int64, ck_t, cv_b: tl.int64, cv_t,
    T,
    KV_STEP: tl.constexpr, STEP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BT: tl.constexpr,
    ROUND: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """The first 32 H programs write the tables of the heads; each further one looks at BT tokens of one head, the last
    tokens first: the projection wrote them last, so they still lie in the cache.

    Args:
        k, v: [B, T, H, D] with strides (kv_b, KV_STEP, D, 1); turned_k: k rotated, with strides (turned_b, STEP, D, 1);
            cached_k, cached_v: [B, W, H, D] with strides (b, t, D, 1); turned_cache: as cached_k, rotated.
        reset: uint8 [B, T]; table: [H, 32]; scale: [H]; buckets: int32 [128] of distances.
        bias: fp32 [H, 128] by distance; near_keys, near_queries: [H, 128, 384], the same bias as tiles need it:
            [query, key + 256] and [key, query]; nulls: fp32 [H, W + 2], log2 sum exp2 of the bias from a distance
            on; consts: fp32 [H, 4].
        unit_k: [B, W + T, H, D], written: keys of the cache and of the segment, normalised.
        inv_k: fp32 [B, H, W + T, both rounded up to ROUND], 1 / sqrt(sum k^2 + 1e-6), 1 in the cache.
        starts: int32 [B, T], document start of each token; nexts: int32 [B, T + 1], the first one after each token,
            the cache's last token in front. Both see W tokens far.
        new_k, new_v: [B, W, H, D], the next cache.
        past: [B, W, STEP], the old cache's values laid out like those of a segment.
    """
    pid = tl.program_id(0)
    head = pid % H
    behind = tl.cdiv(W, ROUND) * ROUND // BT
    tiles = behind + tl.cdiv(T, ROUND) * ROUND // BT
    if pid < H * TABLE_PARTS:
        _write_tables(table, scale, buckets, bias, near_keys, near_queries, nulls, consts, head, pid // H, W, HAS_TABLE)
    else:
        tile = tl.num_programs(0) // H - 1 - pid // H
        row = (tile // tiles).to(tl.int64)
        first = (tile % tiles - behind) * BT  # tokens of the cache have negative positions
        p = first + tl.arange(0, BT)
        c = head * D + tl.arange(0, D)[None, :]
        reset_row = reset + row * T
        inv_at = inv_k + ((row * H + head) * tiles + tile % tiles) * BT + tl.arange(0, BT)
        new = row * (W * H * D) + head * D
        if first < 0:
            exists = (p >= -W)[:, None]
            old_k = row * ck_b + (p + W)[:, None] * ck_t + c
            old_v = tl.load(cached_v + row * cv_b + (p + W)[:, None] * cv_t + c, mask=exists, other=0.0)
            tl.store(past + row * (W * STEP) + (p + W)[:, None] * STEP + c, old_v, mask=exists)
            to = unit_k + (row * (T + W) + p + W)[:, None] * (H * D) + c
            tl.store(to, tl.load(turned_cache + old_k, mask=exists, other=0.0), mask=exists)
            tl.store(inv_at, tl.zeros([BT], tl.float32) + 1.0)
            if first + BT > T - W:
                kept = tl.load(cached_k + old_k, mask=exists, other=0.0).to(tl.float32)
                _write_cache(kept, old_v, new_k + new, new_v + new, reset_row, p, T, H, W, D)
        else:
            inside = (p < T)[:, None]
            at = row * kv_b + p.to(tl.int64)[:, None] * KV_STEP + c
            x = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
            inv = tl.rsqrt(tl.sum(x * x, 1) + 1e-6)
            tl.store(inv_at, inv)
            y = x
            if not HAS_TABLE:
                from_turned = turned_k + row * turned_b + p.to(tl.int64)[:, None] * STEP + c
                y = tl.load(from_turned, mask=inside, other=0.0).to(tl.float32)
            to = unit_k + (row * (T + W) + p + W)[:, None] * (H * D) + c
            tl.store(to, (y * inv[:, None]).to(unit_k.dtype.element_ty), mask=inside)
            if (head == 0) & (first < T):
                _write_starts(reset_row, starts + row * T, nexts + row * (T + 1), first, T, W, BT)
            if first + BT > T - W:
                values = tl.load(v + at, mask=inside, other=0.0)
                _write_cache(x * inv[:, None], values, new_k + new, new_v + new, reset_row, p, T, H, W, D)


@launched_directly
@triton.jit(do_not_specialize=["T", "first"])
def rotate_kernel(
    source, target, coarse, fine,
    source_b: tl.int64, source_t, target_b: tl.int64, target_t,
    T, first,
    SIGN: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr, HALF: tl.constexpr, FINE: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """target[b, t, part, h] = source[b, t, part, h] rotated by SIGN * (first + t); source and target may be one.

    Args:
        source, target: [B, T, >= PARTS, H, 2 * HALF], heads and parts contiguous.
        coarse, fine: fp32 [any, 2, HALF] and [FINE, 2, HALF]: cosine and sine of the angles of positions n * FINE
            and n; their product keeps long segments exact without a table of all positions.
    """
    tiles = tl.cdiv(T, BT)
    pid = tl.program_id(0)
    head = pid % (H * PARTS)
    row = (pid // (H * PARTS * tiles)).to(tl.int64)
    start = (pid // (H * PARTS)) % tiles * BT
    r = tl.arange(0, BT)
    c = tl.arange(0, HALF)[None, :]
    place = first + start + r
    high = coarse + (place // FINE)[:, None] * (2 * HALF) + c
    low = fine + (place % FINE)[:, None] * (2 * HALF) + c
    cos_a, sin_a, cos_b, sin_b = tl.load(high), tl.load(high + HALF), tl.load(low), tl.load(low + HALF)
    cos = cos_a * cos_b - sin_a * sin_b
    sin = (sin_a * cos_b + cos_a * sin_b) * SIGN
    mask = (start + r < T)[:, None]
    at = source + row * source_b + start.to(tl.int64) * source_t + head * (2 * HALF) + r[:, None] * source_t + c
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    to = target + row * target_b + start.to(tl.int64) * target_t + head * (2 * HALF) + r[:, None] * target_t + c
    tl.store(to, (x * cos - y * sin).to(target.dtype.element_ty), mask=mask)
    tl.store(to + HALF, (y * cos + x * sin).to(target.dtype.element_ty), mask=mask)
