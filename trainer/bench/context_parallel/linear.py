"""A linear-attention layer over ranks: the exchange of states against the layer's own time."""

from __future__ import annotations

import torch

from longspan.kernels.context_parallel.affine import scan_states
from longspan.kernels.context_parallel.shard import ONE_RANK, SequenceShard
from longspan.modeling.context_parallel import set_sequence_shard
from longspan.modeling.mixers.linear_attention import LinearAttention
from longspan.modeling.stack import Layer
from longspan.trainer.bench.contender import Work
from longspan.trainer.bench.context_parallel.rank import Rank
from longspan.trainer.bench.context_parallel.settings import ContextParallelSettings
from longspan.trainer.bench.floors import layer_costs
from longspan.trainer.bench.result import Ratio


def run(settings: ContextParallelSettings, rank: Rank) -> None:
    """At each length, forward and backward of one row: the layer alone, over all ranks, and the exchange by itself."""
    for tokens in settings.linear_tokens:
        rank.measure(_case(tokens, "each rank alone"), _layer(settings, rank, tokens, ONE_RANK))
        rank.clear()
        rank.measure(_case(tokens, f"{settings.nproc} ranks"), _layer(settings, rank, tokens, rank.shard))
        rank.clear()
        rank.measure(_case(tokens, "exchange of states"), _exchange(settings, rank, tokens))


def ratios(settings: ContextParallelSettings, ms: dict[str, float]) -> list[Ratio]:
    """Time of the exchange over that of the layer. Args: ms: of the cases that were measured."""
    found = []
    for tokens in settings.linear_tokens:
        exchange, layer = (ms.get(_case(tokens, what)) for what in ("exchange of states", "each rank alone"))
        if exchange is not None and layer is not None:
            what = f"linear layer, {tokens} tokens a rank: time of the exchange of states / of the layer"
            found.append(Ratio(what, exchange / layer))
    return found


def _case(tokens: int, what: str) -> str:
    return f"linear layer, {tokens} tokens a rank, {what}"


def _layer(settings: ContextParallelSettings, rank: Rank, tokens: int, shard: SequenceShard) -> Work:
    """The whole layer, its feed-forward network included."""
    torch.manual_seed(0)
    config = settings.linear_model
    with rank.device:
        layer = Layer(config, LinearAttention(config, settings.linear_layer, 1))
    layer.to(rank.dtype).train()
    set_sequence_shard(layer, shard)
    x, gradient = (torch.randn(1, tokens, config.dim, device=rank.device, dtype=rank.dtype) for _ in range(2))
    x.requires_grad_()
    state = layer.init_state(1, rank.device)
    reset = torch.zeros(1, tokens, dtype=torch.bool, device=rank.device)

    def call() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x, state, reset=reset)[0].backward(gradient)

    costs = layer_costs(config, settings.linear_layer, tokens, tokens, rank.dtype.itemsize)
    return Work(call, settings.nproc * tokens, costs)


def _exchange(settings: ContextParallelSettings, rank: Rank, tokens: int) -> Work:
    """What each share does to the state, to all ranks and combined, and the gradients back; the same at any length."""
    config = settings.linear_model
    shape = (1, config.num_heads, config.head_dim, config.head_dim + 1)  # the matrix, and the normaliser
    first, added, gradient = (torch.randn(shape, device=rank.device) for _ in range(3))
    added.requires_grad_()
    factor = torch.ones(1, 1, 1, 1, device=rank.device)

    def call() -> None:
        added.grad = None
        scan_states(first, factor, added, rank.shard).backward(gradient)

    return Work(call, settings.nproc * tokens, [])
