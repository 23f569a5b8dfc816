"""Full attention over several ranks: rotary positions, ring attention, and the cache for the next call."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.kernels.context_parallel.messages import count
from longspan.kernels.context_parallel.ring import ring_attention
from longspan.kernels.context_parallel.shard import SequenceShard
from longspan.kernels.context_parallel.sight import document_start, sight
from longspan.kernels.rotary import rotate


def ring_layer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    cached_tokens: Tensor,
    *,
    reset: Tensor,
    shard: SequenceShard,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`full_attention` of a sequence of which each rank holds its share.

    Args:
        q, k, v: [B, T, H, Dh] of this rank's tokens, as projected.
        cached_keys, cached_values: [B, C-1, H, Dh], the tokens before the sequence, right-aligned, keys unrotated.
        cached_tokens: int64 [B], how many of them there are. All three are the same on all ranks.
        reset: bool [B, T] of this rank's tokens.
        shard: of this rank.

    Returns:
        out [B, T, H, Dh]; keys, values [B, C-1, H, Dh] and cached_tokens [B] after the whole sequence, without
        gradient, the same on all ranks.
    """
    tokens, lookback = q.shape[1], cached_keys.shape[1]
    seen = sight(reset, cached_tokens, lookback, shard)
    begin = seen.begin
    cache = rotate(cached_keys, -lookback) if seen.cached else cached_keys
    out = ring_attention(rotate(q, begin), rotate(k, begin), v, cache, cached_values, seen, shard)
    end = tokens * shard.size
    valid = (end - document_start(reset, cached_tokens, shard, shard.size)).clamp(max=lookback)
    keys, values = (_last(x, old, lookback, shard) for x, old in ((k, cached_keys), (v, cached_values)))
    return out, keys, values, valid


@torch.no_grad()
def _last(x: Tensor, before: Tensor, lookback: int, shard: SequenceShard) -> Tensor:
    """The last `lookback` tokens of [before; every rank's x]."""
    tail = x[:, -lookback:].contiguous() if lookback else x[:, :0].contiguous()
    parts = [torch.empty_like(tail) for _ in range(shard.size)]
    count("ring", tail, shard.size - 1)
    dist.all_gather(parts, tail, group=shard.group)
    full = torch.cat([before, *parts], dim=1)
    return full[:, full.shape[1] - lookback :].contiguous()
