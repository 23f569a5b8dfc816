"""Triton kernels of the state chain's forward: project the state, attend, write it (arXiv:2203.07852, section 3).

Letters: B rows, n blocks, S state vectors, D width, H heads, DH width of a head, W window. A buffer with few slots
is used round robin: block i lies in slot i % slots. What an epilogue reads is loaded in front of the loop, so that it
arrives while the products run.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# 2^s neither overflows nor vanishes in fp32 (nor in bf16) while |s| <= 100, so that no maximum need be kept
SAFE_EXPONENT = tl.constexpr(100.0)
# TF32 truncates its operands, which makes every product smaller by 1e-3; logits alone can bear it. No effect on bf16.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _load(ref, stride, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """[ROWS, COLUMNS] at (row, column) of a matrix: a descriptor (TMA) or a pointer with its row stride."""
    if TMA:
        return ref.load([row, column])
    else:
        base = ref + tl.cast(row, tl.int64) * stride + column
        return tl.load(base + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _load_tokens(ref, strides, b, h, row, ROWS: tl.constexpr, DH: tl.constexpr, TMA: tl.constexpr):
    """[ROWS, DH] of one head of the tokens: a descriptor [B, H, rows, DH] (TMA) or a pointer with three strides."""
    if TMA:
        return ref.load([b, h, row, 0]).reshape([ROWS, DH])
    else:
        base = (
            ref + b.to(tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1] + tl.cast(row, tl.int64) * strides[2]
        )
        return tl.load(base + tl.arange(0, ROWS)[:, None] * strides[2] + tl.arange(0, DH)[None, :])


@triton.jit
def _slot_row(b, i, slots, s, S: tl.constexpr):
    """Row of state vector `s` of block `i` in a buffer [B, slots, S, ...]."""
    return (b * slots + i % slots) * S + s


@triton.jit
def _softmax_step(acc, m, mass, x, k, v, ONLINE: tl.constexpr):
    """One block of keys: acc [BM, DH], maximum m and mass [BM] after it; without ONLINE m stays 0."""
    s = tl.dot(x, k.T)
    if ONLINE:
        new = tl.maximum(m, tl.max(s, 1) * LOG2E)
        p = tl.exp2(s * LOG2E - new[:, None])
        shrink = tl.exp2(m - new)
        mass = mass * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        m = new
    else:
        p = tl.exp2(s * LOG2E)
        mass += tl.sum(p, 1)
    return tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION), m, mass


@triton.jit
def _read_own(
    acc, m, mass, x, kv_ref, kv_stride, row, h,
    S: tl.constexpr, H: tl.constexpr, DH: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    """Attention over the S keys of the same state."""
    for j in tl.range(0, S, BN, num_stages=STAGES):
        k = _load(kv_ref, kv_stride, row + j, h * DH, BN, DH, TMA)
        v = _load(kv_ref, kv_stride, row + j, (H + h) * DH, BN, DH, TMA)
        acc, m, mass = _softmax_step(acc, m, mass, x, k, v, ONLINE)
    return acc, m, mass


@triton.jit
def _read_tokens(
    acc, m, mass, x, keys, values, key_strides, value_strides, b, h, begin, end,
    DH: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    """Attention over the tokens [begin, end) of the cached sequence."""
    for j in tl.range(begin, end, BN, num_stages=STAGES):
        k = _load_tokens(keys, key_strides, b, h, j, BN, DH, TMA)
        v = _load_tokens(values, value_strides, b, h, j, BN, DH, TMA)
        acc, m, mass = _softmax_step(acc, m, mass, x, k, v, ONLINE)
    return acc, m, mass


@triton.jit
def _attend_tile(
    q_ref, kv_ref, keys, values, key_strides, value_strides, scales, reset, read, lse,
    b, i, n, h, tile_m, kv_slots, q_slots, read_slots, kv_stride, q_stride, KIND: tl.constexpr,
    S: tl.constexpr, W: tl.constexpr, H: tl.constexpr, DH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """softmax(q k^T) v of BM state vectors and one head, without mask: KIND 0 own state, 1 tokens of two windows.

    At a document start (reset) the previous window is W null keys: logit 0, value 0.
    """
    s0 = tile_m * BM
    rows = tl.arange(0, BM)
    bounded = tl.load(scales + KIND * H + h) * LOG2E <= SAFE_EXPONENT
    null = tl.load(reset + b * n + i) != 0
    x = _load(q_ref, q_stride, _slot_row(b, i, q_slots, s0, S), (KIND * H + h) * DH, BM, DH, TMA)
    acc = tl.zeros([BM, DH], tl.float32)
    m = tl.zeros([BM], tl.float32)
    mass = tl.zeros([BM], tl.float32)
    if KIND == 0:
        row = _slot_row(b, i, kv_slots, 0, S)
        if bounded:
            acc, m, mass = _read_own(acc, m, mass, x, kv_ref, kv_stride, row, h, S, H, DH, BN, STAGES, TMA, False)
        else:
            m -= float("inf")
            acc, m, mass = _read_own(acc, m, mass, x, kv_ref, kv_stride, row, h, S, H, DH, BN, 1, TMA, True)
    else:
        begin = tl.where(null, i * W + W, i * W)
        end = i * W + 2 * W
        mass += tl.where(null, W, 0)
        if bounded:
            acc, m, mass = _read_tokens(
                acc, m, mass, x, keys, values, key_strides, value_strides, b, h, begin, end,
                DH, BN, STAGES, TMA, False,
            )  # fmt: skip
        else:
            m += tl.where(null, 0.0, -float("inf"))
            acc, m, mass = _read_tokens(
                acc, m, mass, x, keys, values, key_strides, value_strides, b, h, begin, end,
                DH, BN, 1, TMA, True,
            )  # fmt: skip
    out_row = (_slot_row(b, i, read_slots, s0, S) + rows).to(tl.int64)
    columns = (KIND * H + h) * DH + tl.arange(0, DH)
    out = acc * (1.0 / mass)[:, None]
    tl.store(read + out_row[:, None] * (2 * H * DH) + columns[None, :], out.to(read.dtype.element_ty))
    place = ((b * read_slots + i % read_slots) * 2 + KIND).to(tl.int64) * H + h
    tl.store(lse + place * S + s0 + rows, m + tl.log2(mass))


@triton.jit
def _store_entering(
    state, entering, cg, sumsq, gamma, b, slot, n, c_slots, rows, columns, tile_n,
    S: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The state that enters block `slot`: itself in fp32, times gamma in the compute type, and its sums of squares."""
    place = ((b * n + slot) * S + rows).to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(entering + place, state)
    source = (_slot_row(b, slot, c_slots, 0, S) + rows).to(tl.int64)
    scaled = state * tl.load(gamma + columns)[None, :]
    tl.store(cg + source[:, None] * D + columns[None, :], scaled.to(cg.dtype.element_ty))
    tl.store(sumsq + source * PARTS + tile_n, tl.sum(state * state, 1))


@triton.jit(do_not_specialize=["n", "c_slots"])
def begin_kernel(
    state, state_row, state_block, initial, gamma, reset, entering, cg, sumsq, n, c_slots,
    FIRST: tl.constexpr, S: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What `project_kernel` needs of states that exist: of the first block (FIRST: state [B, S, D], the reset rule is
    applied and the state stored in entering[:, 0]) or of all n blocks (state is `entering` itself, strided).

    Grid (B * blocks * S / BM, D / BN).
    """
    tile_m = tl.program_id(0)
    tile_n = tl.program_id(1)
    rows = tile_m % (S // BM) * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    b = tile_m // (S // BM)
    if FIRST:
        if tl.load(reset + b * n) != 0:
            c = tl.load(initial + rows[:, None] * D + columns[None, :])
        else:
            c = tl.load(state + b.to(tl.int64) * state_row + rows[:, None] * D + columns[None, :])
        _store_entering(c, entering, cg, sumsq, gamma, b, 0, n, c_slots, rows, columns, tile_n, S, D, PARTS)
    else:
        i = b % n
        base = state + (b // n).to(tl.int64) * state_row + i.to(tl.int64) * state_block
        c = tl.load(base + rows[:, None] * D + columns[None, :])
        source = (b * S + rows).to(tl.int64)
        scaled = c * tl.load(gamma + columns)[None, :]
        tl.store(cg + source[:, None] * D + columns[None, :], scaled.to(cg.dtype.element_ty))
        tl.store(sumsq + source * PARTS + tile_n, tl.sum(c * c, 1))


@triton.jit(do_not_specialize=["first", "blocks", "c_slots", "kv_slots", "q_slots"])
def project_kernel(
    cg, sumsq, weight, ids, scales, kv, q, inv, rstd_out,
    first, blocks, c_slots, kv_slots, q_slots, kv_stride, q_stride,
    S: tl.constexpr, D: tl.constexpr, H: tl.constexpr, DH: tl.constexpr,
    PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """p = rstd * (cg @ weight^T) + ids for BM state vectors and BN / DH heads of one kind, normalised per head.

    cg [B*c_slots*S, D] is the state times gamma; sumsq [B*c_slots*S, PARTS] its partial sums of squares before gamma.
    B rows and blocks [first, first + blocks): grid (S/BM * 4*H*DH/BN * blocks * B).
    """
    pid = tl.program_id(0)
    TILES_M: tl.constexpr = S // BM
    TILES_N: tl.constexpr = 4 * H * DH // BN
    block = pid // (TILES_M * TILES_N)
    b, i = block // blocks, first + block % blocks
    tile_n = pid // TILES_M % TILES_N
    s0 = pid % TILES_M * BM
    rows = tl.arange(0, BM)
    source = _slot_row(b, i, c_slots, s0, S)
    parts = tl.arange(0, PARTS_PADDED)
    squares = tl.load(
        sumsq + (source + rows)[:, None].to(tl.int64) * PARTS + parts[None, :], mask=parts[None, :] < PARTS, other=0.0
    )
    columns = tile_n * BN + tl.arange(0, BN)
    identity = tl.load(ids + (s0 + rows)[:, None] * (4 * H * DH) + columns[None, :])
    acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, D, BK, num_stages=STAGES):
        x = _load(cg, D, source, k, BM, BK, TMA)
        w = _load(weight, D, tile_n * BN, k, BN, BK, TMA)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    rstd = tl.rsqrt(tl.sum(squares, 1) / D + 1e-6)
    p = acc * rstd[:, None] + identity.to(tl.float32)

    HEADS: tl.constexpr = BN // DH
    kind = tile_n * BN // (H * DH)  # 0 key, 1 value, 2 self query, 3 token query
    head = tile_n * HEADS % H + tl.arange(0, HEADS)
    parted = p.reshape([BM, HEADS, DH])
    norm = tl.rsqrt(tl.sum(parted * parted, 2) + 1e-6)  # [BM, HEADS]
    scale = tl.load(scales + tl.maximum(kind - 2, 0) * H + head)[None, :]
    factor = tl.where(kind == 1, 1.0, tl.where(kind >= 2, norm * scale, norm))
    p = (parted * factor[:, :, None]).reshape([BM, BN])

    q_row = (_slot_row(b, i, q_slots, s0, S) + rows).to(tl.int64)
    if kind < 2:
        kv_row = (_slot_row(b, i, kv_slots, s0, S) + rows).to(tl.int64)
        tl.store(kv + kv_row[:, None] * kv_stride + columns[None, :], p.to(kv.dtype.element_ty))
    else:
        tl.store(q + q_row[:, None] * q_stride + (columns - 2 * H * DH)[None, :], p.to(q.dtype.element_ty))
    if kind != 1:
        tl.store(inv + q_row[:, None] * (3 * H) + (tl.maximum(kind - 1, 0) * H + head)[None, :], norm)
    if tile_n == 0:
        tl.store(rstd_out + q_row, rstd)


@triton.jit(do_not_specialize=["first", "blocks", "n", "kv_slots", "q_slots", "read_slots"])
def attend_kernel(
    q_ref, kv_ref, keys, values, key_strides, value_strides, scales, reset, read, lse,
    first, blocks, n, kv_slots, q_slots, read_slots, kv_stride, q_stride,
    S: tl.constexpr, W: tl.constexpr, H: tl.constexpr, DH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Both reads of B rows and blocks [first, first + blocks): grid (2 * H * S/BM * blocks * B), longest first."""
    pid = tl.program_id(0)
    TILES_M: tl.constexpr = S // BM
    half = tl.num_programs(0) // 2
    tile = pid % half
    block = tile // (TILES_M * H)
    b, i = block // blocks, first + block % blocks
    h, tile_m = tile // TILES_M % H, tile % TILES_M
    if pid < half:
        _attend_tile(
            q_ref, kv_ref, keys, values, key_strides, value_strides, scales, reset, read, lse,
            b, i, n, h, tile_m, kv_slots, q_slots, read_slots, kv_stride, q_stride, 1,
            S, W, H, DH, BM, BN, STAGES, TMA,
        )  # fmt: skip
    else:
        _attend_tile(
            q_ref, kv_ref, keys, values, key_strides, value_strides, scales, reset, read, lse,
            b, i, n, h, tile_m, kv_slots, q_slots, read_slots, kv_stride, q_stride, 0,
            S, W, H, DH, BM, BN, STAGES, TMA,
        )  # fmt: skip


@triton.jit(do_not_specialize=["i", "n", "c_slots", "read_slots"])
def write_kernel(
    read_ref, output, gate, initial, gamma, reset, entering, final, cg, sumsq, i, n, c_slots, read_slots,
    LSTM: tl.constexpr, TANH: tl.constexpr,
    S: tl.constexpr, D: tl.constexpr, H: tl.constexpr, DH: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """BM x BN of the state after block i: z = read @ output^T, gated; then the state that enters block i + 1.

    B rows: grid (S/BM * D/BN * B). PARTS, of a row in sumsq, is D/BN, or with the fixed gate twice as many: the tile is
    then stored half by half.
    """
    pid = tl.program_id(0)
    TILES_M: tl.constexpr = S // BM
    TILES_N: tl.constexpr = D // BN
    K: tl.constexpr = 2 * H * DH
    b, tile_m, tile_n = pid // (TILES_M * TILES_N), pid % TILES_M, pid // TILES_M % TILES_N
    rows = tile_m * BM + tl.arange(0, BM)
    source = _slot_row(b, i, read_slots, tile_m * BM, S)
    z = tl.zeros([BM, BN], tl.float32)
    HALVES: tl.constexpr = PARTS * BN != D
    if not HALVES:
        columns = tile_n * BN + tl.arange(0, BN)
        before = tl.load(entering + ((b * n + i) * S + rows).to(tl.int64)[:, None] * D + columns[None, :])
        bias = tl.load(gate + columns)[None, :]
    if LSTM:
        admit = tl.load(gate + D + columns)[None, :]
        forget = tl.zeros([BM, BN], tl.float32)
        write = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        r = _load(read_ref, K, source, k, BM, BK, TMA)
        z = tl.dot(r, _load(output, K, tile_n * BN, k, BN, BK, TMA).T, z, input_precision=PRECISION)
        if LSTM:
            f = _load(output, K, D + tile_n * BN, k, BN, BK, TMA).T
            forget = tl.dot(r, f, forget, input_precision=PRECISION)
            w = _load(output, K, 2 * D + tile_n * BN, k, BN, BK, TMA).T
            write = tl.dot(r, w, write, input_precision=PRECISION)
    if TANH:
        z = 2.0 * tl.sigmoid(2.0 * z) - 1.0
    if not HALVES:
        if LSTM:
            after = before * tl.sigmoid(forget + bias + 1.0) + z * tl.sigmoid(write + admit - 1.0)
        else:
            keep = tl.sigmoid(bias)
            after = before * keep + z * (1.0 - keep)
        _store_after(
            after, initial, gamma, reset, entering, final, cg, sumsq, b, i, n, c_slots, rows, tile_n, S, D, PARTS, BN
        )  # fmt: skip
    else:  # half by half, in few registers
        left, right = z.reshape([BM, 2, BN // 2]).permute(0, 2, 1).split()
        _mix(
            left, gate, initial, gamma, reset, entering, final, cg, sumsq, b, i, n, c_slots, rows, tile_n * 2,
            S, D, PARTS, BN // 2,
        )  # fmt: skip
        _mix(
            right, gate, initial, gamma, reset, entering, final, cg, sumsq, b, i, n, c_slots, rows, tile_n * 2 + 1,
            S, D, PARTS, BN // 2,
        )  # fmt: skip


@triton.jit
def _mix(
    z, gate, initial, gamma, reset, entering, final, cg, sumsq, b, i, n, c_slots, rows, part,
    S: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What is written, through the fixed gate: columns of `part`. The state is loaded only now: other programs of the
    multiprocessor work meanwhile."""
    columns = part * BN + tl.arange(0, BN)
    keep = tl.sigmoid(tl.load(gate + columns)[None, :])
    before = tl.load(entering + ((b * n + i) * S + rows).to(tl.int64)[:, None] * D + columns[None, :])
    after = before * keep + z * (1.0 - keep)
    _store_after(
        after, initial, gamma, reset, entering, final, cg, sumsq, b, i, n, c_slots, rows, part, S, D, PARTS, BN
    )  # fmt: skip


@triton.jit
def _store_after(
    after, initial, gamma, reset, entering, final, cg, sumsq, b, i, n, c_slots, rows, part,
    S: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The state after block i, columns of `part`: as what enters the next block, if there is one."""
    columns = part * BN + tl.arange(0, BN)
    if i + 1 < n:
        if tl.load(reset + b * n + i + 1) != 0:
            after = tl.load(initial + rows[:, None] * D + columns[None, :])
        _store_entering(after, entering, cg, sumsq, gamma, b, i + 1, n, c_slots, rows, columns, part, S, D, PARTS)
    else:
        tl.store(final + (b * S + rows).to(tl.int64)[:, None] * D + columns[None, :], after)
