"""Token losses from a chunk of logits in Triton, which become their own gradient in place."""

# mypy: allow-untyped-defs
# arguments of kernels are pointers, numbers and constants of the compiler's own types

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.kernels.direct_launches import launched_directly
from longspan.kernels.launches import multiprocessors

IGNORED = -100
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


@dataclass(frozen=True)
class Config:
    """Logits of a row in registers at a time (fewer than the vocabulary: the row is read twice), and warps of so many;
    a smaller block has as many times fewer."""

    max_block: int
    num_warps: int


# 16-bit, 32-bit, rows read twice. 8,320 x 32,128 in bf16 on an H100: 368 us; one program
# a row, of 16 warps and without the next row on its way, 440.
CONFIGS = (Config(32768, 32), Config(16384, 32), Config(4096, 8))
_WARPS, _REGISTERS = 32, 64  # of a multiprocessor; of a thread, so that all of them run at once


@triton.jit
def _whole_row(start, limit, BLOCK: tl.constexpr):
    """Logits [BLOCK] of a row, -inf from `limit` on."""
    column = tl.arange(0, BLOCK)
    return tl.load(start + column, mask=column < limit, other=-float("inf"))


@launched_directly
@triton.jit(do_not_specialize=["rows"])
def nll_kernel(
    logits_ptr,
    labels_ptr,
    nll_ptr,
    weight_ptr,
    scale,
    rows,
    VOCAB: tl.constexpr,
    IGNORED: tl.constexpr,
    LOG2E: tl.constexpr,
    LN2: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    WRITE_NLL: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of logits [rows, VOCAB]: losses under softmax(scale * logits), and the losses' gradients over the logits.

    At most `rows` programs. Where a row fits, a program asks for its next one before it works on this one: between two
    rows of a program, nothing else would keep memory busy.
    """
    column = tl.arange(0, BLOCK)
    first = tl.program_id(0)
    step = tl.num_programs(0)
    if VOCAB <= BLOCK:
        next_x = _whole_row(logits_ptr + tl.cast(first, tl.int64) * VOCAB, VOCAB, BLOCK)
        next_label = tl.load(labels_ptr + first)
    for row in range(first, rows, step):
        start = logits_ptr + tl.cast(row, tl.int64) * VOCAB
        if VOCAB <= BLOCK:
            x, label = next_x, next_label
            after = row + step
            limit = tl.where(after < rows, VOCAB, 0)
            next_x = _whole_row(logits_ptr + tl.cast(after, tl.int64) * VOCAB, limit, BLOCK)
            next_label = tl.load(labels_ptr + after, mask=after < rows, other=IGNORED)
        else:
            label = tl.load(labels_ptr + row)
        scored = label != IGNORED
        inside = (label >= 0) & (label < VOCAB)
        own = tl.load(start + label, mask=inside, other=0.0).to(tl.float32) * (scale * LOG2E)
        if VOCAB <= BLOCK:
            x = x.to(tl.float32) * (scale * LOG2E)
            top = tl.max(x, axis=0)
            powers = tl.exp2(x - top)
            total = tl.sum(powers, axis=0)
        else:
            # running maximum and sum of each lane; finite, so that lanes beyond the vocabulary stay 0
            tops = tl.full([BLOCK], -1e30, dtype=tl.float32)
            sums = tl.zeros([BLOCK], dtype=tl.float32)
            for left in range(0, VOCAB, BLOCK):
                here = left + column
                x = tl.load(start + here, mask=here < VOCAB, other=-float("inf")).to(tl.float32) * (scale * LOG2E)
                higher = tl.maximum(tops, x)
                sums = sums * tl.exp2(tops - higher) + tl.exp2(x - higher)
                tops = higher
            top = tl.max(tops, axis=0)
            total = tl.sum(sums * tl.exp2(tops - top), axis=0)
        if WRITE_NLL:
            nll = tl.where(inside, (top + tl.log2(total) - own) * LN2, float("nan"))
            tl.store(nll_ptr + row, tl.where(scored, nll, 0.0))
        if WRITE_GRADIENT:
            factor = scale
            if HAS_WEIGHT:
                factor = scale * tl.load(weight_ptr + row)
            share = factor / total
            tl.debug_barrier()  # every thread has read the row, its label's logit included
            if VOCAB <= BLOCK:
                gradient = tl.where(scored, powers * share, 0.0)
                tl.store(start + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < VOCAB)
            else:
                for left in range(0, VOCAB, BLOCK):
                    here = left + column
                    x = tl.load(start + here, mask=here < VOCAB, other=0.0).to(tl.float32) * (scale * LOG2E)
                    gradient = tl.where(scored, tl.exp2(x - top) * share, 0.0)
                    tl.store(start + here, gradient.to(logits_ptr.dtype.element_ty), mask=here < VOCAB)
            tl.debug_barrier()  # the label's own gradient replaces what the row's store put there
            gradient = tl.exp2(own - top) * share - factor
            tl.store(start + label, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


@launched_directly
@triton.jit  # specialised for a size of whole vectors, or the mask would make it read number by number
def scale_kernel(x_ptr, factor_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out = x * factor, factor one number in device memory."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < size, other=0.0).to(tl.float32)
    y = x * tl.load(factor_ptr).to(tl.float32)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=place < size)


def default_config(vocab: int, size: int) -> Config:
    """The configuration that runs for so many logits a row, each of `size` bytes."""
    whole = CONFIGS[0] if size == 2 else CONFIGS[1]
    return whole if vocab <= whole.max_block else CONFIGS[2]


def nll_of_logits(
    logits: Tensor,
    labels: Tensor,
    scale: float,
    nll: Tensor | None,
    *,
    gradient: bool,
    weight: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Losses of rows of logits under softmax(scale * logits), and their gradient.

    Args:
        logits: [n, V] contiguous; with `gradient` overwritten by weight * scale * (softmax - onehot), exactly 0 in
            rows without a label.
        labels: int64 [n] contiguous; -100 = no loss. Other labels outside of [0, V) give a loss of NaN.
        scale: factor of the logits.
        nll: fp32 [n], overwritten by the losses in nats; None = not wanted.
        gradient: overwrite the logits.
        weight: fp32 [n] contiguous, gradient of each loss; None = 1.
        config: one of CONFIGS; chosen by the vocabulary and the type if None.
    """
    rows, vocab = logits.shape
    config = config or default_config(vocab, logits.element_size())
    block = min(config.max_block, triton.next_power_of_2(vocab))
    num_warps = max(1, config.num_warps * block // config.max_block)
    resident = multiprocessors(logits.device) * _WARPS // num_warps
    nll_kernel[(min(rows, resident) if vocab <= block else rows,)](
        logits,
        labels,
        nll,
        weight,
        scale,
        rows,
        VOCAB=vocab,
        IGNORED=IGNORED,
        LOG2E=LOG2E,
        LN2=LN2,
        HAS_WEIGHT=weight is not None,
        WRITE_NLL=nll is not None,
        WRITE_GRADIENT=gradient,
        BLOCK=block,
        num_warps=num_warps,
        maxnreg=_REGISTERS,
    )


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor, the product rounded once.

    Args:
        x: any shape, contiguous.
        factor: one number, on x's device.
        dtype: of the result.

    Returns:
        Like x in `dtype`.
    """
    out = torch.empty_like(x, dtype=dtype)
    block = 4096
    scale_kernel[(triton.cdiv(x.numel(), block),)](x, factor, out, x.numel(), BLOCK=block, num_warps=4)
    return out
