"""Attention to exactly the last W tokens with a Transformer-XL cache (the ordinary layer of arXiv:2203.07852)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longspan.kernels.context_parallel.halo import window_cache
from longspan.kernels.context_parallel.shard import ONE_RANK, SequenceShard
from longspan.kernels.window_attention.api import window_attention
from longspan.kernels.window_attention.reference import NUM_BUCKETS
from longspan.modeling.basic import Dense, head_dropout_mask
from longspan.modeling.config import ModelConfig, SlidingWindowConfig
from longspan.modeling.initialisation import normal_parameter
from longspan.modeling.protocol import Aux, StatefulModule
from longspan.modeling.state import SpecTree, State, StateSpec


class SlidingWindow(StatefulModule):
    """Strict window attention; state: normalised keys and values of the last W tokens."""

    quantum = 1
    dependency = "parallel"
    adds_residual = True
    shard: SequenceShard = ONE_RANK

    def __init__(self, model: ModelConfig, layer: SlidingWindowConfig, reset_grid: int) -> None:
        """Args: model, layer: configuration; reset_grid: documents start on multiples of so many tokens only."""
        super().__init__()
        self.window = self.lookback = model.window_tokens
        self.heads, self.head_dim = model.num_heads, model.head_dim
        self.reset_grid = reset_grid
        self.dropout = model.dropout
        width = model.num_heads * model.head_dim
        self.query = Dense(model.dim, width)
        self.key = Dense(model.dim, width)
        self.value = Dense(model.dim, width)
        self.output = Dense(width, model.dim)
        self.scale = nn.Parameter(torch.ones(model.num_heads))
        self.positions = layer.positions
        if layer.positions == "t5":
            self.position_table = normal_parameter(model.num_heads, NUM_BUCKETS, std=NUM_BUCKETS**-0.5)

    def state_spec(self) -> SpecTree:
        """keys, values [W, H, Dh] in the compute dtype."""
        spec = StateSpec((self.window, self.heads, self.head_dim), self.key.weight.dtype, "cache", head_axis=2)
        return {"keys": spec, "values": spec}

    def forward(
        self, x: Tensor, state: State, *, reset: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, State, Aux]:
        """x [B, T, D], reset bool [B, T] -> y [B, T, D], new state, no auxiliary loss.

        residual: see `Dense`.
        """
        out, new_state = self.attend(x, state, reset)
        return self.output(out.flatten(2), residual), new_state, {}

    def attend(self, x: Tensor, state: State, reset: Tensor) -> tuple[Tensor, State]:
        """What the window gives in front of the output projection, [B, T, H, Dh], and the new state."""
        weight = torch.cat([self.query.weight, self.key.weight, self.value.weight])
        qkv = F.linear(x, weight).unflatten(-1, (3, self.heads, -1))
        drop = None
        if self.training and self.dropout > 0:
            drop = head_dropout_mask(self.heads, self.window, self.dropout, x, self.tensor_shard)
        out, keys, values = window_attention(
            *window_cache(qkv, state["keys"], state["values"], reset, self.shard),
            self.position_table if self.positions == "t5" else None,
            self.scale,
            reset=reset,
            reset_grid=self.reset_grid,
            drop=drop,
            positions=self.positions,
        )
        return out, {"keys": keys, "values": values}
