"""What each token of a rank's share may look at: its own document, so many tokens back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.kernels.context_parallel.shard import SequenceShard


@dataclass(frozen=True)
class Sight:
    """What the queries of this rank may look at.

    Attributes:
        low: int64 [B, T], the first position that each query sees; positions count from the sequence's first token.
        begin: position of this rank's first token. lookback: C - 1.
        whole: every query of this rank sees the sequence from its first token on; neither a document start nor the
            look-back cuts a block.
        cached: some query sees tokens from before the sequence.
    """

    low: Tensor
    begin: int
    lookback: int
    whole: bool
    cached: bool


def sight(reset: Tensor, cached_tokens: Tensor, lookback: int, shard: SequenceShard) -> Sight:
    """Work out what each token may see: its own document only, at most `lookback` tokens before it.

    Args:
        reset: bool [B, T] of this rank's share, a document starts with this token.
        cached_tokens: int64 [B], tokens of the carried document before the sequence that are cached.
        lookback: tokens before itself that a token may see.
        shard: of this rank.
    """
    tokens = reset.shape[1]
    begin = shard.rank * tokens
    place = torch.arange(begin, begin + tokens, device=reset.device)
    own = torch.where(reset, place, -1).cummax(dim=1).values
    carried = document_start(reset, cached_tokens, shard, shard.rank)
    low = torch.maximum(torch.where(own >= 0, own, carried[:, None]), place - lookback)
    # one look at the values: the same kernels for all rows are worth a synchronisation
    whole = bool((low <= 0).all()) and lookback >= begin + tokens - 1
    return Sight(low, begin, lookback, whole, cached=bool((low < 0).any()))


def document_start(reset: Tensor, cached_tokens: Tensor, shard: SequenceShard, rank: int) -> Tensor:
    """Where the document began that goes on at the start of the share of `rank` (the number of ranks: at the end).

    Args:
        reset: bool [B, T] of this rank's share. cached_tokens: int64 [B].
        shard: of this rank; all ranks must call this together.
        rank: whose share.

    Returns:
        int64 [B], a position in the sequence; minus the cached tokens if it began before the sequence.
    """
    tokens = reset.shape[1]
    place = torch.arange(shard.rank * tokens, (shard.rank + 1) * tokens, device=reset.device)
    last = torch.where(reset, place, -1).amax(dim=1)
    every = [last]
    if shard.size > 1:
        every = [torch.empty_like(last) for _ in range(shard.size)]
        dist.all_gather(every, last, group=shard.group)
    start = -cached_tokens
    for position in every[:rank]:
        start = torch.where(position >= 0, position, start)
    return start
