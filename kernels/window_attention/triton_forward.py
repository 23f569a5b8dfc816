"""Forward pass of fused window attention.

Letters: B rows, T tokens, W window, H heads, D width of a head; i queries, j keys, BQ x BK a tile of scores. Positions
count from the segment's first token; negative ones lie in the cache. Tiles of keys start on multiples of BK, so that a
tile lies in the cache or in the segment, never in both.

The bias is read as ready tiles, far ones are 0: to gather it by distance, or to branch around it, would send the scores
through shared memory or make the compiler wait after each matrix instruction. No loop may be empty, for the latter
reason too.
"""

# mypy: allow-untyped-defs
# arguments of kernels are pointers, numbers and constants of the compiler's own types

from __future__ import annotations

import triton
import triton.language as tl

from longspan.kernels.direct_launches import launched_directly
from longspan.kernels.window_attention.triton_prepare import CONSTS, HIDDEN, HUGE, NEAR, REACH

# Plain TF32 drops 13 bits of each number; of bf16 numbers a product is exact anyway.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def load_tile(at, count, STEP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """[ROWS, D] from address `at`, rows STEP apart; zeros from row `count` on, unless EVEN: no tile has such rows."""
    r = tl.arange(0, ROWS)[:, None]
    at += r * STEP + tl.arange(0, D)[None, :]
    if EVEN:  # noqa: SIM108 - a constant condition must be a statement
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=r < count, other=0.0)
    return tile


@triton.jit
def key_address(k_of, first, STEP: tl.constexpr, W: tl.constexpr):
    """Address of the key at position `first`; k_of = (address of the segment, address of the cache)."""
    inside = first >= 0
    at = tl.where(inside, first, first + W).to(tl.int64)
    return tl.where(inside, k_of[0], k_of[1]) + at * STEP


@triton.jit
def key_tile(at, first, T, STEP: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr):
    """[BK, D] keys (or values) at address `at`, whose positions start at `first`; zeros where there are none."""
    r = tl.arange(0, BK)[:, None]
    at += r * STEP + tl.arange(0, D)[None, :]
    if EVEN:  # noqa: SIM108 - a constant condition must be a statement
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(first + r >= -W) & (first + r < T), other=0.0)
    return tile


@triton.jit
def near_tile(near_head, offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of a table of the bias from column `offset` on, a multiple of 32; fp32."""
    at = near_head + offset // 32 * 32  # tells the compiler that rows may be read in wide pieces
    return tl.load(at + tl.arange(0, ROWS)[:, None] * REACH + tl.arange(0, COLUMNS)[None, :]).to(tl.float32)


@triton.jit
def drop_tile(drop_head, i, j, W: tl.constexpr):
    """Multipliers of the probabilities of queries i and keys j: rows i mod W, columns from the block before i's."""
    column = j - (i // W - 1) * W
    row = i % W
    return tl.load(drop_head + row * (2 * W) + column, mask=(column >= 0) & (column < 2 * W), other=0.0).to(tl.float32)


@triton.jit
def document_starts(starts_row, first, T, BQ: tl.constexpr):
    """Document start of each of BQ queries from `first`, and of the first of them."""
    i = first + tl.arange(0, BQ)
    return tl.load(starts_row + i, mask=i < T, other=0), tl.load(starts_row + first)


@triton.jit
def key_ranges(first, first_start, T, W: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr):
    """(first key, end) for a tile of queries: never empty, the first a multiple of BK."""
    low = tl.maximum(first - W, first_start)
    low -= low & (BK - 1)
    return low, tl.maximum(tl.minimum(first + BQ, T) - 1, low + 1)


@triton.jit
def scores(
    q, left_i, k_at, near_head, first, first_j, T,
    H: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    IS_NEAR: tl.constexpr,
):  # fmt: skip
    """Logits of BQ queries and BK keys, hidden where a query may not look.

    Args:
        q: normalised and scaled; left_i: [BQ] leftmost visible key.
        k_at: address of the key at position 0.
        IS_NEAR: keys may have a bias; others are further away than that from each query.
    """
    j = first_j + tl.arange(0, BK)
    k_tile = key_tile(k_at + tl.cast(first_j, tl.int64) * (H * D), first_j, T, H * D, W, D, BK, EVEN)
    s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
    if IS_NEAR:
        s += near_tile(near_head, tl.maximum(first_j - first + 2 * NEAR, 0), BQ, BK)
    return tl.where(j[None, :] >= left_i[:, None], s, HIDDEN)


@triton.jit
def _highest(
    q, top, left_i, k_at, near_head, first, low, high, T,
    H: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Highest logit of each query among `top` and the keys low .. high-1."""
    for first_j in tl.range(low, high, BK, num_stages=1):
        s = scores(q, left_i, k_at, near_head, first, first_j, T, H, W, D, BQ, BK, EVEN, True)
        top = tl.maximum(top, tl.max(s, 1))
    return top


@triton.jit
def _attend(
    q, acc, total, top, left_i, k_at, v_of, heads, first, low, high, T,
    STEP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, HAS_DROP: tl.constexpr, IS_NEAR: tl.constexpr,
):  # fmt: skip
    """Add exp2(logits - top) v to acc and exp2(logits - top) to total, over the keys low .. high-1."""
    near_head, drop_head = heads
    for first_j in range(low, high, BK):
        s = scores(q, left_i, k_at, near_head, first, first_j, T, H, W, D, BQ, BK, EVEN, IS_NEAR)
        p = tl.exp2(s - top[:, None])
        total += tl.sum(p, 1)
        if HAS_DROP:
            j = first_j + tl.arange(0, BK)
            p *= drop_tile(drop_head, first + tl.arange(0, BQ)[:, None], j[None, :], W)
        v_tile = key_tile(key_address(v_of, first_j, STEP, W), first_j, T, STEP, W, D, BK, EVEN)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, total


@launched_directly
@triton.jit(do_not_specialize=["T"])
def attend_kernel(
    qkv, unit_k, past, starts, near_keys, nulls, consts, drop, out, lse, unit_q, inv_q,
    qkv_b: tl.int64,
    T,
    STEP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, ROUND: tl.constexpr, EVEN: tl.constexpr, HAS_DROP: tl.constexpr,
):  # fmt: skip
    """Output of BQ queries of one head.

    Args:
        qkv: [B, T, 3, H, D] as projected, with strides (qkv_b, STEP, H * D, D, 1).
        unit_k, past, starts, near_keys, nulls, consts: of `prepare_kernel`; ROUND: its BT.
        drop: [H, W, 2W] if HAS_DROP.
        out: [B, T, H, D]; lse, inv_q: fp32 [B, H, T rounded up to ROUND], log2 sum exp2 of the logits, what
            normalises queries; beyond T so chosen that such queries count for nothing.
        unit_q: [B, T, H, D], queries, normalised and scaled: their products with keys are logits.
        EVEN: BQ and BK divide T and W.
    """
    tiles = tl.cdiv(T, BQ)
    pid = tl.program_id(0)
    head = pid % H
    row = (pid // (H * tiles)).to(tl.int64)
    first = (pid // H) % tiles * BQ
    i = first + tl.arange(0, BQ)
    inside = i < T
    padded = tl.cdiv(T, ROUND) * ROUND

    q_at = qkv + row * qkv_b + head * D
    wide = load_tile(q_at + first.to(tl.int64) * STEP, T - first, STEP, D, BQ, EVEN).to(tl.float32)
    inv = tl.rsqrt(tl.sum(wide * wide, 1) + 1e-6)
    tl.store(inv_q + (row * H + head) * padded + i, tl.where(inside, inv, 0.0))
    unit = wide * (inv * tl.load(consts + head * CONSTS))[:, None]
    q_tile = unit.to(unit_q.dtype.element_ty)
    place = (row * T + first) * (H * D) + head * D
    place += tl.arange(0, BQ)[:, None] * (H * D) + tl.arange(0, D)[None, :]
    tl.store(unit_q + place, q_tile, mask=inside[:, None])
    # read again: what is loaded goes to shared memory, what is computed would stay in registers all along
    tl.debug_barrier()
    q_tile = tl.load(unit_q + place, mask=inside[:, None], other=0.0)

    # null keys are never loaded: they are where the softmax starts from
    start, first_start = document_starts(starts + row * T, first, T, BQ)
    null = tl.load(nulls + head * (W + 2) + tl.minimum(i - start + 1, W + 1), mask=inside, other=0.0)
    left_i = tl.maximum(start, i - W)
    low, high = key_ranges(first, first_start, T, W, BQ, BK)
    k_at = unit_k + (row * (T + W) + W) * (H * D) + head * D
    v_of = (q_at + 2 * H * D, past + row * (W * STEP) + head * D)
    near_head = near_keys + head * (NEAR * REACH)
    heads = (near_head, drop + head * (2 * W * W))

    # logits whose bound lies close enough need no maximum: nothing overflows, nothing that counts underflows
    top = tl.zeros([BQ], tl.float32) + tl.load(consts + head * CONSTS + 1)
    if tl.load(consts + head * CONSTS + 2) != 0.0:
        top = _highest(q_tile, null, left_i, k_at, near_head, first, low, high, T, H, W, D, BQ, BK, EVEN)
    total = tl.exp2(null - top)
    acc = tl.zeros([BQ, D], tl.float32)
    if W >= NEAR + BK:  # first the keys too far away for a bias, hidden ones rather than none
        middle = tl.maximum(first - NEAR, low)
        acc, total = _attend(
            q_tile, acc, total, top, left_i, k_at, v_of, heads, first, tl.minimum(low, middle - BK), middle, T,
            STEP, H, W, D, BQ, BK, EVEN, HAS_DROP, False,
        )  # fmt: skip
        low = middle
    acc, total = _attend(
        q_tile, acc, total, top, left_i, k_at, v_of, heads, first, low, high, T,
        STEP, H, W, D, BQ, BK, EVEN, HAS_DROP, True,
    )  # fmt: skip
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + (row * H + head) * padded + i, tl.where(inside, top + tl.log2(total), HUGE))
