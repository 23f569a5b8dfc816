"""The gradient of an embedding in Triton: tokens are sorted, and each row of the matrix sums up its own.

Where rows are few, as those of bytes, each has hundreds of tokens, and a space one in six of all: then several
programs share a row, and their sums are added in a fixed order.
"""

# mypy: allow-untyped-defs
# arguments of kernels are pointers, numbers and constants of the compiler's own types

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from longspan.kernels.direct_launches import launched_directly

BLOCK_COLUMNS = 1024
AT_ONCE = 4  # tokens of one row that are read at once
TOKENS_A_SHARE = 16  # of an average row; frequent ones have many more
MOST_SHARES = 64


@launched_directly
@triton.jit
def embedding_gradient_kernel(
    gradient, order, ends, out, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr, SHARES: tl.constexpr
):
    """out [SHARES, V, WIDTH] = sums of gradient [N, WIDTH] over the shares of each row's tokens.

    Args:
        order: int64 [N], tokens in the order of their rows; ends: int64 [V], where those of each row end.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    share = tl.program_id(2)
    begin = tl.load(ends + row - 1, mask=row > 0, other=0)
    end = tl.load(ends + row)
    length = tl.cdiv(end - begin, SHARES)
    begin += share * length
    end = tl.minimum(begin + length, end)
    total = tl.zeros([AT_ONCE, COLUMNS], tl.float32)
    for at in range(begin, end, AT_ONCE):
        place = at + tl.arange(0, AT_ONCE)
        token = tl.load(order + place, mask=place < end, other=0)
        mask = (place < end)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(gradient + token[:, None] * WIDTH + column[None, :], mask=mask, other=0.0).to(tl.float32)
    out += (share.to(tl.int64) * tl.num_programs(0) + row) * WIDTH
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < WIDTH)


def shares_of(tokens: int, rows: int) -> int:
    """Programs for each of `rows` rows: one where an average row has few tokens."""
    return min(MOST_SHARES, triton.next_power_of_2(max(1, tokens // (rows * TOKENS_A_SHARE))))


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, embedding: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape = embedding.shape
        return F.embedding(tokens, embedding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        rows, width = ctx.shape
        gradient = gradient.contiguous()
        found, order = tokens.flatten().sort(stable=True)
        ends = torch.searchsorted(found, torch.arange(rows, device=tokens.device), right=True)
        shares = shares_of(tokens.numel(), rows)
        out = gradient.new_empty(shares, rows, width, dtype=gradient.dtype if shares == 1 else torch.float32)
        columns = min(BLOCK_COLUMNS, triton.next_power_of_2(width))
        embedding_gradient_kernel[(rows, triton.cdiv(width, columns), shares)](
            gradient, order, ends, out, WIDTH=width, COLUMNS=columns, AT_ONCE=AT_ONCE, SHARES=shares, num_warps=4
        )
        return None, out[0] if shares == 1 else out.sum(0).to(gradient.dtype)


def fused_embed(tokens: Tensor, embedding: Tensor) -> Tensor:
    """`api.embed` with its gradient.

    Args:
        tokens: int64 [...], at least one.
        embedding: [V, D], bf16, fp16 or fp32.

    Returns:
        [..., D].
    """
    return _Embed.apply(tokens, embedding)
