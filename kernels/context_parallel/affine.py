"""Scan of affine states over ranks: every rank's summary to every rank at once, merged locally."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.kernels.context_parallel.messages import count, once
from longspan.kernels.context_parallel.shard import SequenceShard


def scan_states(first: Tensor, factor: Tensor, added: Tensor, shard: SequenceShard) -> Tensor:
    """The state that this rank's share begins with, where each share maps a state s to factor * s + added.

    s_0 = first, s_{r+1} = factor_r s_r + added_r. No rank waits for another's scan: one all-gather of `factor` and
    `added` in the forward, one of the state's gradient in the backward (as fla's `ops/cp` does for its summaries).

    Args:
        first: [B, ...], fp32 or more, state before the whole sequence; the same on all ranks.
        factor: of `added`'s type, [B, ...] broadcastable to it, of this rank's share.
        added: [B, ...], what this rank's share adds.
        shard: of this rank.

    Returns:
        [B, ...], with gradient to every rank's factor and added; the gradient of `first` is whole on rank 0 and zero
        elsewhere.
    """
    if shard.size == 1:
        return first
    return _ScanStates.apply(first, factor, added, shard)


class _ScanStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, factor: Tensor, added: Tensor, shard: SequenceShard) -> Tensor:
        parts = once(lambda: [*_gather(factor, shard), *_gather(added, shard)])
        factors, sums = parts[: shard.size], parts[shard.size :]
        state = first.clone()
        for rank in range(shard.rank):
            state = factors[rank] * state + sums[rank]
        ctx.shard = shard
        ctx.save_for_backward(state, *factors)
        return state

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        state, *factors = ctx.saved_tensors
        shard = ctx.shard
        grads = _gather(grad, shard)
        after = torch.zeros_like(grad)  # gradient of the state after rank's share
        for rank in reversed(range(shard.rank + 1, shard.size)):
            after = grads[rank] + factors[rank] * after
        dfactor = (after * state).sum_to_size(factors[shard.rank].shape)
        dfirst = grads[0] + factors[0] * after if shard.rank == 0 else torch.zeros_like(grad)
        return dfirst, dfactor, after, None


def _gather(x: Tensor, shard: SequenceShard) -> list[Tensor]:
    """Every rank's `x`, in order of rank."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(shard.size)]
    count("scan", x, shard.size - 1)
    dist.all_gather(parts, x.contiguous(), group=shard.group)
    return parts
