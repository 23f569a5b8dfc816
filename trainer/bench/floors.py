"""Least operations and bytes of what is measured, each input read once and each output written once.

A whole step is the sum over its matrix products and attentions; norms, activations, residuals and the optimizer
count nothing, since they can be part of a product's kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from longspan.modeling.config import BlockRecurrentConfig, ModelConfig
from longspan.modeling.flops import Operation, head_operation, layer_operations, stack_tokens_per_token
from longspan.trainer.bench.ceilings import Ceilings


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of something that can be one kernel."""

    flops: float
    num_bytes: float


def floor_ms(costs: Iterable[Cost], ceilings: Ceilings) -> float:
    """Milliseconds when each part runs at the measured matrix rate or copy rate, whichever takes longer."""
    return sum(ceilings.floor_ms(cost.flops, cost.num_bytes) for cost in costs)


def step_costs(config: ModelConfig, rows: int, segment_tokens: int, element_bytes: int) -> list[Cost]:
    """Forward and backward of a whole model; the operations sum to `flops.train_flops_per_token`.

    Args:
        config: the model.
        rows, segment_tokens: B and N.
        element_bytes: of weights and activations.
    """
    tokens = rows * segment_tokens
    costs = _training(head_operation(config), tokens, element_bytes, 3.0)
    for layer in config.expanded_layers():
        costs += layer_costs(config, layer, tokens, segment_tokens, element_bytes)
    return costs


def layer_costs(
    config: ModelConfig, layer: object, tokens: float, segment_tokens: int, element_bytes: int
) -> list[Cost]:
    """Forward and backward of one layer on `tokens` tokens in segments of `segment_tokens`."""
    costs = []
    for operation in layer_operations(config, layer):
        passes = 3.0
        if operation.write and isinstance(layer, BlockRecurrentConfig) and config.memory is None:
            passes -= 2 * config.window_tokens / segment_tokens  # nothing reads the last block's state
        costs += _training(operation, tokens * stack_tokens_per_token(config), element_bytes, passes)
    return costs


def chain_costs(config: ModelConfig, layer: BlockRecurrentConfig, rows: int, element_bytes: int) -> list[Cost]:
    """Forward of the state path for one block of `rows` sequences; weights and states stay in cache."""
    block = rows * config.window_tokens
    width = config.num_heads * config.head_dim
    costs = [Cost(part.flops * block, 0.0) for part in layer_operations(config, layer) if part.serial]
    token_keys_values = 2.0 * block * width * element_bytes
    saved_state = 4.0 * rows * layer.num_states * config.dim
    return [*costs, Cost(0.0, token_keys_values + saved_state)]


def window_costs(rows: int, tokens: int, window: int, width: int, element_bytes: int, backward: bool) -> list[Cost]:
    """Attention of each token to W others: two products forward and five backward; q, k, v, out and gradients."""
    product = 2.0 * rows * tokens * window * width
    tensor = rows * tokens * width * element_bytes
    forward = Cost(2 * product, 4 * tensor)
    return [forward, Cost(5 * product, 8 * tensor)] if backward else [forward]


def loss_costs(tokens: int, dim: int, vocab_size: int, element_bytes: int) -> list[Cost]:
    """Output layer with its loss, forward and backward, without logits in memory."""
    head = Operation("cross-entropy", "dense", 1, dim, vocab_size)
    weights, hidden = dim * vocab_size * element_bytes, tokens * dim * element_bytes
    return [Cost(3 * head.flops * tokens, 3 * weights + 3 * hidden)]


def _training(operation: Operation, tokens: float, element_bytes: int, passes: float) -> list[Cost]:
    rows = operation.rows * tokens
    if operation.kind == "dense":
        elements = rows * (operation.inner + operation.outer) + operation.inner * operation.outer
    else:
        elements = 4 * rows * operation.outer  # q, k, v and the result
    return [Cost(operation.flops * tokens * passes, elements * element_bytes * passes)]
