"""Embedding and output layer of which each rank holds a part of the vocabulary; whole logits exist nowhere in training.

Softmax over divided logits needs each token's largest logit, its sum of exponentials and its label's logit: one maximum
and one sum over the ranks for all tokens of a call, in fp32 (the way of Megatron-LM, arXiv:1909.08053).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.kernels.context_parallel.messages import count
from longspan.kernels.cross_entropy.api import scaled_logits, token_nll
from longspan.kernels.embedding.api import embed
from longspan.kernels.products import product_into
from longspan.kernels.tensor_parallel.collectives import enter, gather_same, leave, summed
from longspan.kernels.tensor_parallel.shard import TensorShard

MAX_CHUNK_LOGITS = 2**26  # logits of a rank that exist at the same time: 256 MiB in fp32
_NO_LABEL = -100


def vocabulary_embed(tokens: Tensor, part: Tensor, shard: TensorShard) -> Tensor:
    """The row of each token.

    Args:
        tokens: int64 [...], the same on all ranks, each in [0, V).
        part: [V/R, D], this rank's rows.
        shard: of this rank.

    Returns:
        [..., D], the embedding's type, the same on all ranks.
    """
    if shard.size == 1:
        return embed(tokens, part)
    rows = part.shape[0]
    local = tokens - shard.rank * rows
    mine = (local >= 0) & (local < rows)
    # another rank's token takes some row and a gradient of 0; one that is no rank's keeps an index that is refused
    known = (tokens >= 0) & (tokens < rows * shard.size)
    found = embed(torch.where(known, local.remainder(rows), local), part)
    return leave(found.masked_fill(~mine.unsqueeze(-1), 0.0), shard)


def vocabulary_logits(hidden: Tensor, part: Tensor, shard: TensorShard) -> Tensor:
    """y E^T / sqrt(D) in fp32 or more, whole on every rank: for sampling, not for training.

    Args:
        hidden: [..., D], the same on all ranks.
        part: [V/R, D], this rank's rows. shard: of this rank.

    Returns:
        [..., V].
    """
    return gather_same(scaled_logits(enter(hidden, shard), part), -1, shard)


def vocabulary_nll(hidden: Tensor, part: Tensor, labels: Tensor, shard: TensorShard) -> Tensor:
    """Negative log-likelihood of each label under softmax(y E^T / sqrt(D)), in nats.

    Logits are made a chunk of tokens at a time, and again in the backward pass.

    Args:
        hidden: [B, T, D], the same on all ranks.
        part: [V/R, D], this rank's rows.
        labels: int64 [B, T]; -100 = no loss. The same on all ranks.
        shard: of this rank.

    Returns:
        [B, T] fp32 (fp64 for fp64 input), the same on all ranks: 0 where the label is -100, NaN where it is none.
    """
    if shard.size == 1:
        return token_nll(hidden, part, labels)
    return _DividedNll.apply(hidden.flatten(0, -2), part, labels.flatten(), shard).view_as(labels)


class _Labels:
    """The labels of a call as this rank sees them."""

    def __init__(self, labels: Tensor, rows: int, shard: TensorShard) -> None:
        local = labels - shard.rank * rows
        self.mine = (local >= 0) & (local < rows)
        self.column = local.clamp(0, rows - 1).unsqueeze(1)  # [N, 1]
        self.counted = labels != _NO_LABEL
        self.known = (labels >= 0) & (labels < rows * shard.size)


def _chunks(tokens: int, rows: int) -> list[slice]:
    size = max(1, MAX_CHUNK_LOGITS // rows)
    return [slice(start, start + size) for start in range(0, tokens, size)]


class _DividedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, part: Tensor, labels: Tensor, shard: TensorShard) -> Tensor:
        seen = _Labels(labels, part.shape[0], shard)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        largest, total, chosen = hidden.new_empty(3, hidden.shape[0], dtype=wide)
        for rows in _chunks(hidden.shape[0], part.shape[0]):
            logits = scaled_logits(hidden[rows], part)
            torch.amax(logits, dim=1, out=largest[rows])
            chosen[rows] = logits.gather(1, seen.column[rows]).squeeze(1)
            torch.sum(logits.sub_(largest[rows, None]).exp_(), dim=1, out=total[rows])
        top = largest.clone()
        count("tensor_sum", top)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
        total, chosen = summed(torch.stack([total * (largest - top).exp(), chosen * seen.mine]), shard)
        log_sum = total.log_().add_(top)
        ctx.shard = shard
        ctx.save_for_backward(hidden, part, labels, log_sum)
        return (log_sum - chosen).masked_fill(~seen.known, torch.nan).masked_fill(~seen.counted, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, part, labels, log_sum = ctx.saved_tensors
        seen = _Labels(labels, part.shape[0], ctx.shard)
        weight = (grad.to(log_sum.dtype) * part.shape[1] ** -0.5).masked_fill(~seen.counted, 0.0)
        d_hidden = torch.empty_like(hidden)
        chunks = _chunks(hidden.shape[0], part.shape[0])
        # 16-bit sums over many chunks would lose what single chunks add
        wide = torch.promote_types(part.dtype, torch.float32) if len(chunks) > 1 else part.dtype
        d_part = torch.zeros_like(part, dtype=wide)
        for index, rows in enumerate(chunks):
            share = scaled_logits(hidden[rows], part).sub_(log_sum[rows, None]).exp_()
            share.scatter_add_(1, seen.column[rows], -seen.mine[rows, None].to(share.dtype))
            share = share.mul_(weight[rows, None]).to(part.dtype)
            torch.mm(share, part, out=d_hidden[rows])
            product_into(d_part, share.t(), hidden[rows], add=index > 0)
        return summed(d_hidden, ctx.shard), d_part.to(part.dtype), None, None
