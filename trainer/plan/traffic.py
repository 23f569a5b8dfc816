"""Messages between ranks in one micro-batch, in bytes, as docs/context_parallel.md and tensor_parallel.md have them."""

from __future__ import annotations

from dataclasses import dataclass

from longspan.modeling.config import (
    BlockRecurrentConfig,
    FullAttentionConfig,
    LinearAttentionConfig,
    ModelConfig,
    SlidingWindowConfig,
)
from longspan.modeling.flops import stack_tokens_per_token
from longspan.trainer.plan.parameters import state_path_parameters
from longspan.trainer.plan.setting import Setting, runs_by_block

FP32 = 4  # bytes
LOSS_NUMBERS = 3  # of a token: largest logit, sum of exponentials, the label's logit


@dataclass(frozen=True)
class LayerMessages:
    """What one rank sends for one layer and micro-batch; zeros where there is nothing to send.

    Attributes:
        halo: bytes to the rank 1, 2, ... places to the right in a forward pass; as much comes back in a backward pass.
        carry: bytes of the state, all slices; to the right, and its gradient to the left.
        carry_calls: messages that one slice of it takes: one a tensor.
        ring: bytes of keys and values that go to each of `ring_hops` ranks in a pass.
        ring_gradients: bytes that come back from each of them in the backward pass, fp32.
        ring_hops: ranks to the left that a rank looks at.
        scan: bytes of one rank's summary, to all others in the forward; scan_gradients in the backward.
        sums: vectors that tensor-parallel ranks sum, in bytes: one in a forward pass, one in a backward pass, twice.
        sum_calls: collectives that one of these four takes: one for each run of the stack.
        gather: bytes of the vector that tensor-parallel ranks gather in the forward, and scatter in the backward.
        gather_calls: collectives that either takes.
        path_gradients: bytes of the state path's gradients, summed over tensor-parallel ranks.
        path_calls: collectives that they take: one a parameter, once in a backward pass, however often the stack runs.
    """

    halo: tuple[float, ...] = ()
    carry: float = 0.0
    carry_calls: int = 0
    ring: float = 0.0
    ring_gradients: float = 0.0
    ring_hops: int = 0
    scan: float = 0.0
    scan_gradients: float = 0.0
    sums: float = 0.0
    sum_calls: int = 0
    gather: float = 0.0
    gather_calls: int = 0
    path_gradients: float = 0.0
    path_calls: int = 0


def halo_rows(share: int, window: int, ranks: int) -> list[int]:
    """Rows that a rank sends to the one 1, 2, ... places to the right: min(T, W - (h-1) T), R-1 of them at most."""
    rows: list[int] = []
    while len(rows) < ranks - 1 and sum(rows) < window:
        rows.append(min(share, window - sum(rows)))
    return rows


def layer_messages(setting: Setting, layer: object, cp: int) -> LayerMessages:
    """Messages of a layer.

    Args:
        setting: of one rank: its share of the segment, its part of every layer.
        layer: its configuration.
        cp: ranks that hold a sequence together.
    """
    local, element, rows, share = setting.local, setting.element_bytes, setting.rows, setting.segment_tokens
    width = local.num_heads * local.head_dim
    found: dict[str, float | int | tuple[float, ...]] = {}
    stack_tokens, calls = share * stack_tokens_per_token(local), setting.stack_calls
    if setting.tp > 1:
        found |= {"sums": rows * stack_tokens * local.dim * element, "sum_calls": calls}
        if isinstance(layer, BlockRecurrentConfig):
            found["path_gradients"] = float(state_path_parameters(setting.model, layer).total() * element)
            found["path_calls"] = state_path_tensors(layer)
    serial = runs_by_block(local)  # such a model hands its whole state on at once
    if cp > 1 and not serial and isinstance(layer, SlidingWindowConfig | BlockRecurrentConfig):
        sent = halo_rows(share, local.window_tokens, cp)
        found["halo"] = tuple(float(rows * number * (2 * width + 1) * element) for number in sent)
    match layer:
        case BlockRecurrentConfig() if layer.update == "trained":
            if cp > 1 and not serial:
                found |= {"carry": float(rows * layer.num_states * local.dim * FP32), "carry_calls": 1}
            if setting.tp > 1:
                # keys and values of all heads: of the window before each run of the stack, and of its own tokens
                windows = -(-share // local.window_tokens) if serial else 1
                whole = setting.model.num_heads * setting.model.head_dim
                found["gather"] = float(2 * rows * (windows * local.window_tokens + stack_tokens) * whole * element)
                found["gather_calls"] = calls
        case LinearAttentionConfig() if cp > 1 and not serial:
            state = rows * width * (local.head_dim + 1)
            found |= {"scan": float((state + rows) * FP32), "scan_gradients": float(state * FP32)}
        case FullAttentionConfig() if cp > 1 and not serial:
            vectors = rows * share * width
            found["ring_hops"] = min(cp - 1, -(-(layer.context_tokens - 1) // share))
            found |= {"ring": float(2 * vectors * element), "ring_gradients": float(2 * vectors * FP32)}
    return LayerMessages(**found)  # type: ignore[arg-type]


def state_path_tensors(layer: BlockRecurrentConfig) -> int:
    """Parameters of a recurrent layer's state path, counted as tensors (`modeling.mixers.block_recurrent`)."""
    offered = 5  # initial state, norm, ids, key, value
    if layer.update == "frozen":
        return offered
    gate = 1 if layer.gate == "fixed" else 4
    written = 4  # both queries and their scales
    if layer.mode != "single":
        written += 1 + gate
    if layer.mode != "skip":
        written += 2 + gate + (layer.mode == "dual")  # with a norm of its own
    return offered + written


def whole_state_tensors(config: ModelConfig) -> int:
    """Tensors of a model's carried state: two a layer (keys and values, matrix and sum), and trained states."""
    if config.memory is not None:
        return 1
    layers = config.expanded_layers()
    return 2 * len(layers) + sum(
        isinstance(layer, BlockRecurrentConfig) and layer.update == "trained" for layer in layers
    )


def kept_message_bytes(setting: Setting, layer: object) -> float:
    """What a rank received for a layer and keeps where the layer is computed again, so that nothing is sent again."""
    if setting.cp == 1:
        return 0.0
    messages = layer_messages(setting, layer, setting.cp)
    return sum(messages.halo) + messages.carry + setting.cp * messages.scan


def state_bytes(config: ModelConfig, layer: object, element: int) -> float:
    """Bytes of one row's carried state of one layer."""
    if config.memory is not None:
        return 0.0
    width = config.num_heads * config.head_dim
    match layer:
        case BlockRecurrentConfig():
            vectors = 0 if layer.update == "frozen" else layer.num_states * config.dim * FP32
            return 2 * config.window_tokens * width * element + vectors
        case FullAttentionConfig():
            return 2 * (layer.context_tokens - 1) * width * element
        case LinearAttentionConfig():
            return width * (config.head_dim + 1) * FP32
        case _:
            return 2 * config.window_tokens * width * element


def whole_state_bytes(setting: Setting) -> float:
    """The state after a segment of one rank's lanes: what the last rank of a sequence sends to the others."""
    local = setting.local
    states = sum(state_bytes(local, layer, setting.element_bytes) for layer in local.expanded_layers())
    return setting.rows * (states + memory_bytes(local))


def memory_bytes(config: ModelConfig) -> float:
    """One row's recurrent memory."""
    return 0.0 if config.memory is None else float(config.memory.num_tokens * config.dim * FP32)


def ends_sums(setting: Setting) -> tuple[float, float, float]:
    """Bytes that tensor-parallel ranks sum for embedding (forward), loss (forward) and loss (backward)."""
    vectors = float(setting.tokens * setting.model.dim * setting.element_bytes)
    return vectors, float(setting.tokens * LOSS_NUMBERS * FP32), vectors
