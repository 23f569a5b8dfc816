"""A layer (mixer and feed-forward network with residuals) and a stack of layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from longspan.modeling.basic import FeedForward, RMSNorm, TiledDropout
from longspan.modeling.config import (
    BlockRecurrentConfig,
    FullAttentionConfig,
    LinearAttentionConfig,
    ModelConfig,
    SlidingWindowConfig,
)
from longspan.modeling.mixers.block_recurrent import BlockRecurrent
from longspan.modeling.mixers.full_attention import FullAttention
from longspan.modeling.mixers.linear_attention import LinearAttention
from longspan.modeling.mixers.sliding_window import SlidingWindow
from longspan.modeling.protocol import Aux, Dependency, StatefulModule, refine_reset
from longspan.modeling.state import SpecTree, State

MIXERS: dict[type, Callable[..., StatefulModule]] = {
    SlidingWindowConfig: SlidingWindow,
    BlockRecurrentConfig: BlockRecurrent,
    LinearAttentionConfig: LinearAttention,
    FullAttentionConfig: FullAttention,
}
_BY_COST: tuple[Dependency, ...] = ("parallel", "affine_scan", "state_scan", "stack_scan", "token_serial")


class Layer(StatefulModule):
    """y = x + mixer(dropout(RMS(x))); y + dropout(FFN(RMS(y)))."""

    def __init__(self, model: ModelConfig, mixer: StatefulModule) -> None:
        """Args: model: configuration; mixer: moves information along the sequence."""
        super().__init__()
        self.norm = RMSNorm(model.dim)
        self.mixer = mixer
        self.ffn_norm = RMSNorm(model.dim)
        self.ffn = FeedForward(model.dim, model.ffn_dim)
        self.dropout = TiledDropout(model.dropout)
        self.quantum, self.lookback, self.dependency = mixer.quantum, mixer.lookback, mixer.dependency

    def state_spec(self) -> SpecTree:
        """The mixer's."""
        return self.mixer.state_spec()

    def init_state(self, batch: int, device: torch.device | str | None = None) -> State:
        """The mixer's."""
        return self.mixer.init_state(batch, device)

    def forward(self, x: Tensor, state: State, *, reset: Tensor) -> tuple[Tensor, State, Aux]:
        """x [B, T, D], reset bool [B, ceil(T/quantum)] -> y [B, T, D], new state, the mixer's auxiliary losses."""
        mixed, state, aux = self.mixer(self.dropout(self.norm(x)), state, reset=reset)
        y = x + mixed
        return y + self.dropout(self.ffn(self.ffn_norm(y))), state, aux

    def decode_state(self, state: State) -> State:
        """The mixer's."""
        return self.mixer.decode_state(state)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token x [B, D] of each row -> y [B, D], next decode state."""
        mixed, state = self.mixer.step(self.norm(x), state)
        y = x + mixed
        return y + self.ffn(self.ffn_norm(y)), state


class Stack(StatefulModule):
    """Layers one after another; the state has one entry a layer."""

    def __init__(self, model: ModelConfig) -> None:
        """Args: model: configuration."""
        super().__init__()
        configs = model.expanded_layers()
        self.quantum = math.lcm(*(layer.quantum(model.window_tokens) for layer in configs))
        layers = [Layer(model, MIXERS[type(layer)](model, layer, self.quantum)) for layer in configs]
        self.layers = nn.ModuleList(layers)
        self.lookback = max(layer.lookback for layer in layers)
        self.dependency = max((layer.dependency for layer in layers), key=_BY_COST.index)

    def _named(self) -> list[tuple[str, Layer]]:
        return [(f"layer{index}", cast(Layer, layer)) for index, layer in enumerate(self.layers)]

    def state_spec(self) -> SpecTree:
        """One entry a layer: layer0, layer1, ..."""
        return {name: layer.state_spec() for name, layer in self._named()}

    def init_state(self, batch: int, device: torch.device | str | None = None) -> State:
        """One entry a layer."""
        return {name: layer.init_state(batch, device) for name, layer in self._named()}

    def forward(self, x: Tensor, state: State, *, reset: Tensor) -> tuple[Tensor, State, Aux]:
        """x [B, T, D], reset bool [B, ceil(T/quantum)] -> y [B, T, D], new state, sums of auxiliary losses."""
        new_state: State = {}
        total: Aux = {}
        for name, layer in self._named():
            layer_reset = refine_reset(reset, x.shape[1], self.quantum, layer.quantum)
            x, new_state[name], aux = layer(x, state[name], reset=layer_reset)
            for key, value in aux.items():
                total[key] = total[key] + value if key in total else value
        return x, new_state, total

    def decode_state(self, state: State) -> State:
        """One entry a layer."""
        return {name: layer.decode_state(state[name]) for name, layer in self._named()}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token x [B, D] of each row -> y [B, D], next decode state."""
        new_state: State = {}
        for name, layer in self._named():
            x, new_state[name] = layer.step(x, state[name])
        return x, new_state
