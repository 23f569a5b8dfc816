"""Attention to exactly the last W tokens with a Transformer-XL cache (the ordinary layer of arXiv:2203.07852)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longspan.kernels.window_attention.api import window_attention
from longspan.kernels.window_attention.reference import NUM_BUCKETS
from longspan.modeling.basic import Dense, dropout_mask
from longspan.modeling.config import ModelConfig, SlidingWindowConfig
from longspan.modeling.initialisation import normal_parameter
from longspan.modeling.protocol import Aux, StatefulModule
from longspan.modeling.state import SpecTree, State, StateSpec


class SlidingWindow(StatefulModule):
    """Strict window attention; state: normalised keys and values of the last W tokens."""

    quantum = 1
    dependency = "parallel"

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
        self.position_table = normal_parameter(model.num_heads, NUM_BUCKETS, std=NUM_BUCKETS**-0.5)

    def state_spec(self) -> SpecTree:
        """keys, values [W, H, Dh] in the compute dtype."""
        spec = StateSpec((self.window, self.heads, self.head_dim), self.key.weight.dtype, "cache", head_axis=2)
        return {"keys": spec, "values": spec}

    def forward(self, x: Tensor, state: State, *, reset: Tensor) -> tuple[Tensor, State, Aux]:
        """x [B, T, D], reset bool [B, T] -> y [B, T, D], new state, no auxiliary loss."""
        q, k, v = (dense(x).unflatten(-1, (self.heads, -1)) for dense in (self.query, self.key, self.value))
        drop = None
        if self.training and self.dropout > 0:
            drop = dropout_mask((self.heads, self.window, 2 * self.window), self.dropout, x)
        out, keys, values = window_attention(
            q,
            k,
            v,
            state["keys"],
            state["values"],
            self.position_table,
            self.scale,
            reset=reset,
            reset_grid=self.reset_grid,
            drop=drop,
        )
        return self.output(out.flatten(2)), {"keys": keys, "values": values}, {}
