"""Ring attention against the same computation with nothing sent."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from torch import Tensor

from longspan.kernels.context_parallel import ring
from longspan.kernels.context_parallel.shard import SequenceShard
from longspan.kernels.context_parallel.sight import sight
from longspan.trainer.bench.contender import Work
from longspan.trainer.bench.context_parallel.rank import Rank
from longspan.trainer.bench.context_parallel.settings import ContextParallelSettings
from longspan.trainer.bench.floors import window_costs
from longspan.trainer.bench.result import Ratio


def run(settings: ContextParallelSettings, rank: Rank) -> None:
    """Forward and backward of one row, each token to all before it: over the ranks, then each rank for itself."""
    rank.measure(_over_ranks(settings), _work(settings, rank, sends=True))
    rank.clear()
    rank.measure(_nothing_sent(settings), _work(settings, rank, sends=False))


def ratios(settings: ContextParallelSettings, ms: dict[str, float]) -> list[Ratio]:
    """Time over that of the computation alone. Args: ms: of the cases that were measured."""
    over_ranks, alone = (ms.get(case) for case in (_over_ranks(settings), _nothing_sent(settings)))
    if over_ranks is None or alone is None:
        return []
    return [Ratio("ring attention: time / of the same computation with nothing sent", over_ranks / alone)]


def _over_ranks(settings: ContextParallelSettings) -> str:
    return f"ring attention, {settings.nproc} x {settings.ring_tokens}"


def _nothing_sent(settings: ContextParallelSettings) -> str:
    return f"{_over_ranks(settings)}, nothing sent"


class _OwnBlock:
    """Stands for a block of another rank: this rank's own keys and values, at once."""

    def __init__(self, kv: Tensor, hop: int, shard: SequenceShard) -> None:
        self.kv = kv if shard.has(-hop) else None

    def wait(self) -> Tensor | None:
        return self.kv


class _NoExchange:
    """Stands for messages: what should come is whatever lies in memory, which takes as long to add."""

    def __init__(self, *of_an_exchange: object) -> None:
        pass

    def wait(self) -> None:
        pass


def _silent() -> contextlib.AbstractContextManager[object]:
    """Ring attention sends nothing and computes all else, on as many blocks.

    Its two names for messages are replaced, and an error if there are no such: an argument for it would be a way to
    wrong results in the kernel.
    """
    return mock.patch.multiple(ring, _Fetch=_OwnBlock, Exchange=_NoExchange)


def _work(settings: ContextParallelSettings, rank: Rank, *, sends: bool) -> Work:
    torch.manual_seed(rank.shard.rank)
    tokens, heads, width, ranks = settings.ring_tokens, settings.ring_heads, settings.ring_head_dim, settings.nproc
    q, k, v, gradient = (torch.randn(1, tokens, heads, width, device=rank.device, dtype=rank.dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    reset = torch.zeros(1, tokens, dtype=torch.bool, device=rank.device)
    no_tokens = torch.zeros(1, dtype=torch.int64, device=rank.device)
    seen = sight(reset, no_tokens, ranks * tokens - 1, rank.shard)
    cache = gradient[:, :0]

    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        with contextlib.nullcontext() if sends else _silent():
            out = ring.ring_attention(q, k, v, cache, cache, seen, rank.shard)
            out.backward(gradient)

    visible = (ranks - 1) * tokens + tokens // 2  # of a token of the last rank
    costs = window_costs(1, tokens, visible, heads * width, rank.dtype.itemsize, backward=True)
    return Work(call, ranks * tokens, costs)
