"""Peak memory of one training step: what is kept, what is alive at the worst moment of the backward pass.

Bytes throughout. The forms counted are the fused ones that run on a GPU; the plain PyTorch forms keep more.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from longspan.modeling.config import (
    BlockRecurrentConfig,
    FullAttentionConfig,
    LinearAttentionConfig,
    ModelConfig,
    RecurrentMemoryConfig,
    SlidingWindowConfig,
)
from longspan.modeling.flops import stack_tokens_per_token
from longspan.trainer.plan.parameters import layer_parameters, total_parameters
from longspan.trainer.plan.setting import Setting

GIB = 2**30
FP32 = 4
LOSS_CHUNK_LOGITS = 2**28  # logits that exist at a time
FFN_CHUNK_HIDDEN = 2**27  # hidden values that exist at a time where they are not kept
CHAIN_KEEP_BYTES = 2**31  # reads of the state above this are recomputed
CHAIN_CHUNK_BLOCKS = 64  # blocks x rows whose reads exist at a time then
LINEAR_CHUNK_TOKENS = 64


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by what they are for.

    Attributes:
        weights: parameters in the compute type.
        gradients: those that exist at the peak.
        optimizer: moments and fp32 masters.
        activations: kept by the forward pass for the backward pass and not yet freed at the peak.
        workspace: alive only around the peak: results of the operation that runs, recomputed activations, logits.
        state: carried states, those that come in and those that go out.
        inputs: tokens, labels, resets, token losses.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float
    state: float
    inputs: float

    @property
    def total(self) -> float:
        """Peak of allocated bytes."""
        return sum(vars(self).values())


def plan_memory(setting: Setting) -> Memory:
    """Peak memory of a step: the forward end, the loss, and each layer's turn in the backward pass are compared."""
    config, element = setting.model, setting.element_bytes
    layers = config.expanded_layers()
    kept = [sum(saved(setting, layer).values()) for layer in layers]
    # grads of weights are held from step to step when several micro-batches add to them
    gradient_of = [element * sum(layer_parameters(config, layer).values()) for layer in layers]
    accumulated = element * total_parameters(config) if setting.micro_batches > 1 else 0
    loss_kept, logits = loss_memory(setting)
    moments = [(accumulated, sum(kept) + loss_kept, logits)]
    grads = element * config.vocab_size * config.dim  # of the tied embedding, the first that exists
    for index in reversed(range(len(layers))):
        grads += gradient_of[index]
        workspace = backward_workspace(setting, layers[index])
        moments.append((max(accumulated, grads), sum(kept[: index + 1]), workspace))
    gradients, activations, workspace = max(moments, key=sum)
    optimizer, update = optimizer_bytes(setting)
    memory = Memory(
        weights=element * total_parameters(config),
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        workspace=workspace,
        state=2 * setting.rows * sum(state_bytes(config, layer, element) for layer in layers) + _memory_state(setting),
        inputs=setting.tokens * (8 + 8 + FP32 + 1),
    )
    all_gradients = element * total_parameters(config)
    # the update runs when activations are gone: it is the peak of small batches only
    if gradients + activations + workspace < all_gradients + update:
        memory = Memory(**{**vars(memory), "gradients": all_gradients, "activations": 0.0, "workspace": update})
    return memory


def saved(setting: Setting, layer: object) -> Counter[str]:
    """Bytes that one layer's forward pass keeps for its backward pass, by name, under the checkpointing policy."""
    config, element, tokens = (
        setting.model,
        setting.element_bytes,
        setting.tokens * stack_tokens_per_token(setting.model),
    )
    row = int(tokens * config.dim * element)
    if setting.checkpointing == "layer":
        return Counter({"layer input": row})
    around = Counter(
        {
            "layer input": row,
            "after the mixer": row,
            "normalised for the FFN": row,
            "FFN hidden": int(tokens * config.ffn_dim * element),
        }
    )
    if setting.checkpointing == "mixer":
        return around + Counter({"normalised for the mixer": row})
    return around + mixer_saved(setting, layer)


def mixer_saved(setting: Setting, layer: object) -> Counter[str]:
    """Bytes that a mixer keeps for its backward pass when nothing is recomputed."""
    config, element, tokens = (
        setting.model,
        setting.element_bytes,
        setting.tokens * stack_tokens_per_token(setting.model),
    )
    width = config.num_heads * config.head_dim
    head_row = int(tokens * width * element)
    statistics = int(3 * tokens * config.num_heads * FP32)  # log of the sum, 1 / norm of query and key
    kept = Counter({"normalised for the mixer": int(tokens * config.dim * element)})
    if isinstance(layer, SlidingWindowConfig | BlockRecurrentConfig):
        kept += Counter({"packed weights": 3 * config.dim * width * element})
    match layer:
        case BlockRecurrentConfig():
            # keys and values once more, normalised and behind the cache, for the scan
            cached = int(2 * (tokens + setting.rows * config.window_tokens) * width * element)
            kept += Counter({"projections": 4 * head_row, "mixed": 2 * head_row, "statistics": 2 * statistics})
            kept += Counter({"keys and values": cached, "packed weights": 4 * config.dim * width * element})
            kept += _state_saved(setting, layer)
        case SlidingWindowConfig() if config.feedback:
            # the read of the state is plain PyTorch: query in fp32 too, both reads also side by side
            kept += Counter({"projections": 7 * head_row, "mixed": 4 * head_row, "statistics": 2 * statistics})
        case FullAttentionConfig():
            keys = config.window_tokens + layer.context_tokens
            kept += Counter({"projections": 11 * head_row, "mixed": head_row, "statistics": statistics})
            kept += Counter({"masks": int(tokens * keys * (1 + element))})
        case LinearAttentionConfig():
            wide = int(tokens * width * FP32)
            states = int(tokens / LINEAR_CHUNK_TOKENS * width * config.head_dim * FP32)
            kept += Counter({"projections": 3 * head_row + 9 * wide, "mixed": head_row + 2 * wide, "scan": 3 * states})
        case _:
            kept += Counter({"projections": 3 * head_row, "mixed": head_row, "statistics": statistics})
            if isinstance(layer, SlidingWindowConfig) and layer.positions == "rope":
                kept += Counter({"rotated": 2 * head_row})
    return kept


def _state_saved(setting: Setting, layer: BlockRecurrentConfig) -> Counter[str]:
    """Border states, what the tokens read of them, and the state's own reads where there is room: blocks x S rows."""
    config, element = setting.model, setting.element_bytes
    rows = _state_rows(setting, layer)
    width = config.num_heads * config.head_dim
    kept = Counter({"entering states": int(rows * config.dim * FP32)})
    if keeps_reads(setting, layer):
        return kept + Counter({"state projections and reads": int(6 * rows * width * element)})
    return kept + Counter({"state keys and values": int(2 * rows * width * element)})


def _state_rows(setting: Setting, layer: BlockRecurrentConfig) -> float:
    return setting.tokens / setting.model.window_tokens * layer.num_states


def keeps_reads(setting: Setting, layer: BlockRecurrentConfig) -> bool:
    """Whether the state's projections and reads of all blocks are kept for the backward pass, not recomputed."""
    width = setting.model.num_heads * setting.model.head_dim
    wanted = 6 * _state_rows(setting, layer) * width * setting.element_bytes
    return layer.update == "trained" and wanted <= CHAIN_KEEP_BYTES


def backward_workspace(setting: Setting, layer: object) -> float:
    """Bytes alive around one layer's backward pass beside what was saved: gradients in flight, recomputed values."""
    config, element, tokens = setting.model, setting.element_bytes, _stack_tokens(setting)
    row, hidden = tokens * config.dim * element, tokens * config.ffn_dim * element
    feed_forward = 2 * row + hidden  # gradient of the layer's output, of its hidden values, and of the FFN's input
    mixer = row + _mixer_workspace(setting, layer)  # with the gradient of the residual stream
    if setting.checkpointing == "none":
        return max(feed_forward, mixer)
    again = sum(mixer_saved(setting, layer).values())
    if setting.checkpointing == "mixer":
        return max(feed_forward, again - row + mixer)  # the mixer's input is kept, not computed again
    # the sum after the mixer and its norm are there again; hidden vectors and their gradients exist in chunks
    chunk = min(FFN_CHUNK_HIDDEN, tokens * config.ffn_dim) * element
    sums = 2 * config.dim * config.ffn_dim * FP32 if tokens * config.ffn_dim > FFN_CHUNK_HIDDEN else 0
    return again + max(4 * row + 2 * chunk + sums, mixer)


def _mixer_workspace(setting: Setting, layer: object) -> float:
    """Bytes of gradients at the worst moment of a mixer's backward pass, less those of values freed by then."""
    config, element, tokens = setting.model, setting.element_bytes, _stack_tokens(setting)
    width = tokens * config.num_heads * config.head_dim * element
    window = 4 * width  # gradients of what was read and of the projections
    if not isinstance(layer, BlockRecurrentConfig):
        return window
    rows = _state_rows(setting, layer)
    state_width = config.num_heads * config.head_dim * element
    chunk = min(rows, CHAIN_CHUNK_BLOCKS * layer.num_states)
    # The scan: gradients of both reads' queries, of the states' keys and values, and in fp32 of the tokens' keys and
    # values; of a chunk of blocks everything twice. The read of the state, its query and its result are done with.
    scan = 2 * width + 2 * rows * state_width + 2 * width / element * FP32
    scan += chunk * (state_width * (6 if keeps_reads(setting, layer) else 12) + config.dim * FP32)
    return max(window + 3 * width, scan - 2 * width)


def loss_memory(setting: Setting) -> tuple[float, float]:
    """(bytes kept, further bytes while it runs) of linear + cross-entropy.

    The forward pass makes the gradients already: of the vectors, and of the embedding in fp32 when there are several
    chunks of logits. The input and output of the final norm are kept too.
    """
    config, element = setting.model, setting.element_bytes
    row, table = setting.tokens * config.dim * element, config.vocab_size * config.dim
    logits = setting.tokens * config.vocab_size
    kept = 3 * row + table * (FP32 if logits > LOSS_CHUNK_LOGITS else element)
    # then the backward pass scales the gradients into new tensors, and the final norm makes its own
    return kept, max(element * min(LOSS_CHUNK_LOGITS, logits), 2 * row + element * table)


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


def _memory_state(setting: Setting) -> float:
    memory: RecurrentMemoryConfig | None = setting.model.memory
    return 0.0 if memory is None else 2 * setting.rows * memory.num_tokens * setting.model.dim * FP32


def _stack_tokens(setting: Setting) -> float:
    """Tokens of a micro-batch as the stack sees them."""
    return setting.tokens * stack_tokens_per_token(setting.model)


def optimizer_bytes(setting: Setting) -> tuple[float, float]:
    """(bytes kept from step to step, further bytes while it updates) on a single device.

    bf16 runs in ZeRO 1 to 3, which keep fp32 masters and moments of all parameters on a lone device and convert the
    gradients to fp32 for the update. Adafactor keeps a first moment and, of matrices, two vectors.
    """
    number = total_parameters(setting.model)
    if setting.optimizer == "none":
        return 0.0, 0.0
    moments = 2 * FP32 * number if setting.optimizer == "adamw" else 1.01 * FP32 * number
    masters = FP32 * number if setting.precision == "bf16" else 0
    return moments + masters, float(FP32 * number)
