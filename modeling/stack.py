"""A layer (mixer and feed-forward network with residuals) and a stack of layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan.kernels.context_parallel.messages import keep_messages
from longspan.kernels.feed_forward.api import adds_in_place
from longspan.kernels.norm.api import add_rms_norm, goes_back_from_output, residual_rms_norm
from longspan.kernels.tensor_parallel.collectives import enter, leave
from longspan.modeling.basic import FeedForward, RMSNorm, TiledDropout
from longspan.modeling.config import (
    ActivationCheckpointing,
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


def _run(module: StatefulModule, x: Tensor, state: State, reset: Tensor) -> tuple[Tensor, State, Aux]:
    done: tuple[Tensor, State, Aux] = module(x, state, reset=reset)
    return done


def _recomputed(module: StatefulModule, x: Tensor, state: State, reset: Tensor) -> tuple[Tensor, State, Aux]:
    """`module(x, state, reset=reset)`, of which no more is kept than the arguments and what other ranks sent."""
    context = copy_context()  # the backward pass of a GPU runs in a thread of its own, without a forced backend

    def run(x: Tensor, state: State) -> tuple[Tensor, State, Aux]:
        return context.run(module, x, state, reset=reset)

    # random numbers are drawn in training only: outside, their generators need not be put back
    return checkpoint(run, x, state, use_reentrant=False, preserve_rng_state=module.training, context_fn=keep_messages)


class Layer(StatefulModule):
    """y = x + mixer(dropout(RMS(x))); y + dropout(FFN(RMS(y))).

    Tensor-parallel ranks divide mixer and feed-forward network and sum what each gives; all else is whole on every
    rank.

    Attributes:
        checkpointing: "mixer" computes the mixer again in the backward pass; "layer" says that the caller does so with
            the whole layer, so that keeping the hidden vectors would be in vain.
    """

    checkpointing: ActivationCheckpointing = "none"

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

    def forward(
        self,
        x: Tensor,
        state: State,
        *,
        reset: Tensor,
        delta: Tensor | None = None,
        add: bool = True,
        overwrite: bool = False,
    ) -> tuple[Any, State, Aux]:
        """One layer; its first sum may come from the layer before, and its last be left to the next one's norm.

        Args:
            x, delta: [B, T, D], whose sum is the input; no delta is zero.
            state: of the layer.
            reset: bool [B, ceil(T/quantum)].
            add: False: the two summands of y instead of y.
            overwrite: x is the caller's own and needed no more, so that products may be added to it in its memory.

        Returns:
            y [B, T, D] or (y1, y2), new state, the mixer's auxiliary losses. y2 is None if a product has made the sum.
        """
        mask = self.dropout.mask(x)
        in_place = mask is None and self._sums_in_place(x)
        if delta is None:
            x, h = residual_rms_norm(x, self.norm.scale, mask, from_output=in_place)
        else:
            x, h = add_rms_norm(x, delta, self.norm.scale, mask, from_output=in_place)
        shard, h = self.tensor_shard, enter(h, self.tensor_shard)
        again = self.checkpointing == "mixer" and torch.is_grad_enabled()
        # training without gradients is the first of two runs (torch's reentrant checkpoint): the second needs x again
        ours = delta is not None or (overwrite and (torch.is_grad_enabled() or not self.training))
        # what runs again in the backward pass must not add again; a sum with a delta is a new tensor
        if in_place and not again and self.mixer.adds_residual and ours:
            x, state, aux = self.mixer(h, state, reset=reset, residual=x)
            y, h = residual_rms_norm(x, self.ffn_norm.scale, from_output=True)
        else:
            run = _recomputed if again else _run
            mixed, state, aux = run(self.mixer, h, state, reset)
            y, h = add_rms_norm(x, leave(mixed, shard), self.ffn_norm.scale, from_output=in_place)
        if in_place:
            y = self.ffn(h, residual=y)
            return y if add else (y, None), state, aux
        out = self.ffn(enter(h, shard), keep_hidden=self.checkpointing != "layer")
        out = self.dropout(leave(out, shard))
        return y + out if add else (y, out), state, aux

    def _sums_in_place(self, x: Tensor) -> bool:
        """Whether products may be added to the residual stream in its own memory
        (docs/decisions/022-residual-sums-in-place.md): nothing is dropped, no rank has a part of the sum, and no layer
        runs again on an x that is still needed."""
        norms = (self.norm.scale, self.ffn_norm.scale)
        weights = (self.ffn.hidden.weight, self.ffn.output.weight)
        whole = self.tensor_shard.size == 1 and self.checkpointing != "layer"
        return whole and adds_in_place(x, *weights) and all(goes_back_from_output(x, scale) for scale in norms)

    def decode_state(self, state: State) -> State:
        """The mixer's."""
        return self.mixer.decode_state(state)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token x [B, D] of each row -> y [B, D], next decode state."""
        mixed, state = self.mixer.step(self.norm(x), state)
        y = x + leave(mixed, self.tensor_shard)
        return y + leave(self.ffn(self.ffn_norm(y)), self.tensor_shard), state


class Stack(StatefulModule):
    """Layers one after another; the state has one entry a layer."""

    checkpointing: ActivationCheckpointing = "none"

    def __init__(self, model: ModelConfig, mixers: dict[type, Callable[..., StatefulModule]] = MIXERS) -> None:
        """Args: model: configuration; mixers: what builds a layer's mixer, by class of its configuration."""
        super().__init__()
        configs = model.expanded_layers()
        self.quantum = math.lcm(*(layer.quantum(model.window_tokens) for layer in configs))
        layers = [Layer(model, mixers[type(layer)](model, layer, self.quantum)) for layer in configs]
        self.layers = nn.ModuleList(layers)
        self.lookback = max(layer.lookback for layer in layers)
        self.dependency = max((layer.dependency for layer in layers), key=_BY_COST.index)

    def set_activation_checkpointing(self, policy: ActivationCheckpointing) -> None:
        """What the backward pass computes again instead of keeping it.

        Args:
            policy: "none"; "mixer": what is inside each mixer; "layer": everything but each layer's input.
        """
        self.checkpointing = policy
        for _, layer in self._named():
            layer.checkpointing = policy

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
        delta: Tensor | None = None
        for index, (name, layer) in enumerate(self._named()):
            layer_reset = refine_reset(reset, x.shape[1], self.quantum, layer.quantum)
            if self.checkpointing == "layer" and torch.is_grad_enabled():
                x, new_state[name], aux = _recomputed(layer, x, state[name], layer_reset)
            else:
                # behind the first layer x is a sum that a layer has made
                (x, delta), new_state[name], aux = layer(
                    x, state[name], reset=layer_reset, delta=delta, add=False, overwrite=index > 0
                )
            for key, value in aux.items():
                total[key] = total[key] + value if key in total else value
        return x if delta is None else x + delta, new_state, total

    def decode_state(self, state: State) -> State:
        """One entry a layer."""
        return {name: layer.decode_state(state[name]) for name, layer in self._named()}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token x [B, D] of each row -> y [B, D], next decode state."""
        new_state: State = {}
        for name, layer in self._named():
            x, new_state[name] = layer.step(x, state[name])
        return x, new_state
