"""Triton kernels of the tokens' side: normalised keys with the cache in front, and the read of the states.

Letters: B rows, T tokens, W window, n blocks, S state vectors, H heads, DH width of a head. EVEN: tiles divide S and W,
and W divides T. Tensors of tokens have strides (b, t, DH, 1) if a kernel takes these two.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from longspan.kernels.block_recurrent.triton_tiles import key_gradient, load_rows, query_gradient

# Logits are bounded, since queries and keys have norm 1: up to this spread in base 2 the softmax needs no maximum.
SPREAD = tl.constexpr(100.0)


@triton.jit(do_not_specialize=["first", "count"])
def token_keys_kernel(
    qkv, cached_keys, cached_values, keys, values, inv, first, count, W, qkv_b, qkv_t,
    H: tl.constexpr, DH: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Rows first..first+count-1 of the keys, normalised, and values, counted from the first of the W cached ones.

    keys, values: [B, count, H, DH]; inv: fp32 [B, count, H], what normalises a key, 1 in the cache.
    """
    place = tl.program_id(0) * R + tl.arange(0, R)
    row = first + place
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    column = tl.arange(0, DH)[None, :]
    used = place < count
    cached = (row < W) & used
    inside = (row >= W) & used
    new = batch * qkv_b + (row - W).to(tl.int64)[:, None] * qkv_t + head * DH + column
    out = batch * count + place
    k = tl.load(qkv + new + H * DH, mask=inside[:, None], other=0.0).to(tl.float32)
    v = tl.load(qkv + new + 2 * H * DH, mask=inside[:, None], other=0.0)
    size = tl.rsqrt(tl.sum(k * k, axis=1) + 1e-6)
    k *= size[:, None]
    if first + tl.program_id(0) * R < W:
        old = (batch * W + row)[:, None] * (H * DH) + head * DH + column
        k = tl.where(cached[:, None], tl.load(cached_keys + old, mask=cached[:, None], other=0.0).to(tl.float32), k)
        v = tl.where(cached[:, None], tl.load(cached_values + old, mask=cached[:, None], other=0.0), v)
    to = out[:, None] * (H * DH) + head * DH + column
    tl.store(keys + to, k.to(keys.dtype.element_ty), mask=used[:, None])
    tl.store(values + to, v, mask=used[:, None])
    tl.store(inv + out * H + head, tl.where(cached, 1.0, size), mask=used)


@triton.jit
def _read_logits(q, factor, keys, row, key_s, S, DH: tl.constexpr, EVEN: tl.constexpr):
    """Logits in base 2 of a tile of queries and the keys `row`; hidden from S on."""
    k = load_rows(keys, row, key_s, S, DH, EVEN)
    logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * factor[:, None]
    if not EVEN:
        logits = tl.where(row[None, :] < S, logits, float("-inf"))
    return logits


@triton.jit(do_not_specialize=["T", "lse_b", "lse_h"])
def read_states_kernel(
    queries, scale, keys, values, out, lses, T, W, S,
    query_b, query_t, key_b, key_n, key_s, key_h, out_b, out_t, lse_b: tl.int64, lse_h: tl.int64,
    H: tl.constexpr, DH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out = softmax(l2norm(q) |s| . k) v for one tile of tokens of one block and head; lses [B, H, T]: base 2."""
    tiles = tl.cdiv(W, BM)
    block = tl.program_id(0) // tiles
    place = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.minimum(W, T - block * W)
    inside = place < length
    first = (block * W).to(tl.int64)
    q = load_rows(queries + batch * query_b + first * query_t + head * DH, place, query_t, length, DH, EVEN)
    wide = q.to(tl.float32)
    bound = tl.abs(tl.load(scale + head).to(tl.float32)) * 1.4426950408889634
    factor = tl.rsqrt(tl.sum(wide * wide, axis=1) + 1e-6) * bound
    offset = batch * key_b + block.to(tl.int64) * key_n + head * key_h
    top = tl.zeros([BM], tl.float32) + bound
    if 2 * bound > SPREAD:
        top = tl.full([BM], float("-inf"), tl.float32)
        for at in tl.range(0, S, BN, num_stages=1):
            row = at + tl.arange(0, BN)
            top = tl.maximum(top, tl.max(_read_logits(q, factor, keys + offset, row, key_s, S, DH, EVEN), axis=1))
    total = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, DH], tl.float32)
    for at in range(0, S, BN):
        row = at + tl.arange(0, BN)
        probability = tl.exp2(_read_logits(q, factor, keys + offset, row, key_s, S, DH, EVEN) - top[:, None])
        v = load_rows(values + offset, row, key_s, S, DH, EVEN)
        total += tl.sum(probability, axis=1)
        sums = tl.dot(probability.to(v.dtype), v, sums, input_precision="tf32x3")
    sums = sums / total[:, None]
    to = out + batch * out_b + first * out_t + head * DH
    to += place[:, None] * out_t + tl.arange(0, DH)[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lses + batch * lse_b + head * lse_h + first + place, top + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=["T", "lse_b", "lse_h"])
def read_query_gradient_kernel(
    queries, scale, keys, values, out, lses, dout, dqueries, factors, deltas, dscale, T, W, S,
    query_b, query_t, key_b, key_n, key_s, key_h, out_b, out_t, dout_b, dout_t, lse_b: tl.int64, lse_h: tl.int64,
    H: tl.constexpr, DH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dqueries (with the strides of out) of one tile through its normalisation; also what the keys need: factors and
    deltas, fp32 [B, H, T]."""
    tiles = tl.cdiv(W, BM)
    block = tl.program_id(0) // tiles
    row = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.minimum(W, T - block * W)
    inside = row < length
    first = (block * W).to(tl.int64)
    base = batch * out_b + first * out_t + head * DH
    q = load_rows(queries + batch * query_b + first * query_t + head * DH, row, query_t, length, DH, EVEN)
    do = load_rows(dout + batch * dout_b + first * dout_t + head * DH, row, dout_t, length, DH, EVEN)
    o = load_rows(out + base, row, out_t, length, DH, EVEN)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    wide = q.to(tl.float32)
    inv = tl.rsqrt(tl.sum(wide * wide, axis=1) + 1e-6)
    size = tl.abs(tl.load(scale + head).to(tl.float32))
    factor = inv * size * 1.4426950408889634
    lse = tl.load(lses + batch * lse_b + head * lse_h + first + row, mask=inside, other=float("inf"))
    small = (batch * H + head) * T + first + row
    tl.store(factors + small, factor, mask=inside)
    tl.store(deltas + small, delta, mask=inside)
    offset = batch * key_b + block.to(tl.int64) * key_n + head * key_h
    grad = query_gradient(q, do, factor, lse, delta, keys + offset, values + offset, key_s, key_s, 0, S, BN, DH, EVEN)
    # y = q inv |s|: ds = sum of dy . q inv, dq = |s| inv (dy - unit (unit . dy))
    unit = q.to(tl.float32) * inv[:, None]
    along = tl.sum(grad * unit, axis=1)
    grad = (inv * size)[:, None] * (grad - unit * along[:, None])
    to = dqueries + base + (row[:, None] * out_t + tl.arange(0, DH)[None, :])
    tl.store(to, grad.to(dqueries.dtype.element_ty), mask=inside[:, None])
    part = (batch * H + head) * tl.num_programs(0) + tl.program_id(0)
    tl.store(dscale + part, tl.sum(tl.where(inside, along, 0.0), axis=0))


@triton.jit(do_not_specialize=["T", "n", "lse_b", "lse_h"])
def read_key_gradient_kernel(
    queries, keys, values, lses, dout, factors, deltas, dkeys, dvalues, T, W, S, n,
    query_b, query_t, key_b, key_n, key_s, key_h, dout_b, dout_t, lse_b: tl.int64, lse_h: tl.int64,
    H: tl.constexpr, DH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dkeys, dvalues [B, n, S, H, DH] of one tile of state vectors of one block and head."""
    tiles = tl.cdiv(S, BN)
    block = tl.program_id(0) // tiles
    row = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offset = batch * key_b + block.to(tl.int64) * key_n + head * key_h
    k = load_rows(keys + offset, row, key_s, S, DH, EVEN)
    v = load_rows(values + offset, row, key_s, S, DH, EVEN)
    first = (block * W).to(tl.int64)
    small = (batch * H + head) * T + first
    dk = tl.zeros([BN, DH], tl.float32)
    dv = tl.zeros([BN, DH], tl.float32)
    dk, dv = key_gradient(
        dk, dv, k, v, queries + batch * query_b + first * query_t + head * DH,
        dout + batch * dout_b + first * dout_t + head * DH, factors + small,
        lses + batch * lse_b + head * lse_h + first, deltas + small,
        query_t, dout_t, tl.minimum(W, T - block * W), BM, DH, True, EVEN,
    )  # fmt: skip
    place = ((batch * n + block) * S + row[:, None]) * (H * DH) + head * DH + tl.arange(0, DH)[None, :]
    inside = (row < S)[:, None]
    # the logits have the factor in base 2: back to natural ones
    tl.store(dkeys + place, (dk * 0.6931471805599453).to(dkeys.dtype.element_ty), mask=inside)
    tl.store(dvalues + place, dv.to(dvalues.dtype.element_ty), mask=inside)
