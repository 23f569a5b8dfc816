"""What goes over the ranks at the edges of a divided layer, each with its counterpart in the backward pass.

A divided layer begins with `enter` and ends with `leave` (f and g of arXiv:1909.08053): between them every rank has its
heads or hidden units alone. Bytes are counted as "tensor_sum" (what is summed: a ring sends 2 (R-1)/R of it) and
"tensor_gather" (what this rank sends to the R-1 others).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.kernels.context_parallel.messages import count
from longspan.kernels.tensor_parallel.shard import TensorShard


def summed(x: Tensor, shard: TensorShard) -> Tensor:
    """A new tensor: the sum of `x` over the ranks, without gradient, equal to the last bit on all of them."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    if shard.size > 1:
        count("tensor_sum", total)
        dist.all_reduce(total, group=shard.group)
    return total


def gathered(x: Tensor, dim: int, shard: TensorShard) -> Tensor:
    """Every rank's `x`, of equal shapes, side by side along `dim`; without gradient."""
    if shard.size == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(shard.size)]
    count("tensor_gather", x, shard.size - 1)
    dist.all_gather(parts, x.detach().contiguous(), group=shard.group)
    return torch.cat(parts, dim=dim)


def enter(x: Tensor, shard: TensorShard) -> Tensor:
    """`x`, the same on all ranks, into a divided layer: each rank's gradient is a part of the whole, and is summed."""
    return x if shard.size == 1 else _Enter.apply(x, shard)


def leave(x: Tensor, shard: TensorShard) -> Tensor:
    """The sum of what the ranks' parts of a layer give: the same on all ranks, and so is its gradient."""
    return x if shard.size == 1 else _Leave.apply(x, shard)


def gather_parts(x: Tensor, dim: int, shard: TensorShard) -> Tensor:
    """Every rank's `x` side by side along `dim`, for use by each rank in a way of its own: gradients are summed."""
    return x if shard.size == 1 else _GatherParts.apply(x, dim % x.dim(), shard)


def gather_same(x: Tensor, dim: int, shard: TensorShard) -> Tensor:
    """Every rank's `x` side by side along `dim`, for use by all ranks alike: the gradient is the own part of it."""
    return x if shard.size == 1 else _GatherSame.apply(x, dim % x.dim(), shard)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: TensorShard) -> Tensor:
        ctx.shard = shard
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return summed(grad, ctx.shard), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: TensorShard) -> Tensor:
        return summed(x, shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, shard: TensorShard) -> Tensor:
        ctx.dim, ctx.shard = dim, shard
        return gathered(x, dim, shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        shard = ctx.shard
        parts = [part.contiguous() for part in grad.chunk(shard.size, dim=ctx.dim)]
        own = torch.empty_like(parts[shard.rank])
        count("tensor_gather", own, shard.size - 1)
        dist.reduce_scatter(own, parts, group=shard.group)
        return own, None, None


class _GatherSame(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, shard: TensorShard) -> Tensor:
        ctx.dim, ctx.shard = dim, shard
        return gathered(x, dim, shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.chunk(ctx.shard.size, dim=ctx.dim)[ctx.shard.rank].contiguous(), None, None
