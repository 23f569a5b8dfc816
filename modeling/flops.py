"""Floating-point operations of training, by arithmetic from the configuration. Imports no torch.

One list of operations serves the counts here, the progress line of a run and `longspan plan`. Counted: matrix
products, a multiply and an add each; attention over the keys that a token sees (W for a window, C for full attention
once its cache is full). Not counted: norms, activations, softmax, optimizer, recomputation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from longspan.modeling.config import (
    BlockRecurrentConfig,
    FullAttentionConfig,
    LinearAttentionConfig,
    ModelConfig,
    SlidingWindowConfig,
)

Kind = Literal["dense", "window_attention", "full_attention", "linear_attention", "state_read", "state_attention"]


@dataclass(frozen=True)
class Operation:
    """One matrix product, or one attention, of a layer.

    Attributes:
        part: name in reports; operations of one name are one launch or one kernel where the layer allows it.
        kind: "dense" is x W^T; the others are attention of two products each.
        rows: rows of x (queries) per token of the segment.
        inner: width of x; for attention the keys that a query sees.
        outer: width of the result; for attention heads x width of a head.
        serial: waits for the state of the block before.
        write: only the next state needs it, so the last block of a segment has no backward pass of it.
    """

    part: str
    kind: Kind
    rows: float
    inner: int
    outer: int
    serial: bool = False
    write: bool = False

    @property
    def flops(self) -> float:
        """Forward operations per token of the segment."""
        return (2.0 if self.kind == "dense" else 4.0) * self.rows * self.inner * self.outer


def train_flops_per_token(config: ModelConfig, segment_tokens: int) -> float:
    """Forward and backward operations per token when segments of `segment_tokens` tokens are trained.

    The backward pass costs twice the forward pass, except for the write of the state in a segment's last block: its
    result is read by the next segment only, without gradient.

    Args:
        config: the model.
        segment_tokens: N, tokens of one lane in one step.
    """
    total = 3 * head_operation(config).flops
    for layer in config.expanded_layers():
        total += 3 * stack_tokens_per_token(config) * layer_flops_per_token(config, layer)
        if isinstance(layer, BlockRecurrentConfig) and config.memory is None:
            total -= 2 * state_write_flops(config, layer) / segment_tokens
    return total


def stack_tokens_per_token(config: ModelConfig) -> float:
    """Tokens that the stack sees per token of the text: memory tokens are read and written in every block."""
    return 1.0 if config.memory is None else 1 + 2 * config.memory.num_tokens / config.window_tokens


def head_operation(config: ModelConfig) -> Operation:
    """The product with the tied embedding that gives logits."""
    return Operation("cross-entropy", "dense", 1, config.dim, config.vocab_size)


def layer_flops_per_token(config: ModelConfig, layer: object) -> float:
    """Forward operations per token of one layer, feed-forward network included."""
    return sum(operation.flops for operation in layer_operations(config, layer))


def state_write_flops(config: ModelConfig, layer: BlockRecurrentConfig) -> float:
    """Forward operations of one write of the state: queries, both reads, output, gates, FFN."""
    return config.window_tokens * sum(operation.flops for operation in _state_operations(config, layer)[1:])


def layer_operations(config: ModelConfig, layer: object, tp: int = 1) -> list[Operation]:
    """All operations of one layer, forward, on one of `tp` tensor-parallel ranks.

    Args:
        config: the model.
        layer: one of its layers' configurations.
        tp: ranks that divide heads and hidden units; the state path is whole on every one of them.
    """
    whole, config = config, divided(config, tp)
    dim, width, window = config.dim, config.num_heads * config.head_dim, config.window_tokens
    narrow = [
        Operation("projections", "dense", 1, dim, 3 * width),
        Operation("output projection", "dense", 1, width, dim),
    ]
    attention = Operation("window attention", "window_attention", 1, window, width)
    match layer:
        case SlidingWindowConfig() if config.feedback:
            mixer = [*_reading_layer(config, _feedback_states(config)), attention]
        case SlidingWindowConfig():
            mixer = [*narrow, attention]
        case FullAttentionConfig():
            mixer = [*narrow, Operation("full attention", "full_attention", 1, layer.context_tokens, width)]
        case LinearAttentionConfig():
            mixer = [*narrow, Operation("linear attention", "linear_attention", 1, config.head_dim, width)]
        case BlockRecurrentConfig():
            reading = _reading_layer(config, layer.num_states)
            mixer = [*reading, attention, *_state_operations(whole, layer)]
        case _:
            raise AssertionError(f"no count for {type(layer).__name__}")
    return [
        *mixer,
        Operation("feed-forward", "dense", 1, dim, config.ffn_dim),
        Operation("feed-forward", "dense", 1, config.ffn_dim, dim),
    ]


@lru_cache(maxsize=256)
def divided(config: ModelConfig, tp: int) -> ModelConfig:
    """What each of `tp` tensor-parallel ranks has of a model: heads, hidden units and vocabulary divided."""
    if tp == 1:
        return config
    sizes = {name: getattr(config, name) // tp for name in ("num_heads", "ffn_dim", "vocab_size")}
    return config.model_copy(update=sizes)


def _reading_layer(config: ModelConfig, num_states: int) -> list[Operation]:
    """Projections and state read of a layer whose tokens read a state beside their window."""
    dim, width = config.dim, config.num_heads * config.head_dim
    return [
        Operation("projections", "dense", 1, dim, 3 * width),
        Operation("projections", "dense", 1, dim, width),
        Operation("state read", "state_read", 1, num_states, width),
        Operation("output projection", "dense", 1, 2 * width, dim),
    ]


def _feedback_states(config: ModelConfig) -> int:
    """State vectors of the recurrent layer that the others read: the last one."""
    return [layer.num_states for layer in config.layers if isinstance(layer, BlockRecurrentConfig)][-1]


def _state_operations(config: ModelConfig, layer: BlockRecurrentConfig) -> list[Operation]:
    """The state path: keys and values, which tokens read, then what only the write needs."""
    dim, width, window = config.dim, config.num_heads * config.head_dim, config.window_tokens
    rows = layer.num_states / window

    def dense(part: str, inner: int, outer: int, write: bool = True) -> Operation:
        return Operation(part, "dense", rows, inner, outer, serial=True, write=write)

    keys_values = dense("state projections", dim, 2 * width, write=False)
    if layer.update == "frozen":
        return [keys_values]
    gates = 2 if layer.gate == "lstm" else 0
    operations = [
        keys_values,
        dense("state projections", dim, 2 * width),
        Operation("state self-attention", "state_attention", rows, layer.num_states, width, serial=True, write=True),
        Operation("state reads tokens", "state_attention", rows, 2 * window, width, serial=True, write=True),
    ]
    if layer.mode != "single":
        operations.append(dense("state output and gate", 2 * width, (1 + gates) * dim))
    if layer.mode != "skip":
        operations.append(dense("state feed-forward", dim if layer.mode == "dual" else 2 * width, config.ffn_dim))
        operations.append(dense("state feed-forward", config.ffn_dim, (1 + gates) * dim))
    return operations
