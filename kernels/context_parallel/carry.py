"""Hand-over of a block recurrence's state from rank to rank, and of its gradient the other way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.kernels.context_parallel.messages import count, once, receive, send
from longspan.kernels.context_parallel.shard import SequenceShard

StateGrad = Literal["full", "truncate"]
Run = Callable[[list[Tensor], slice], tuple[Tensor, list[Tensor]]]


def carry_state(
    first: Sequence[Tensor], run: Run, shard: SequenceShard, *, slices: int = 1, state_grad: StateGrad = "full"
) -> tuple[Tensor, list[Tensor]]:
    """Run a recurrence over this rank's share, from the state that the rank to the left ended with.

    Ranks work one after another; with the batch in M slices rank r starts as soon as the first slice has come, so R
    ranks take 1 + (R-1)/M times one rank's time. One message of the state to the right, with "full" another to the
    left in the backward.

    Args:
        first: tensors [B, ...] of the state before the whole sequence; the same on all ranks.
        run: (state of the rows, rows of the batch) -> (y [b, ...], state after this rank's share).
        shard: of this rank.
        slices: M, into which the batch is divided; at most B.
        state_grad: "full": exact; "truncate": no gradient crosses from rank to rank, so that the backward waits for
            nobody.

    Returns:
        y [B, ...], and the state after this rank's share; with more than one rank the latter is without gradient.
    """
    if shard.size == 1:
        return run(list(first), slice(0, first[0].shape[0]))
    outputs, lasts = [], []
    for rows in row_slices(first[0].shape[0], slices):
        anchor = torch.empty(0, device=first[0].device, requires_grad=torch.is_grad_enabled())
        given = _Receive.apply(anchor, shard, state_grad, *(tensor[rows] for tensor in first))
        y, last = run(list(given), rows)
        lasts.append([tensor.detach() for tensor in last])
        if shard.has(1):
            y = _Send.apply(y, shard, state_grad, *(last if state_grad == "full" else lasts[-1]))
        outputs.append(y)
    return torch.cat(outputs), [torch.cat(parts) for parts in zip(*lasts, strict=True)]


def row_slices(rows: int, slices: int) -> list[slice]:
    """The slices of a batch of `rows` that `carry_state` hands on, as equal as can be, at most one a row."""
    number = min(slices, rows)
    return [slice(start, stop) for start, stop in pairwise(rows * index // number for index in range(number + 1))]


class _Receive(torch.autograd.Function):
    """The state from the left; its gradient goes back there. `anchor` has the backward called on every rank."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, shard: SequenceShard, state_grad: StateGrad, *first: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.shard, ctx.state_grad, ctx.count = shard, state_grad, len(first)
        if shard.has(-1):
            empty = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in first)
            return tuple(once(lambda: [receive(buffer, shard, -1) for buffer in empty]))
        return tuple(tensor.clone() for tensor in first)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.shard.has(-1):
            return None, None, None, *grads
        if ctx.state_grad == "full":
            for grad in grads:
                send("carry", grad.contiguous(), ctx.shard, -1)
        return (None,) * (3 + ctx.count)


class _Send(torch.autograd.Function):
    """Hand the state to the right; gives `y` back, so that the backward comes here and fetches the state's gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, shard: SequenceShard, state_grad: StateGrad, *state: Tensor) -> Tensor:
        ctx.shard, ctx.state_grad = shard, state_grad
        ctx.likes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in state]

        def hand_on() -> list[Tensor]:
            for tensor in state:
                send("carry", tensor.contiguous(), shard, 1)
            return []

        once(hand_on)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.state_grad == "truncate":
            return grad, None, None, *([None] * len(ctx.likes))
        buffers = (torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.likes)
        return grad, None, None, *(receive(buffer, ctx.shard, 1) for buffer in buffers)


def share_last(tensors: Sequence[Tensor], shard: SequenceShard) -> list[Tensor]:
    """Each tensor as the last rank has it, on all ranks, without gradient: the state that the next step begins with.

    Args:
        tensors: of the same shapes and types on all ranks.
        shard: of this rank.
    """
    result = [tensor.detach() for tensor in tensors]
    if shard.size == 1:
        return result
    source = dist.get_global_rank(shard.group, shard.size - 1)
    result = [tensor.clone(memory_format=torch.contiguous_format) for tensor in result]
    for tensor in result:
        if shard.is_last:
            count("share_last", tensor)
        dist.broadcast(tensor, source, group=shard.group)
    return result
