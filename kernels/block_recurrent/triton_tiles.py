"""Tile functions of attention's backward that several kernels of the Block-Recurrent layer share.

A tile of queries holds BM rows, a tile of keys BN; Dh is the width of a head. Logits are q . k times a factor per
query row (its normalisation and scale in base 2), `lse` is the base-2 log of the sum of exponentials, and `delta`
the row sum of dout * out. Nothing is accumulated with atomics, so results repeat bit by bit. Products of fp32 operands
take three TF32 products each: one alone cuts operands to ten bits.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(base, row, stride, rows, DH: tl.constexpr, EVEN: tl.constexpr):
    """[len(row), DH] of rows `row` with the given stride; zero from row `rows` on, unless EVEN says that
    there is none. Offsets must fit 32 bits."""
    column = tl.arange(0, DH)
    pointers = base + (row[:, None] * stride + column[None, :])
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=row[:, None] < rows, other=0.0)


@triton.jit
def query_gradient(
    q, dout, factor, lse, delta, keys, values, key_stride, value_stride, begin, end,
    BN: tl.constexpr, DH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Sum over keys begin..end-1 of ds k, fp32 [BM, DH], in front of `factor`, which the caller applies.

    Args:
        q, dout: [BM, DH].
        factor, lse, delta: fp32 [BM]; factor includes log2(e).
        keys, values: pointers to row 0; strides in elements.
        EVEN: the range is a multiple of BN.
    """
    grad = tl.zeros([q.shape[0], DH], tl.float32)
    for at in range(begin, end, BN):
        row = at + tl.arange(0, BN)
        k = load_rows(keys, row, key_stride, end, DH, EVEN)
        v = load_rows(values, row, value_stride, end, DH, EVEN)
        logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * factor[:, None] - lse[:, None]
        probability = tl.exp2(logits)
        if not EVEN:
            probability = tl.where(row[None, :] < end, probability, 0.0)
        dlogits = probability * (tl.dot(dout, tl.trans(v), input_precision="tf32x3") - delta[:, None])
        grad = tl.dot(dlogits.to(k.dtype), k, grad, input_precision="tf32x3")
    return grad


@triton.jit
def key_gradient(
    dkey,
    dvalue,
    k,
    v,
    queries,
    douts,
    lses,
    deltas,
    query_stride,
    dout_stride,
    end,
    BM: tl.constexpr,
    DH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Add what queries 0..end-1 give to dkey and dvalue, fp32 [BN, DH]; the transposed product.

    Args:
        dkey, dvalue: sums so far.
        k, v: [BN, DH].
        queries, douts: pointers to row 0; strides in elements.
        lses, deltas: pointers, dense fp32.
        EVEN: the range is a multiple of BM.
    """
    for at in range(0, end, BM):
        row = at + tl.arange(0, BM)
        inside = row < end
        q = load_rows(queries, row, query_stride, end, DH, EVEN)
        dout = load_rows(douts, row, dout_stride, end, DH, EVEN)
        if EVEN:
            lse, delta = tl.load(lses + row), tl.load(deltas + row)
        else:
            lse = tl.load(lses + row, mask=inside, other=float("inf"))
            delta = tl.load(deltas + row, mask=inside, other=0.0)
        logits = tl.dot(k, tl.trans(q), input_precision="tf32x3") * 1.4426950408889634
        probability = tl.exp2(logits - lse[None, :])
        dvalue = tl.dot(probability.to(dout.dtype), dout, dvalue, input_precision="tf32x3")
        dlogits = probability * (tl.dot(v, tl.trans(dout), input_precision="tf32x3") - delta[None, :])
        dkey = tl.dot(dlogits.to(q.dtype), q, dkey, input_precision="tf32x3")
    return dkey, dvalue


@triton.jit
def norm_gradient(dy, y, inv):
    """Gradient of x from that of y = x * inv, inv = 1 / sqrt(sum x^2 + 1e-6) over the row: fp32 [R, DH].

    Args:
        dy: fp32 [R, DH].
        y: [R, DH].
        inv: fp32 [R].
    """
    wide = y.to(tl.float32)
    return inv[:, None] * (dy - wide * tl.sum(dy * wide, axis=1)[:, None])
