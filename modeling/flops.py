"""Floating-point operations of training, by arithmetic from the configuration. Imports no torch.

Counted: matrix products, a multiply and an add each; attention over the keys that a token sees (W for a window, C
for full attention once its cache is full). Not counted: norms, activations, softmax, optimizer, recomputation.
"""

from __future__ import annotations

from longspan.modeling.config import (
    BlockRecurrentConfig,
    FullAttentionConfig,
    LinearAttentionConfig,
    ModelConfig,
    SlidingWindowConfig,
)


def train_flops_per_token(config: ModelConfig, segment_tokens: int) -> float:
    """Forward and backward operations per token when segments of `segment_tokens` tokens are trained.

    The backward pass costs twice the forward pass, except for the write of the state in a segment's last block: its
    result is read by the next segment only, without gradient.

    Args:
        config: the model.
        segment_tokens: N, tokens of one lane in one step.
    """
    tokens_per_token = 1.0
    if config.memory is not None:
        tokens_per_token += 2 * config.memory.num_tokens / config.window_tokens
    total = 3 * 2.0 * config.dim * config.vocab_size
    for layer in config.expanded_layers():
        total += 3 * tokens_per_token * layer_flops_per_token(config, layer)
        if isinstance(layer, BlockRecurrentConfig) and config.memory is None:
            total -= 2 * state_write_flops(config, layer) / segment_tokens
    return total


def layer_flops_per_token(config: ModelConfig, layer: object) -> float:
    """Forward operations per token of one layer, feed-forward network included."""
    dim, width, window = config.dim, config.num_heads * config.head_dim, config.window_tokens
    dense = 2 * dim * width
    total = 4.0 * dim * config.ffn_dim
    match layer:
        case SlidingWindowConfig():
            return total + 4 * dense + 4 * window * width
        case FullAttentionConfig():
            return total + 4 * dense + 4 * layer.context_tokens * width
        case LinearAttentionConfig():
            return total + 4 * dense + 4 * config.head_dim * width
        case BlockRecurrentConfig():
            tokens = 6 * dense + 4 * window * width + 4 * layer.num_states * width
            state = 2 * layer.num_states * dense + state_write_flops(config, layer)  # keys and values, write
            return total + tokens + state / window
    raise AssertionError(f"no count for {type(layer).__name__}")


def state_write_flops(config: ModelConfig, layer: BlockRecurrentConfig) -> float:
    """Forward operations of one write of the state: queries, both reads, output, gates, FFN."""
    if layer.update == "frozen":
        return 0.0
    dim, width, states = config.dim, config.num_heads * config.head_dim, layer.num_states
    per_state = 2 * 2.0 * dim * width + 4 * (states + 2 * config.window_tokens) * width
    lstm = 2 if layer.gate == "lstm" else 0
    if layer.mode != "single":
        per_state += (1 + lstm) * 2 * 2 * width * dim
    if layer.mode != "skip":
        ffn_input = dim if layer.mode == "dual" else 2 * width
        per_state += 2 * config.ffn_dim * (ffn_input + (1 + lstm) * dim)
    return states * per_state
