"""Causal attention with rotary positions to the last C tokens of the document."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.errors import UsageError
from longspan.kernels.context_parallel.ring_layer import ring_layer
from longspan.kernels.context_parallel.shard import ONE_RANK, SequenceShard
from longspan.kernels.full_attention.api import full_attention
from longspan.modeling.basic import Dense
from longspan.modeling.config import FullAttentionConfig, ModelConfig
from longspan.modeling.protocol import Aux, StatefulModule
from longspan.modeling.state import SpecTree, State, StateSpec


class FullAttention(StatefulModule):
    """State: keys (unrotated) and values of the C - 1 tokens before, and how many of them the document has."""

    quantum = 1
    dependency = "parallel"
    shard: SequenceShard = ONE_RANK

    def __init__(self, model: ModelConfig, layer: FullAttentionConfig, reset_grid: int) -> None:
        """Args: model, layer: configuration; reset_grid: unused, documents may start anywhere."""
        super().__init__()
        self.heads, self.head_dim, self.dropout = model.num_heads, model.head_dim, model.dropout
        self.lookback = layer.context_tokens - 1
        width = model.num_heads * model.head_dim
        self.query = Dense(model.dim, width)
        self.key = Dense(model.dim, width)
        self.value = Dense(model.dim, width)
        self.output = Dense(width, model.dim)

    def state_spec(self) -> SpecTree:
        """keys, values [C-1, H, Dh] in the compute dtype; tokens: int64, how many of them are valid."""
        spec = StateSpec((self.lookback, self.heads, self.head_dim), self.key.weight.dtype, "cache", head_axis=2)
        return {"keys": spec, "values": spec, "tokens": StateSpec((), torch.int64, "cache")}

    def forward(self, x: Tensor, state: State, *, reset: Tensor) -> tuple[Tensor, State, Aux]:
        """x [B, T, D], reset bool [B, T] -> y [B, T, D], new state, no auxiliary loss.

        Raises:
            UsageError: dropout, and several ranks hold the sequence or the heads.
        """
        q, k, v = (dense(x).unflatten(-1, (self.heads, -1)) for dense in (self.query, self.key, self.value))
        before = state["keys"], state["values"], state["tokens"]
        dropout = self.dropout if self.training else 0.0
        if dropout > 0 and max(self.shard.size, self.tensor_shard.size) > 1:
            raise UsageError("full attention over several ranks has no dropout. Set model.dropout=0.")
        if self.shard.size == 1:
            y, keys, values, tokens = full_attention(q, k, v, *before, reset=reset, dropout=dropout)
        else:
            y, keys, values, tokens = ring_layer(q, k, v, *before, reset=reset, shard=self.shard)
        return self.output(y.flatten(2)), {"keys": keys, "values": values, "tokens": tokens}, {}
