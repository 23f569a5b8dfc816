"""Linear attention (arXiv:2006.16236): a matrix state of constant size, no window, no positions."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.context_parallel.affine import scan_states
from longspan.kernels.context_parallel.shard import ONE_RANK, SequenceShard
from longspan.kernels.linear_attention.api import linear_attention
from longspan.kernels.linear_attention.reference import summary
from longspan.modeling.basic import Dense
from longspan.modeling.config import LinearAttentionConfig, ModelConfig
from longspan.modeling.protocol import Aux, StatefulModule
from longspan.modeling.state import SpecTree, State, StateSpec


class LinearAttention(StatefulModule):
    """State: the matrix S and the normaliser z of each head, fp32."""

    quantum = 1
    lookback = 0
    dependency = "affine_scan"
    shard: SequenceShard = ONE_RANK

    def __init__(self, model: ModelConfig, layer: LinearAttentionConfig, reset_grid: int) -> None:
        """Args: model, layer: configuration; reset_grid: unused, documents may start anywhere."""
        super().__init__()
        self.heads, self.head_dim = model.num_heads, model.head_dim
        width = model.num_heads * model.head_dim
        self.query = Dense(model.dim, width)
        self.key = Dense(model.dim, width)
        self.value = Dense(model.dim, width)
        self.output = Dense(width, model.dim)

    def state_spec(self) -> SpecTree:
        """matrix [H, Dh, Dh] and normaliser [H, Dh], fp32."""
        wide = torch.promote_types(self.key.weight.dtype, torch.float32)
        return {
            "matrix": StateSpec((self.heads, self.head_dim, self.head_dim), wide, "recurrent", head_axis=1),
            "normaliser": StateSpec((self.heads, self.head_dim), wide, "recurrent", head_axis=1),
        }

    def forward(self, x: Tensor, state: State, *, reset: Tensor) -> tuple[Tensor, State, Aux]:
        """x [B, T, D], reset bool [B, T] -> y [B, T, D], new state, no auxiliary loss."""
        q, k, v = (dense(x).unflatten(-1, (self.heads, -1)) for dense in (self.query, self.key, self.value))
        before = state["matrix"], state["normaliser"]
        if self.shard.size > 1:
            joined = torch.cat([before[0], before[1].unsqueeze(-1)], dim=-1)
            joined = scan_states(joined, *summary(k, v, reset), self.shard)
            before = joined[..., :-1].contiguous(), joined[..., -1].contiguous()
        y, matrix, normaliser = linear_attention(q, k, v, *before, reset=reset)
        return self.output(y.to(x.dtype).flatten(2)), {"matrix": matrix, "normaliser": normaliser}, {}
