"""Triton kernels of the state scan's serial backward: four launches a block, activation gradients only.

Letters: B rows, m blocks of a chunk, S state vectors, D width, H heads, DH width of a head, W window, G 1 (fixed
gate) or 3 (LSTM gate). `slot` is a block's place in its chunk, `block` in the segment. EVEN: tiles divide S
and W. Buffers of a chunk:

    rows   [B, m, S, K]         gradient in front of the matrix that multiplies the read
    dread  [B, m, S, 2, H, DH]
    delta  fp32 [B, m, 2, H, S] row sums of dread * read
    dproj  [m, B, S, 4, H, DH]  blocks first, so that one block is one dense matrix for cuBLAS
    du     [m, B, S, D]
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from longspan.kernels.block_recurrent.triton_tiles import key_gradient, load_rows, norm_gradient, query_gradient

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["slot", "slots", "B"])
def read_gradient_kernel(
    rows, matrix, read, dread, delta, slot, slots, rows_b, read_b, dread_b, delta_b, B, S, K,
    H: tl.constexpr, DH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dread = rows @ matrix [K, 2*H*DH] for one block, and delta; one head of one read in a tile.

    With TMA, which needs EVEN and that BM divides S, rows comes as a descriptor of [B*slots*S, K] in pieces of
    [BM, BK], matrix in pieces of [BK, DH].
    """
    flat = tl.program_id(0) * BM + tl.arange(0, BM)
    head = tl.program_id(1)
    batch, state = flat // S, flat % S
    inside = flat < B * S
    column = head * DH + tl.arange(0, DH)
    if TMA:
        begin = tl.program_id(0) * BM
        source = (begin // S * slots + slot) * S + begin % S
    else:
        at_rows = rows + batch[:, None].to(tl.int64) * rows_b + (slot.to(tl.int64) * S + state[:, None]) * K
    acc = tl.zeros([BM, DH], tl.float32)
    for at in range(0, K, BK):
        k = at + tl.arange(0, BK)
        if TMA:
            a = rows.load([source, at])
            b = matrix.load([at, head * DH])
        elif EVEN:
            a = tl.load(at_rows + k[None, :])
            b = tl.load(matrix + k[:, None] * (2 * H * DH) + column[None, :])
        else:
            a = tl.load(at_rows + k[None, :], mask=inside[:, None] & (k[None, :] < K), other=0.0)
            b = tl.load(matrix + k[:, None] * (2 * H * DH) + column[None, :], mask=k[:, None] < K, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    place = (slot.to(tl.int64) * S + state[:, None]) * (2 * H * DH) + column[None, :]
    grad = acc.to(dread.dtype.element_ty)
    tl.store(dread + batch[:, None].to(tl.int64) * dread_b + place, grad, mask=inside[:, None])
    out = tl.load(read + batch[:, None].to(tl.int64) * read_b + place, mask=inside[:, None], other=0.0)
    sums = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta + batch.to(tl.int64) * delta_b + (slot * 2 * H + head) * S + state, sums, mask=inside)


@triton.jit
def _query_role(
    proj, inv, lse, delta, dout, scale, scale_part, dproj, keys, values, key_stride, value_stride,
    row, S, begin, end, H: tl.constexpr, DH: tl.constexpr, KIND: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gradient of self query (KIND 0) or token query (1) of one tile of one head, through its normalisation."""
    inside = row < S
    q = load_rows(proj + (2 + KIND) * H * DH, row, 4 * H * DH, S, DH, EVEN)
    do = load_rows(dout + KIND * H * DH, row, 2 * H * DH, S, DH, EVEN)
    factor = tl.full([q.shape[0]], 1.4426950408889634, tl.float32)
    lses = tl.load(lse + KIND * H * S + row, mask=inside, other=float("inf"))
    deltas = tl.load(delta + KIND * H * S + row, mask=inside, other=0.0)
    grad = query_gradient(q, do, factor, lses, deltas, keys, values, key_stride, value_stride, begin, end, BN, DH, EVEN)
    # y = unit |s|: d|s| = unit . dy, dx = inv |s| (dy - unit (unit . dy)); a scale of zero gives zero
    size = tl.abs(tl.load(scale).to(tl.float32))
    unit = q.to(tl.float32) * tl.where(size > 0, 1 / size, 0.0)
    along = tl.sum(grad * unit, axis=1)
    norm = tl.load(inv + row * (3 * H) + (1 + KIND) * H, mask=inside, other=0.0)
    grad = (norm * size)[:, None] * (grad - unit * along[:, None])
    place = row[:, None] * (4 * H * DH) + (2 + KIND) * H * DH + tl.arange(0, DH)[None, :]
    tl.store(dproj + place, grad.to(dproj.dtype.element_ty), mask=inside[:, None])
    tl.store(scale_part, tl.sum(tl.where(inside, along, 0.0), axis=0))


@triton.jit
def _key_role(
    proj, inv, lse, delta, dout, dkeys, dvalues, grad_s, dproj, row, S,
    H: tl.constexpr, DH: tl.constexpr, BM: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gradient of key and value of one tile of one head, from the state's own queries and the tokens' read."""
    inside = (row < S)[:, None]
    k = load_rows(proj, row, 4 * H * DH, S, DH, EVEN)
    v = load_rows(proj + H * DH, row, 4 * H * DH, S, DH, EVEN)
    dk = load_rows(dkeys, row, grad_s, S, DH, EVEN).to(tl.float32)
    dv = load_rows(dvalues, row, grad_s, S, DH, EVEN).to(tl.float32)
    dk, dv = key_gradient(
        dk, dv, k, v, proj + 2 * H * DH, dout, lse, delta, 4 * H * DH, 2 * H * DH, S, BM, DH, EVEN,
    )  # fmt: skip
    dk = norm_gradient(dk, k, tl.load(inv + row * (3 * H), mask=row < S, other=0.0))
    place = row[:, None] * (4 * H * DH) + tl.arange(0, DH)[None, :]
    tl.store(dproj + place, dk.to(dproj.dtype.element_ty), mask=inside)
    tl.store(dproj + place + H * DH, dv.to(dproj.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["slot", "block", "B", "n"])
def attention_gradient_kernel(
    proj, inv, lse, delta, dread, keys, values, reset, dkeys, dvalues, self_scale, token_scale, dproj, scale_parts,
    slot, block, proj_b, inv_b, lse_b, delta_b, dread_b, key_b, key_t, key_h, value_b, value_t, value_h,
    grad_b, grad_n, grad_s, grad_h, B, S, W, n,
    H: tl.constexpr, DH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dproj of one block: three roles in one launch, the longest first (token query, key and value, self query).

    keys and values begin with the window before the chunk's first block, dkeys and dvalues with that block.
    """
    tiles = tl.cdiv(S, BM)
    group = tiles * H * B
    role = tl.program_id(0) // group
    rest = tl.program_id(0) % group
    tile, head, batch = rest % tiles, rest // tiles % H, rest // (tiles * H)
    row = tile * BM + tl.arange(0, BM)
    b = batch.to(tl.int64)
    at = slot.to(tl.int64)
    proj += b * proj_b + at * S * (4 * H * DH) + head * DH
    inv += b * inv_b + at * S * (3 * H) + head
    lse += b * lse_b + (at * 2 * H + head) * S
    delta += b * delta_b + (at * 2 * H + head) * S
    dread += b * dread_b + at * S * (2 * H * DH) + head * DH
    dproj += (at * B + b) * S * (4 * H * DH) + head * DH
    parts = scale_parts + ((at * B + b) * 2 * H + head) * tiles + tile
    if role == 0:
        # null keys have logit 0 and give the query nothing
        begin = tl.where(tl.load(reset + b * n + block) != 0, W, 0)
        start = at * W
        _query_role(
            proj, inv, lse, delta, dread, token_scale + head, parts + H * tiles, dproj,
            keys + b * key_b + start * key_t + head * key_h, values + b * value_b + start * value_t + head * value_h,
            key_t, value_t, row, S, begin, 2 * W, H, DH, 1, BN, EVEN,
        )  # fmt: skip
    elif role == 1:
        from_tokens = b * grad_b + at * grad_n + head * grad_h
        _key_role(
            proj, inv, lse, delta, dread, dkeys + from_tokens, dvalues + from_tokens, grad_s, dproj, row, S,
            H, DH, BN, EVEN,
        )  # fmt: skip
    else:
        _query_role(
            proj, inv, lse, delta, dread, self_scale + head, parts, dproj,
            proj, proj + H * DH, 4 * H * DH, 4 * H * DH, row, S, 0, S, H, DH, 0, BN, EVEN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["slot", "B"])
def offered_gradient_kernel(
    proj, inv, dkeys, dvalues, dproj, slot, proj_b, inv_b, grad_b, grad_n, grad_s, grad_h, B, S,
    H: tl.constexpr, DH: tl.constexpr, BM: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dproj of a block that its tokens read and nobody writes: keys and values from the tokens, queries zero."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    at = slot.to(tl.int64)
    from_tokens = b * grad_b + at * grad_n + head * grad_h
    k = load_rows(proj + b * proj_b + at * S * (4 * H * DH) + head * DH, row, 4 * H * DH, S, DH, EVEN)
    dk = load_rows(dkeys + from_tokens, row, grad_s, S, DH, EVEN).to(tl.float32)
    dv = load_rows(dvalues + from_tokens, row, grad_s, S, DH, EVEN)
    norm = tl.load(inv + b * inv_b + at * S * (3 * H) + head + row * (3 * H), mask=row < S, other=0.0)
    dk = norm_gradient(dk, k, norm)
    place = dproj + ((at * B + b) * S + row[:, None]) * (4 * H * DH) + head * DH + tl.arange(0, DH)[None, :]
    inside = (row < S)[:, None]
    none = tl.zeros([BM, DH], dproj.dtype.element_ty)
    tl.store(place, dk.to(dproj.dtype.element_ty), mask=inside)
    tl.store(place + H * DH, dv.to(dproj.dtype.element_ty), mask=inside)
    tl.store(place + 2 * H * DH, none, mask=inside)
    tl.store(place + 3 * H * DH, none, mask=inside)


@triton.jit(do_not_specialize=["slot", "block", "next_slot", "B", "n"])
def state_gradient_kernel(
    carry, du, entering, norm, reset, dinitial, gate, written, rows,
    slot, block, next_slot, rows_b, values_b, B, S, D, n,
    NORM: tl.constexpr, GATE: tl.constexpr, TANH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One state vector: through the norm of block `block`, the reset rule, and the gate of the block before.

    carry, fp32 [B, S, D], is read and written in place. With NORM it arrives as the gradient past the reads of the
    block and leaves as that of the state before it; dinitial, fp32 [B, S, D], takes it at a document start. With GATE
    it then goes through the gate of the block in `next_slot`: 1 fixed (gate: its bias [D]), 2 LSTM (gate: both
    biases [2, D]; written [B, m, S, 3*D]: what is written and both gates before tanh, bias and sigmoid), and `rows`
    gets the gradients in front of the matrix. Without NORM `block` is the one after the gate's.
    """
    batch, state = (tl.program_id(0) // S).to(tl.int64), tl.program_id(0) % S
    column = tl.arange(0, BD)
    inside = column < D
    place = (batch * S + state) * D + column
    grad = tl.load(carry + place, mask=inside, other=0.0)
    if NORM:
        c = tl.load(entering + ((batch * n + block) * S + state) * D + column, mask=inside, other=0.0)
        factor = tl.rsqrt(tl.sum(c * c, axis=0) / D + 1e-6)
        unit = c * factor
        dx = tl.load(du + ((slot.to(tl.int64) * B + batch) * S + state) * D + column, mask=inside, other=0.0)
        dx = dx.to(tl.float32) * tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
        grad += factor * (dx - unit * (tl.sum(dx * unit, axis=0) / D))
        if tl.load(reset + batch * n + block) != 0:
            total = tl.load(dinitial + place, mask=inside, other=0.0)
            tl.store(dinitial + place, total + grad, mask=inside)
            grad = tl.zeros([BD], tl.float32)
    if GATE == 1:
        keep = tl.sigmoid(tl.load(gate + column, mask=inside, other=0.0).to(tl.float32))
        out = rows + batch * rows_b + (next_slot.to(tl.int64) * S + state) * D + column
        tl.store(out, (grad * (1 - keep)).to(rows.dtype.element_ty), mask=inside)
        grad *= keep
    if GATE == 2:
        before = tl.load(entering + ((batch * n + block - 1) * S + state) * D + column, mask=inside, other=0.0)
        seen = written + batch * values_b + (next_slot.to(tl.int64) * S + state) * (3 * D) + column
        value = tl.load(seen, mask=inside, other=0.0).to(tl.float32)
        forget = tl.load(seen + D, mask=inside, other=0.0).to(tl.float32)
        write = tl.load(seen + 2 * D, mask=inside, other=0.0).to(tl.float32)
        forget = tl.sigmoid(forget + tl.load(gate + column, mask=inside, other=0.0).to(tl.float32) + 1)
        write = tl.sigmoid(write + tl.load(gate + D + column, mask=inside, other=0.0).to(tl.float32) - 1)
        out = rows + batch * rows_b + (next_slot.to(tl.int64) * S + state) * (3 * D) + column
        dvalue = grad * write
        if TANH:
            value = 2 * tl.sigmoid(2 * value) - 1
            dvalue *= 1 - value * value
        tl.store(out, dvalue.to(rows.dtype.element_ty), mask=inside)
        tl.store(out + D, (grad * before * forget * (1 - forget)).to(rows.dtype.element_ty), mask=inside)
        tl.store(out + 2 * D, (grad * value * write * (1 - write)).to(rows.dtype.element_ty), mask=inside)
        grad *= forget
    tl.store(carry + place, grad, mask=inside)


@triton.jit(do_not_specialize=["first", "count", "later", "n", "inv_b"])
def token_gradient_kernel(
    proj, lse, delta, dread, keys, values, inv, reset, dkeys, dvalues, dcached_keys, dcached_values,
    first, count, later, n,
    proj_b, lse_b, delta_b, dread_b, key_b, key_t, key_h, value_b, value_t, value_h, inv_b, out_b, out_t, S, W,
    H: tl.constexpr, DH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
    RAW: tl.constexpr, HAS_CACHE: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens' keys and values from the states of `count` blocks from `first` on, which read them.

    A window of keys is seen by its own block and, unless a document starts there, by the next one; window 0 here is
    the one before block `first`, in `keys`, `values` and `inv` as well. With RAW the gradients go on through the
    normalisation of the keys (inv: fp32 [B, any, H]) and are added to dkeys and dvalues, which begin with the tokens
    of block `first`; those of the cache, before block 0, are dcached_keys and dcached_values [B, W, H, DH] if
    HAS_CACHE. Without RAW they are written to dkeys and dvalues, cache in front, and `later` says that blocks behind
    these have given the last window its share already.
    """
    tiles = tl.cdiv(W, BN)
    window = tl.program_id(0) // tiles
    place = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = (place < W)[:, None]
    start = window.to(tl.int64) * W
    column = tl.arange(0, DH)[None, :]
    k = load_rows(keys + batch * key_b + start * key_t + head * key_h, place, key_t, W, DH, EVEN)
    v = load_rows(values + batch * value_b + start * value_t + head * value_h, place, value_t, W, DH, EVEN)
    dk = tl.zeros([BN, DH], tl.float32)
    dv = tl.zeros([BN, DH], tl.float32)
    proj += batch * proj_b + (3 * H + head) * DH
    lse += batch * lse_b + (H + head) * S
    delta += batch * delta_b + (H + head) * S
    dread += batch * dread_b + (H + head) * DH
    earliest = tl.maximum(window - 1, 0)
    for step in range(0, tl.minimum(window + 1, count) - earliest):
        reader = earliest + step
        nothing = (reader == window) & (tl.load(reset + batch * n + first + reader) != 0)
        length = tl.where(nothing, 0, S)
        at = reader.to(tl.int64)
        small = at * 2 * H * S
        dk, dv = key_gradient(
            dk, dv, k, v, proj + at * S * (4 * H * DH), dread + at * S * (2 * H * DH), lse + small, delta + small,
            4 * H * DH, 2 * H * DH, length, BM, DH, EVEN,
        )  # fmt: skip
    if RAW:
        if first + window > 0:
            size = tl.load(inv + batch * inv_b + (start + place) * H + head, mask=place < W, other=0.0)
            # loaded once more: kept in registers it would spill others
            again = load_rows(keys + batch * key_b + start * key_t + head * key_h, place, key_t, W, DH, EVEN)
            dk = norm_gradient(dk, again, size)
            out = batch * out_b + (start - W + place[:, None]) * out_t + head * DH + column
            dk += tl.load(dkeys + out, mask=inside, other=0.0).to(tl.float32)
            dv += tl.load(dvalues + out, mask=inside, other=0.0).to(tl.float32)
            tl.store(dkeys + out, dk.to(dkeys.dtype.element_ty), mask=inside)
            tl.store(dvalues + out, dv.to(dvalues.dtype.element_ty), mask=inside)
        elif HAS_CACHE:
            out = (batch * W + place[:, None]) * (H * DH) + head * DH + column
            tl.store(dcached_keys + out, dk.to(dcached_keys.dtype.element_ty), mask=inside)
            tl.store(dcached_values + out, dv.to(dcached_values.dtype.element_ty), mask=inside)
    else:
        out = batch * out_b + ((first + window).to(tl.int64) * W + place[:, None]) * out_t + head * DH + column
        if (window == count) & (later != 0):
            dk += tl.load(dkeys + out, mask=inside, other=0.0).to(tl.float32)
            dv += tl.load(dvalues + out, mask=inside, other=0.0).to(tl.float32)
        tl.store(dkeys + out, dk.to(dkeys.dtype.element_ty), mask=inside)
        tl.store(dvalues + out, dv.to(dvalues.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first", "count", "m", "length", "group", "B", "n"])
def sums_kernel(
    entering, final, norm, ids, du, gate, rows, u, ids_part, norm_part, gate_part,
    first, count, m, length, group, rows_b, B, S, D, n, GATE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One state vector in `group` rows over `length` of the m blocks of a chunk: u for the product; sums for ids, norm,
    fixed gate.

    u: [m, B, S, D]; ids_part, norm_part, gate_part: fp32 [parts of the rows * parts of the blocks, S, D]. With GATE,
    rows [B, count, S, D] is the gradient of what the fixed gate writes: c' = c g + z (1-g) gives
    db = rows (c - c') g / (1-g). All loads of a step stand before its sum over D, where threads wait for one another.
    """
    state, part = tl.program_id(0) % S, tl.program_id(0) // S
    column = tl.arange(0, BD)
    inside = column < D
    scale = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
    identity = tl.load(ids + state * D + column, mask=inside, other=0.0).to(tl.float32)
    dids = tl.zeros([BD], tl.float32)
    dnorm = tl.zeros([BD], tl.float32)
    dgate = tl.zeros([BD], tl.float32)
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, m)
    for batch in range(part * group, tl.minimum(part * group + group, B)):
        b = tl.cast(batch, tl.int64)
        c = tl.load(entering + ((b * n + first + begin) * S + state) * D + column, mask=inside, other=0.0)
        for slot in range(begin, end):
            at = ((slot * B + b) * S + state) * D + column
            grad = tl.load(du + at, mask=inside, other=0.0).to(tl.float32)
            following = first + slot + 1
            from_next = entering + ((b * n + following) * S + state) * D
            after = tl.where(following < n, from_next, final + (b * S + state) * D)
            after = tl.load(after + column, mask=inside, other=0.0)
            if GATE:
                written = tl.minimum(tl.maximum(count - slot, 0), 1) * D
                dz = tl.load(rows + b * rows_b + (slot * S + state) * D + column, mask=column < written, other=0.0)
                dgate += dz.to(tl.float32) * (c - after)
            unit = c * tl.rsqrt(tl.sum(c * c, axis=0) / D + 1e-6)
            tl.store(u + at, (unit * scale + identity).to(u.dtype.element_ty), mask=inside)
            dids += grad
            dnorm += grad * unit
            c = after
    place = ((part * tl.num_programs(1) + tl.program_id(1)) * S + state) * D + column
    tl.store(ids_part + place, dids, mask=inside)
    tl.store(norm_part + place, dnorm, mask=inside)
    if GATE:
        keep = tl.sigmoid(tl.load(gate + column, mask=inside, other=0.0).to(tl.float32))
        factor = tl.where(keep < 1, keep / (1 - keep), 0.0)
        tl.store(gate_part + place, dgate * factor, mask=inside)
