"""Triton kernels of the tokens' side: normalised keys with the cache in front, and the read of the states.

Letters: B rows, T tokens, W window, n blocks, S state vectors, H heads, DH width of a head. EVEN: tiles divide S and W,
and W divides T. Tensors of tokens have strides (b, t, DH, 1) if a kernel takes these two; heads of states are dense.
TMA, which needs EVEN: what a loop reads comes as descriptors, heads joined, and the copy engine fetches the tiles, keys
and values in pieces of [1, 1, BN, DH], queries and the gradient of the read in pieces of [1, BM, DH].

Loops go to the maximum of their end and 1: if they could be empty, as the compiler sees it, it would wait after each
matrix instruction.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from longspan.kernels.block_recurrent.triton_tiles import load_rows

# Logits are bounded, since queries and keys have norm 1: up to this spread in base 2 the softmax needs no maximum.
SPREAD = tl.constexpr(100.0)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
def _states(
    of, row, block, head, at, key_b, key_n, key_s, S,
    BN: tl.constexpr, DH: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[BN, DH] of one block and head of [B, n, S, H, DH], from state vector `at` on; zeros from S on."""
    if TMA:
        piece = of.load([row, block, at, head * DH]).reshape(BN, DH)
    else:
        start = row.to(tl.int64) * key_b + block.to(tl.int64) * key_n + head * DH
        piece = load_rows(of + start, at + tl.arange(0, BN), key_s, S, DH, EVEN)
    return piece


@triton.jit
def _tokens(
    of, row, first, head, at, stride_b, stride_t, length,
    BM: tl.constexpr, DH: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[BM, DH] of one head of [B, T, H, DH], from place `at` of the block that begins with token `first` on; zeros from
    place `length` on."""
    if TMA:
        piece = of.load([row, first + at, head * DH]).reshape(BM, DH)
    else:
        start = row.to(tl.int64) * stride_b + tl.cast(first, tl.int64) * stride_t + head * DH
        piece = load_rows(of + start, at + tl.arange(0, BM), stride_t, length, DH, EVEN)
    return piece


@triton.jit
def _read_logits(q, factor, k, at, S, BN: tl.constexpr, EVEN: tl.constexpr):
    """Logits in base 2 of a tile of queries and the keys from `at` on; hidden from S on."""
    logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * factor[:, None]
    if not EVEN:
        logits = tl.where((at + tl.arange(0, BN))[None, :] < S, logits, float("-inf"))
    return logits


@triton.jit(do_not_specialize=["T", "lse_b", "lse_h"])
def read_states_kernel(
    queries, scale, keys, values, out, lses, T, W, S,
    query_b, query_t, key_b, key_n, key_s, out_b, out_t, lse_b: tl.int64, lse_h: tl.int64,
    H: tl.constexpr, DH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out = softmax(l2norm(q) |s| . k) v for one tile of tokens of one block and head; lses [B, H, T]: base 2."""
    tiles = tl.cdiv(W, BM)
    block = tl.program_id(0) // tiles
    start = (tl.program_id(0) % tiles) * BM
    place = start + tl.arange(0, BM)
    head, row = tl.program_id(1), tl.program_id(2)
    batch = row.to(tl.int64)
    first = block * W
    length = tl.minimum(W, T - first)
    inside = place < length
    q = _tokens(queries, row, first, head, start, query_b, query_t, length, BM, DH, EVEN, False)
    wide = q.to(tl.float32)
    bound = tl.abs(tl.load(scale + head).to(tl.float32)) * LOG2E
    factor = tl.rsqrt(tl.sum(wide * wide, axis=1) + 1e-6) * bound
    top = tl.zeros([BM], tl.float32) + bound
    if 2 * bound > SPREAD:
        top = tl.full([BM], float("-inf"), tl.float32)
        for at in tl.range(0, S, BN, num_stages=1):
            k = _states(keys, row, block, head, at, key_b, key_n, key_s, S, BN, DH, EVEN, TMA)
            top = tl.maximum(top, tl.max(_read_logits(q, factor, k, at, S, BN, EVEN), axis=1))
    total = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, DH], tl.float32)
    for at in range(0, tl.maximum(S, 1), BN):
        k = _states(keys, row, block, head, at, key_b, key_n, key_s, S, BN, DH, EVEN, TMA)
        probability = tl.exp2(_read_logits(q, factor, k, at, S, BN, EVEN) - top[:, None])
        v = _states(values, row, block, head, at, key_b, key_n, key_s, S, BN, DH, EVEN, TMA)
        total += tl.sum(probability, axis=1)
        sums = tl.dot(probability.to(v.dtype), v, sums, input_precision="tf32x3")
    sums = sums / total[:, None]
    to = out + batch * out_b + tl.cast(first, tl.int64) * out_t + head * DH
    to += place[:, None] * out_t + tl.arange(0, DH)[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lses + batch * lse_b + head * lse_h + first + place, top + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=["T", "lse_b", "lse_h"])
def read_query_gradient_kernel(
    queries, scale, keys, values, out, lses, dout, dqueries, numbers, dscale, T, W, S,
    query_b, query_t, key_b, key_n, key_s, out_b, out_t, dout_b, dout_t, lse_b: tl.int64, lse_h: tl.int64,
    H: tl.constexpr, DH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dqueries (with the strides of out) of one tile through its normalisation; also what the keys need of each query.

    numbers: fp32 [B, H, 3, T]: the lse once more; what makes products of the query logits in base 2; row sum of
    dout * out.
    """
    tiles = tl.cdiv(W, BM)
    block = tl.program_id(0) // tiles
    start = (tl.program_id(0) % tiles) * BM
    place = start + tl.arange(0, BM)
    head, row = tl.program_id(1), tl.program_id(2)
    batch = row.to(tl.int64)
    first = block * W
    length = tl.minimum(W, T - first)
    inside = place < length
    q = _tokens(queries, row, first, head, start, query_b, query_t, length, BM, DH, EVEN, False)
    do = _tokens(dout, row, first, head, start, dout_b, dout_t, length, BM, DH, EVEN, False)
    o = _tokens(out, row, first, head, start, out_b, out_t, length, BM, DH, EVEN, False)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    wide = q.to(tl.float32)
    inv = tl.rsqrt(tl.sum(wide * wide, axis=1) + 1e-6)
    size = tl.abs(tl.load(scale + head).to(tl.float32))
    factor = inv * size * LOG2E
    lse = tl.load(lses + batch * lse_b + head * lse_h + first + place, mask=inside, other=float("inf"))
    numbers += (batch * H + head) * 3 * T + first + place
    tl.store(numbers, lse, mask=inside)
    tl.store(numbers + T, factor, mask=inside)
    tl.store(numbers + 2 * T, delta, mask=inside)
    grad = tl.zeros([BM, DH], tl.float32)
    for at in range(0, tl.maximum(S, 1), BN):
        k = _states(keys, row, block, head, at, key_b, key_n, key_s, S, BN, DH, EVEN, TMA)
        v = _states(values, row, block, head, at, key_b, key_n, key_s, S, BN, DH, EVEN, TMA)
        logits = _read_logits(q, factor, k, at, S, BN, EVEN)
        dprobability = tl.dot(do, tl.trans(v), input_precision="tf32x3")
        dlogits = tl.exp2(logits - lse[:, None]) * (dprobability - delta[:, None])
        grad = tl.dot(dlogits.to(k.dtype), k, grad, input_precision="tf32x3")
    # y = q inv |s|: ds = sum of dy . q inv, dq = |s| inv (dy - unit (unit . dy)); q is loaded once more: kept in
    # registers it would spill others
    again = _tokens(queries, row, first, head, start, query_b, query_t, length, BM, DH, EVEN, False)
    unit = again.to(tl.float32) * inv[:, None]
    along = tl.sum(grad * unit, axis=1)
    grad = (inv * size)[:, None] * (grad - unit * along[:, None])
    to = dqueries + batch * out_b + tl.cast(first, tl.int64) * out_t + head * DH
    to += place[:, None] * out_t + tl.arange(0, DH)[None, :]
    tl.store(to, grad.to(dqueries.dtype.element_ty), mask=inside[:, None])
    part = (batch * H + head) * tl.num_programs(0) + tl.program_id(0)
    tl.store(dscale + part, tl.sum(tl.where(inside, along, 0.0), axis=0))


@triton.jit(do_not_specialize=["T", "n"])
def read_key_gradient_kernel(
    queries, keys, values, dout, numbers, dkeys, dvalues, T, W, S, n,
    query_b, query_t, key_b, key_n, key_s, dout_b, dout_t,
    H: tl.constexpr, DH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dkeys, dvalues [B, n, S, H, DH] of one tile of state vectors of one block and head."""
    tiles = tl.cdiv(S, BN)
    block = tl.program_id(0) // tiles
    start = (tl.program_id(0) % tiles) * BN
    state = start + tl.arange(0, BN)
    head, row = tl.program_id(1), tl.program_id(2)
    batch = row.to(tl.int64)
    k = _states(keys, row, block, head, start, key_b, key_n, key_s, S, BN, DH, EVEN, False)
    v = _states(values, row, block, head, start, key_b, key_n, key_s, S, BN, DH, EVEN, False)
    first = block * W
    length = tl.minimum(W, T - first)
    numbers += (batch * H + head) * 3 * T + first
    dk = tl.zeros([BN, DH], tl.float32)
    dv = tl.zeros([BN, DH], tl.float32)
    for at in range(0, tl.maximum(length, 1), BM):
        place = at + tl.arange(0, BM)
        q = _tokens(queries, row, first, head, at, query_b, query_t, length, BM, DH, EVEN, TMA)
        do = _tokens(dout, row, first, head, at, dout_b, dout_t, length, BM, DH, EVEN, TMA)
        logits = tl.dot(k, tl.trans(q), input_precision="tf32x3")
        dprobability = tl.dot(v, tl.trans(do), input_precision="tf32x3")
        if EVEN:
            lse, factor = tl.load(numbers + place), tl.load(numbers + T + place)
            delta = tl.load(numbers + 2 * T + place)
        else:
            lse = tl.load(numbers + place, mask=place < length, other=float("inf"))
            factor = tl.load(numbers + T + place, mask=place < length, other=0.0)
            delta = tl.load(numbers + 2 * T + place, mask=place < length, other=0.0)
        probability = tl.exp2(logits * factor[None, :] - lse[None, :])
        dv = tl.dot(probability.to(do.dtype), do, dv, input_precision="tf32x3")
        dlogits = probability * (dprobability - delta[None, :]) * factor[None, :]
        dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision="tf32x3")
    to = ((batch * n + block) * S + state[:, None]) * (H * DH) + head * DH + tl.arange(0, DH)[None, :]
    inside = (state < S)[:, None]
    # the logits have the factor in base 2: back to natural ones
    tl.store(dkeys + to, (dk * LN2).to(dkeys.dtype.element_ty), mask=inside)
    tl.store(dvalues + to, dv.to(dvalues.dtype.element_ty), mask=inside)
