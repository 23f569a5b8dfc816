"""Ring attention: causal attention over a sequence that several ranks hold, block by block of another rank's keys.

Partial results are merged in fp32 through their log-sum-exp; a rank's keys and values go straight from their owner to
the ranks that may look at them, one block ahead of the computation. Gradients of keys and values go back the same
way. Look-back limits cut the passes: a layer that sees C tokens back takes ceil((C - 1) / T) of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.kernels.context_parallel import ring_blocks
from longspan.kernels.context_parallel.messages import Exchange
from longspan.kernels.context_parallel.shard import SequenceShard
from longspan.kernels.context_parallel.sight import Sight


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, cached_keys: Tensor, cached_values: Tensor, seen: Sight, shard: SequenceShard
) -> Tensor:
    """Causal softmax attention, each token to itself and what `seen` allows before it.

    Args:
        q, k, v: [B, T, H, Dh] of this rank's tokens; queries and keys rotated by their position in the sequence.
        cached_keys, cached_values: [B, C-1, H, Dh] before the sequence, right-aligned, keys rotated; the same on all
            ranks.
        seen: of this rank, from `sight`.
        shard: of this rank.

    Returns:
        [B, T, H, Dh] in q's dtype.
    """
    out: Tensor = _Ring.apply(q, k, v, cached_keys, cached_values, seen, shard)
    return out


def _hops(tokens: int, lookback: int, shard: SequenceShard) -> int:
    """Ranks to the left that a rank in the middle looks at."""
    return min(shard.size - 1, -(-lookback // tokens))


class _Fetch:
    """Keys and values of the rank `hop` places to the left, under way."""

    def __init__(self, kv: Tensor, hop: int, shard: SequenceShard) -> None:
        self.kv = torch.empty_like(kv) if shard.has(-hop) else None
        sends = [(kv, hop)] if shard.has(hop) else []
        receives = [(self.kv, -hop)] if self.kv is not None else []
        self._exchange = Exchange("ring", shard, sends, receives)

    def wait(self) -> Tensor | None:
        self._exchange.wait()
        return self.kv


def _blocks(ctx_kv: Tensor, hops: int, shard: SequenceShard) -> Any:
    """(hop, keys and values) of each block to the left, the next one under way while the caller computes."""
    fetch = _Fetch(ctx_kv, 1, shard) if hops else None
    yield 0, ctx_kv
    for hop in range(1, hops + 1):
        assert fetch is not None
        block = fetch.wait()
        fetch = _Fetch(ctx_kv, hop + 1, shard) if hop < hops else None
        yield hop, block


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, seen: Sight, shard: SequenceShard
    ) -> Tensor:
        tokens = q.shape[1]
        kv = torch.stack([k, v])
        hops = _hops(tokens, seen.lookback, shard)
        total = ring_blocks.Total()
        for hop, block in _blocks(kv, hops, shard):
            if block is not None:
                total.add(ring_blocks.attend(q, block[0], block[1], seen, seen.begin - hop * tokens, own=hop == 0))
        reach = min(keys.shape[1], max(0, seen.lookback - seen.begin)) if seen.cached else 0  # the cache's last tokens
        if reach:
            cache = keys[:, -reach:], values[:, -reach:]
            total.add(ring_blocks.attend(q, *cache, seen, -reach, own=False, cut=True))
        out = total.out.to(q.dtype)
        ctx.seen, ctx.shard, ctx.hops, ctx.reach = seen, shard, hops, reach
        ctx.save_for_backward(q, kv, keys, values, out, total.lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, kv, keys, values, out, lse = ctx.saved_tensors
        seen, shard, tokens = ctx.seen, ctx.shard, q.shape[1]
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        dkv = torch.zeros(kv.shape, dtype=wide, device=q.device)
        back: list[tuple[Exchange, Tensor | None]] = []
        known = ring_blocks.Known(q, out, lse, grad.contiguous())
        for hop, block in _blocks(kv, ctx.hops, shard):
            part: Tensor | None = None
            if block is not None:
                d, part = ring_blocks.gradients(known, block, seen, seen.begin - hop * tokens, own=hop == 0)
                dq += d
            if part is not None and hop == 0:
                dkv += part
            if hop == 0:
                continue
            # partial sums travel in fp32: rounding them would let the error grow with the number of ranks
            returned = torch.empty_like(dkv) if shard.has(hop) else None
            sends = [(part.to(wide).contiguous(), -hop)] if part is not None else []
            receives = [(returned, hop)] if returned is not None else []
            back.append((Exchange("ring", shard, sends, receives), returned))
        dcache: list[Tensor | None] = [None, None]
        if ctx.reach:
            cache = torch.stack([keys[:, -ctx.reach :], values[:, -ctx.reach :]])
            d, part = ring_blocks.gradients(known, cache, seen, -ctx.reach, own=False, cut=True)
            dq += d
            dcache = [torch.cat([torch.zeros_like(keys[:, ctx.reach :]), p.to(keys.dtype)], 1) for p in part]
        for exchange, returned in back:
            exchange.wait()
            if returned is not None:
                dkv += returned
        dk, dv = dkv.to(kv.dtype)
        return dq.to(q.dtype), dk, dv, *dcache, None, None
