"""RMS normalisation of a residual stream in Triton: one pass forward, one pass backward.

Letters: N rows (all tokens of all sequences), T tokens of one sequence, D width, M tokens of the dropout tile.
The backward pass reads x again instead of a saved factor: the row is in registers anyway. Where x may be overwritten,
it reads the norm h and the factor 1 / RMS(x) instead: x * factor = h / weight. The weight's gradient is summed by a
fixed number of programs, each over the same rows every time, and then over the programs in a fixed order.

All kernels begin with the last rows: the product in front has written these last, so that they still lie in the cache.
"""

# mypy: allow-untyped-defs
# arguments of kernels are pointers, numbers and constants of the compiler's own types

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.kernels.direct_launches import launched_directly
from longspan.kernels.launches import blocks_of
from longspan.kernels.norm.reference import EPSILON

# Of all programs of the backward pass, whatever the device: about what an H100 runs at once. 32 warps count as 16,
# since they share as many registers.
BACKWARD_WARPS = 2048
# Widest block whose next rows are read ahead, by bytes of a number: others have no registers for them.
_AHEAD_WIDTH = {2: 8192, 4: 0}
# Least weight, by its absolute value, where the backward pass divides by it. h then has a trace of the row, far below
# any rounding of what is made of it, and bf16 and fp32 have the exponents for that.
_LEAST_WEIGHT = tl.constexpr(2.0**-100)
_REDUCE_COLUMNS = 16
_REDUCE_WARPS = 8


@dataclass(frozen=True)
class Config:
    """Work of one program: elements of x in registers at a time, one row or more, and warps."""

    elements: int
    num_warps: int


FORWARD_CONFIG = Config(4096, 4)
# 32,768 x 1024 on an H100: 97 us; with one warp 99, with 512 programs of 4 warps 104, without loads ahead 102.
BACKWARD_CONFIG = Config(512, 2)


@triton.jit
def _divisible(weight):
    """The weight with its absolute value raised to _LEAST_WEIGHT, 0 and -0 too; NaN stays."""
    least = tl.where(weight.to(tl.int32, bitcast=True) < 0, -_LEAST_WEIGHT, _LEAST_WEIGHT)
    return tl.where(tl.abs(weight) < _LEAST_WEIGHT, least, weight)


@launched_directly
@triton.jit(do_not_specialize=["rows", "tokens", "tile_tokens"])
def norm_fwd_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    mask_ptr,
    total_ptr,
    h_ptr,
    factor_ptr,
    rows,
    tokens,
    tile_tokens,
    EPS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_MASK: tl.constexpr,
    KEEPS_FACTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """h = RMS(x + delta) * weight * mask and, with a delta, total = x + delta: [N, D].

    KEEPS_FACTOR: factor [N] = 1 / RMS(x + delta), and h is one from which the backward pass can go back.
    """
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    inside = (row < rows)[:, None] & (column < DIM)[None, :]
    offset = row.to(tl.int64)[:, None] * DIM + column[None, :]
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offset, total, mask=inside)
        x = total.to(tl.float32)  # what the backward pass will see
    factor = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + EPS)
    weight = tl.load(weight_ptr + column, mask=column < DIM, other=0.0).to(tl.float32)
    if KEEPS_FACTOR:
        tl.store(factor_ptr + row, factor, mask=row < rows)
        weight = _divisible(weight)
    h = x * factor[:, None] * weight[None, :]
    if HAS_MASK:
        tile_row = (row % tokens) % tile_tokens
        h *= tl.load(mask_ptr + tile_row[:, None] * DIM + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(h_ptr + offset, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _load_rows(ptr, first, rows, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[BLOCK_ROWS, BLOCK_DIM] of [rows, DIM] from row `first` < rows on; if below 0, anything that is no trap."""
    column = tl.arange(0, BLOCK_DIM)
    if BLOCK_ROWS == 1 and DIM == BLOCK_DIM:  # nothing to mask: row 0 stands for those that do not exist
        row = tl.maximum(first, 0) + tl.arange(0, BLOCK_ROWS)
        tile = tl.load(ptr + row.to(tl.int64)[:, None] * DIM + column[None, :])
    else:
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = ((row >= 0) & (row < rows))[:, None] & (column < DIM)[None, :]
        tile = tl.load(ptr + row.to(tl.int64)[:, None] * DIM + column[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def _load_factors(ptr, first, rows, BLOCK_ROWS: tl.constexpr):
    """[BLOCK_ROWS] of [rows] in fp32; as `_load_rows`."""
    row = first + tl.arange(0, BLOCK_ROWS)
    return tl.load(ptr + row, mask=(row >= 0) & (row < rows), other=0.0)


@triton.jit
def _load_weight(ptr, DIM: tl.constexpr, FROM_OUTPUT: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The weight [BLOCK_DIM] in fp32; and one over it where the backward pass comes from the output."""
    column = tl.arange(0, BLOCK_DIM)
    weight = tl.load(ptr + column, mask=column < DIM, other=0.0).to(tl.float32)
    inverse = weight
    if FROM_OUTPUT:
        weight = _divisible(weight)
        inverse = 1.0 / weight
    return weight, inverse


@triton.jit
def _back_from_input(x, dh, weight, EPS: tl.constexpr, DIM: tl.constexpr):
    """Normalised rows and the gradient of x."""
    dnormal = dh * weight[None, :]
    # both sums at once: a program's warps wait for each other once a row
    squares, along = tl.reduce((x * x, dnormal * x), 1, _add_both)
    factor = tl.rsqrt(squares / DIM + EPS)
    back = factor * factor * (factor * (along / DIM))
    return x * factor[:, None], dnormal * factor[:, None] - x * back[:, None]


@triton.jit
def _back_from_output(h, dh, weight, inverse, factor, DIM: tl.constexpr):
    """Normalised rows and the gradient of what they were made of."""
    along = tl.sum(dh * h, axis=1) / DIM  # mean of dnormal * normal, in which the weight cancels
    normal = h * inverse[None, :]
    return normal, (dh * weight[None, :] - normal * along[:, None]) * factor[:, None]


@launched_directly
@triton.jit(do_not_specialize=["rows", "tokens", "tile_tokens"])
def norm_bwd_kernel(
    x_ptr,
    factor_ptr,
    weight_ptr,
    mask_ptr,
    dresidual_ptr,
    dh_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    tokens,
    tile_tokens,
    EPS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """dx = dresidual + backward of the norm at dh; partial [programs, D]: this program's part of dweight, fp32.

    FROM_OUTPUT: x is the norm h, without a mask, and factor [N] what the forward pass kept.
    AHEAD: a program asks for its next rows before it works on these, so that memory is never idle. rows > 0.
    """
    column = tl.arange(0, BLOCK_DIM)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=tl.float32)
    last = (tl.cdiv(rows, BLOCK_ROWS) - 1) * BLOCK_ROWS
    first = last - tl.program_id(0) * BLOCK_ROWS
    step = tl.num_programs(0) * BLOCK_ROWS
    if AHEAD:
        weight, inverse = _load_weight(weight_ptr, DIM, FROM_OUTPUT, BLOCK_DIM)
        next_x = _load_rows(x_ptr, first, rows, DIM, BLOCK_ROWS, BLOCK_DIM)
        next_dh = _load_rows(dh_ptr, first, rows, DIM, BLOCK_ROWS, BLOCK_DIM)
        if HAS_RESIDUAL:
            next_dresidual = _load_rows(dresidual_ptr, first, rows, DIM, BLOCK_ROWS, BLOCK_DIM)
        if FROM_OUTPUT:
            next_factor = _load_factors(factor_ptr, first, rows, BLOCK_ROWS)
    for done in range(last - first, rows, step):
        start = last - done
        if AHEAD:
            x, dh = next_x, next_dh
            next_x = _load_rows(x_ptr, start - step, rows, DIM, BLOCK_ROWS, BLOCK_DIM)
            next_dh = _load_rows(dh_ptr, start - step, rows, DIM, BLOCK_ROWS, BLOCK_DIM)
            if HAS_RESIDUAL:
                dresidual = next_dresidual
                next_dresidual = _load_rows(dresidual_ptr, start - step, rows, DIM, BLOCK_ROWS, BLOCK_DIM)
            if FROM_OUTPUT:
                factor = next_factor
                next_factor = _load_factors(factor_ptr, start - step, rows, BLOCK_ROWS)
        else:
            x = _load_rows(x_ptr, start, rows, DIM, BLOCK_ROWS, BLOCK_DIM)
            dh = _load_rows(dh_ptr, start, rows, DIM, BLOCK_ROWS, BLOCK_DIM)
            weight, inverse = _load_weight(weight_ptr, DIM, FROM_OUTPUT, BLOCK_DIM)
            if FROM_OUTPUT:
                factor = _load_factors(factor_ptr, start, rows, BLOCK_ROWS)
        x, dh = x.to(tl.float32), dh.to(tl.float32)
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (column < DIM)[None, :]
        if HAS_MASK:
            tile_row = (row % tokens) % tile_tokens
            dh *= tl.load(mask_ptr + tile_row[:, None] * DIM + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if FROM_OUTPUT:
            normal, dx = _back_from_output(x, dh, weight, inverse, factor, DIM)
        else:
            normal, dx = _back_from_input(x, dh, weight, EPS, DIM)
        dweight += dh * normal
        if HAS_RESIDUAL:
            if not AHEAD:  # so late that it takes no registers before
                dresidual = _load_rows(dresidual_ptr, start, rows, DIM, BLOCK_ROWS, BLOCK_DIM)
            dx += dresidual.to(tl.float32)
        offset = row.to(tl.int64)[:, None] * DIM + column[None, :]
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0) * DIM + column, tl.sum(dweight, axis=0), mask=column < DIM)


@launched_directly
@triton.jit
def sum_partials_kernel(
    partial_ptr, out_ptr, DIM: tl.constexpr, NUM_PARTIALS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """out [D] = sum over the first axis of partial [NUM_PARTIALS, D]."""
    row = tl.arange(0, NUM_PARTIALS)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (column < DIM)[None, :]
    part = tl.load(partial_ptr + row[:, None] * DIM + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + column, tl.sum(part, axis=0).to(out_ptr.dtype.element_ty), mask=column < DIM)


@cache
def _tile(config: Config, dim: int, warp_elements: int = 1024) -> dict[str, Any]:
    """Block and warps; a row wider than `elements` has more warps, one for each `warp_elements` of it."""
    block_dim = triton.next_power_of_2(dim)
    return {
        "BLOCK_ROWS": max(1, config.elements // block_dim),
        "BLOCK_DIM": block_dim,
        "num_warps": max(config.num_warps, min(32, block_dim // warp_elements)),
    }


def _sizes(x: Tensor, mask: Tensor | None) -> tuple[int, int, int]:
    """Rows, tokens of one sequence, tokens of the mask's tile."""
    rows = x.numel() // max(1, x.shape[-1])
    return rows, rows if mask is None else max(1, x.shape[-2]), 1 if mask is None else mask.shape[0]


def norm_forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, mask: Tensor | None, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The forward pass without autograd.

    Args:
        x: [..., D], contiguous; with a mask [..., T, D].
        delta: like x, contiguous, or None.
        weight: [D].
        mask: [M, D], contiguous, or None.
        factor: fp32, a number for each row, into which 1 / RMS goes: then the backward pass can do with the norm alone,
            of which weights below 2^-100 leave that much of the row. Or None.

    Returns:
        total = x + delta (x itself without delta); RMS(total) * weight * mask.
    """
    dim = x.shape[-1]
    rows, tokens, tile_tokens = _sizes(x, mask)
    total = x if delta is None else torch.empty_like(x)
    h = torch.empty_like(x)
    tile = _tile(FORWARD_CONFIG, dim)
    norm_fwd_kernel[(blocks_of(rows, tile["BLOCK_ROWS"]),)](
        x,
        delta,
        weight,
        mask,
        total,
        h,
        factor,
        rows,
        tokens,
        tile_tokens,
        EPS=EPSILON,
        DIM=dim,
        HAS_DELTA=delta is not None,
        HAS_MASK=mask is not None,
        KEEPS_FACTOR=factor is not None,
        **tile,
    )
    return total, h


def norm_backward(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    dresidual: Tensor | None,
    dh: Tensor,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The backward pass.

    Args:
        x: [..., D], contiguous: the normalised sum; with a factor the norm of it instead.
        weight, mask: as in the forward pass.
        dresidual: like x, contiguous: gradient of x that does not come through the norm; None = zero.
        dh: like x, contiguous: gradient of the norm.
        factor: of `norm_forward`, without a mask; or None.

    Returns:
        Gradients of x (like x) and of the weight ([D], in its type).
    """
    dim = x.shape[-1]
    rows, tokens, tile_tokens = _sizes(x, mask)
    if rows == 0:
        return torch.empty_like(x), torch.zeros_like(weight)
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    tile = _tile(BACKWARD_CONFIG, dim, 512)
    programs = BACKWARD_WARPS // min(16, tile["num_warps"])
    partial = torch.empty(programs, dim, dtype=torch.float32, device=x.device)
    ahead = tile["BLOCK_DIM"] <= _AHEAD_WIDTH[x.element_size()]
    # the weight's inverse takes so many registers (156, none spilled at 128) that not all programs would run at once
    limit = {"maxnreg": 128} if ahead and factor is not None else {}
    norm_bwd_kernel[(programs,)](
        x,
        factor,
        weight,
        mask,
        dresidual,
        dh,
        dx,
        partial,
        rows,
        tokens,
        tile_tokens,
        EPS=EPSILON,
        DIM=dim,
        HAS_RESIDUAL=dresidual is not None,
        HAS_MASK=mask is not None,
        FROM_OUTPUT=factor is not None,
        AHEAD=ahead,
        **tile,
        **limit,
    )
    sum_partials_kernel[(blocks_of(dim, _REDUCE_COLUMNS),)](
        partial, dweight, DIM=dim, NUM_PARTIALS=programs, BLOCK_COLUMNS=_REDUCE_COLUMNS, num_warps=_REDUCE_WARPS
    )
    return dx, dweight


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, mask: Tensor | None, from_output: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.has_delta = delta is not None
        factor = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32) if from_output else None
        total, h = norm_forward(x, delta, weight, mask, factor)
        ctx.save_for_backward(h if from_output else total, weight, mask, factor)
        return total, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, weight, mask, factor = ctx.saved_tensors
        dweight = None
        dx = dtotal
        if dh is not None:
            dresidual = None if dtotal is None else dtotal.contiguous()
            dx, dweight = norm_backward(kept, weight, mask, dresidual, dh.contiguous(), factor)
        return dx, dx if ctx.has_delta else None, dweight, None, None


def residual_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, mask: Tensor | None, from_output: bool = False
) -> tuple[Tensor, Tensor]:
    """Residual sum and norm with gradients.

    Args:
        x: [..., D]; with a mask [..., T, D].
        delta: like x, or None.
        weight: [D].
        mask: [M, D], or None; gets no gradient.
        from_output: without a mask: the backward pass reads the norm, so that the sum may be overwritten.

    Returns:
        x + delta (x itself without delta); RMS(x + delta) * weight * mask.
    """
    delta = None if delta is None else delta.contiguous()
    mask = None if mask is None else mask.contiguous()
    return _ResidualNorm.apply(x.contiguous(), delta, weight.contiguous(), mask, from_output)
