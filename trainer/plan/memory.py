"""Peak memory of one training step: what is kept, what is alive at the worst moment of the backward pass.

Bytes throughout. The forms counted are the fused ones that run on a GPU; the plain PyTorch forms keep more.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

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
from longspan.trainer.plan.setting import Setting, runs_by_block
from longspan.trainer.plan.traffic import FP32, kept_message_bytes, state_bytes
from longspan.trainer.plan.zero import bucket_bytes, kept_gradient_bytes, weight_bytes

GIB = 2**30
# The kernels' own limits, repeated here because importing those loads torch; a test compares them.
LOSS_CHUNK_LOGITS = 2**28  # logits that exist at a time
DIVIDED_CHUNK_LOGITS = 2**26  # the same where tensor-parallel ranks divide the vocabulary
FFN_CHUNK_HIDDEN = 2**27  # hidden values that exist at a time where they are not kept
CHAIN_KEEP_BYTES = 2**32  # reads of the state above this are recomputed
CHAIN_CHUNK_VALUES = 2**25  # numbers in the states of all rows, or in their windows' tokens, that pass at a time
LINEAR_CHUNK_TOKENS = 64
WINDOW_PIECE_TOKENS = 40 * 2**10  # keys whose scores' gradients are stored at a time
WINDOW_TILE_TOKENS = 64  # keys of a tile of them
WINDOW_DISTANCES = 128  # from here on all have one bias
WINDOW_REACH = 384  # columns of the bias of near keys, kept for each distance
KERNEL_HEAD_WIDTHS = (16, 32, 64, 128)  # of window attention and of the recurrent layer


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
    repeats = [layer.repeat for layer in config.layers]
    kept = _repeated([sum(saved(setting, layer).values()) for layer in config.layers], repeats)
    # grads of weights are held from step to step when several micro-batches add to them
    counts = [_layer_count(config, layer, setting.tp) for layer in config.layers]
    gradient_of = _repeated([element * count for count in counts], repeats)
    workspaces = _repeated([backward_workspace(setting, layer) for layer in config.layers], repeats)
    parameters = total_parameters(config, setting.tp)
    # at stage 3 there is a buffer for this device's share from the start
    keeps_gradients = setting.micro_batches > 1 or setting.zero_stage == 3
    accumulated = kept_gradient_bytes(setting, element * parameters) if keeps_gradients else 0
    loss_kept, logits = loss_memory(setting)
    moments = [(accumulated, sum(kept) + loss_kept, logits)]
    grads: float = element * setting.local.vocab_size * config.dim  # of the tied embedding, the first that exists
    for index in reversed(range(len(layers))):
        grads += gradient_of[index]
        moments.append((max(accumulated, grads), sum(kept[: index + 1]), workspaces[index]))
    gradients, activations, workspace = max(moments, key=sum)
    optimizer, update = optimizer_bytes(setting)
    # the engine holds what came in and what goes out of every micro-batch until the step is over
    states = 2 * setting.rows * sum(state_bytes(setting.local, layer, element) for layer in layers)
    states += _memory_state(setting)
    memory = Memory(
        weights=weight_bytes(setting, parameters) + bucket_bytes(setting, parameters),
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        workspace=workspace,
        state=setting.micro_batches * states,
        inputs=setting.tokens * (8 + 8 + FP32 + 1),
    )
    all_gradients = kept_gradient_bytes(setting, element * parameters)
    # the update runs when activations are gone: it is the peak of small batches only
    if gradients + activations + workspace < all_gradients + update:
        memory = Memory(**{**vars(memory), "gradients": all_gradients, "activations": 0.0, "workspace": update})
    return memory


@lru_cache(maxsize=256)
def _layer_count(config: ModelConfig, layer: object, tp: int) -> int:
    return sum(layer_parameters(config, layer, tp).values())


def _repeated(values: list[float], repeats: list[int]) -> list[float]:
    """One value a layer from one an entry of the configuration."""
    return [value for value, repeat in zip(values, repeats, strict=True) for _ in range(repeat)]


def saved(setting: Setting, layer: object) -> Counter[str]:
    """Bytes that one layer's forward pass keeps for its backward pass, by name, under the checkpointing policy."""
    config, element, tokens = (
        setting.local,
        setting.element_bytes,
        setting.tokens * stack_tokens_per_token(setting.model),
    )
    row = int(tokens * config.dim * element)
    offered = _offered(setting, layer)
    received = Counter({"messages received": int(kept_message_bytes(setting, layer))})
    if setting.checkpointing == "layer":
        return Counter({"layer input": row}) + received + offered
    # both sums of the residual stream, or only by what number each norm divided its rows
    norms = {"factors of the norms": int(2 * tokens * FP32)}
    around = Counter(
        {
            **(norms if sums_in_place(setting) else {"layer input": row, "after the mixer": row}),
            "normalised for the FFN": row,
            "FFN hidden": int(tokens * config.ffn_dim * element),
            "bits of the ReLU": int(tokens * config.ffn_dim / 8),
        }
    )
    if setting.checkpointing == "mixer":
        return around + received + offered + Counter({"normalised for the mixer": row})
    return around + mixer_saved(setting, layer) + offered


def sums_in_place(setting: Setting) -> bool:
    """Whether products are added to the residual stream in its own memory, which nothing then keeps."""
    return setting.model.dropout == 0 and setting.tp == 1 and setting.checkpointing != "layer"


def mixer_saved(setting: Setting, layer: object) -> Counter[str]:
    """Bytes that a mixer keeps for its backward pass when nothing is recomputed."""
    config, element, tokens = (
        setting.local,
        setting.element_bytes,
        setting.tokens * stack_tokens_per_token(setting.model),
    )
    width = config.num_heads * config.head_dim
    head_row = int(tokens * width * element)
    by_head = int(tokens * config.num_heads * FP32)  # one number for each token and head
    statistics = 3 * by_head  # log of the sum, 1 / norm of query and key
    kept = Counter({"normalised for the mixer": int(tokens * config.dim * element)})
    if isinstance(layer, SlidingWindowConfig | BlockRecurrentConfig):
        runs = setting.stack_calls
        kept += Counter({"packed weights": runs * 3 * config.dim * width * element})
        # the cache's keys normalised, and its values with the strides of packed queries, keys and values; normalised
        # queries and keys; where documents start and end
        caches = runs // setting.run_slices * setting.rows
        kept += Counter({"cache": 4 * caches * config.window_tokens * width * element})
        near = 2 * config.num_heads * WINDOW_DISTANCES * WINDOW_REACH * element  # for keys and for queries
        kept += Counter({"bias of near keys": runs * near})
        kept += Counter({"normalised queries and keys": 2 * head_row})
        kept += Counter({"statistics": int(2 * tokens * FP32)})
    match layer:
        case BlockRecurrentConfig():
            kept += Counter({"projections": 4 * head_row, "mixed": 2 * head_row, "statistics": statistics + by_head})
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
            # with rotary positions the rotated copy is kept, not what it was made of
            kept += Counter({"projections": 3 * head_row, "mixed": head_row, "statistics": statistics})
    return kept


def _state_saved(setting: Setting, layer: BlockRecurrentConfig) -> Counter[str]:
    """Border states; where there is room also what every state and token offers and reads. Blocks x S rows."""
    config, element = setting.model, setting.element_bytes
    rows, heads = _state_rows(setting, layer), config.num_heads
    width = heads * config.head_dim
    if layer.update == "frozen":  # every block has the same state, in a copy of its own
        return Counter({"state keys and values": int(2 * rows * width * element)})
    kept = Counter({"packed weights": setting.stack_calls * 4 * config.dim * width * element})
    kept += Counter({"entering states": int(rows * config.dim * FP32)})
    if keeps_reads(setting, layer):
        runs = setting.stack_calls // setting.run_slices
        cached = _stack_tokens(setting) + runs * setting.rows * config.window_tokens
        kept += Counter({"keys and values": int(cached * (2 * width * element + heads * FP32))})
        kept += Counter({"state projections and reads": int(rows * (6 * width * element + 5 * heads * FP32))})
    return kept


def _offered(setting: Setting, layer: object) -> Counter[str]:
    """What a feedback model's state offers to all layers in each block, outside of any layer's recomputation.

    Packed weights of keys and values; the states in fp32 and normalised, both projections, and normalised keys.
    """
    config, element = setting.model, setting.element_bytes
    if not config.feedback or not isinstance(layer, BlockRecurrentConfig):
        return Counter()
    width = config.num_heads * config.head_dim
    a_state = config.dim * (FP32 + element) + 3 * width * element
    packed = setting.stack_calls * 2 * config.dim * width * element
    return Counter({"state offered": int(packed + _state_rows(setting, layer) * a_state)})


def _state_rows(setting: Setting, layer: BlockRecurrentConfig) -> float:
    return setting.tokens / setting.model.window_tokens * layer.num_states


def keeps_reads(setting: Setting, layer: BlockRecurrentConfig) -> bool:
    """Whether the state's projections and reads of all blocks are kept for the backward pass, not recomputed."""
    width = setting.model.num_heads * setting.model.head_dim
    # every run of the stack decides for itself
    wanted = 6 * _state_rows(setting, layer) / setting.stack_calls * width * setting.element_bytes
    return layer.update == "trained" and wanted <= CHAIN_KEEP_BYTES


def backward_workspace(setting: Setting, layer: object) -> float:
    """Bytes alive at the worst moment of one layer's turn in the backward pass, beside what the forward pass kept.

    Those are gradients in flight and values computed again, less what was kept and has been used by then. Two
    moments compete: the feed-forward network's, when nothing is freed, and the mixer's, when all behind it is.
    """
    config, element, tokens = setting.local, setting.element_bytes, _stack_tokens(setting)
    row, hidden = tokens * config.dim * element, tokens * config.ffn_dim * element
    mixer = row + _mixer_workspace(setting, layer)  # with the gradient of the residual stream
    behind = row if sums_in_place(setting) else 2 * row  # the norm after the mixer, and its sum
    again = 0.0 if setting.checkpointing == "none" else float(sum(mixer_saved(setting, layer).values()))
    if setting.checkpointing == "layer":
        # hidden vectors and their gradients exist in chunks, whose products are summed in fp32
        chunk = min(FFN_CHUNK_HIDDEN, tokens * config.ffn_dim) * element
        sums = 2 * config.dim * config.ffn_dim * FP32 if tokens * config.ffn_dim > FFN_CHUNK_HIDDEN else 0
        # gradients of the layer's output and of the network's input
        return again + max(behind + 2 * row + 2 * chunk + sums, mixer)
    feed_forward = 2 * row + hidden  # the same, and the gradient of the hidden vectors
    if setting.checkpointing == "mixer":
        again -= row  # the mixer's input is kept
    return max(feed_forward, again + mixer - behind - hidden)


def _mixer_workspace(setting: Setting, layer: object) -> float:
    """Bytes of gradients at the worst moment of a mixer's backward pass, less what it kept and freed by then."""
    config, element, tokens = setting.local, setting.element_bytes, _stack_tokens(setting)
    width = tokens * config.num_heads * config.head_dim * element
    if isinstance(layer, FullAttentionConfig | LinearAttentionConfig):
        return 4 * width  # gradients of what was read and of the projections
    window = 4 * width + _window_bytes(setting, layer)
    if not isinstance(layer, BlockRecurrentConfig):
        return window
    window += width  # the gradient of what the tokens read of the state waits
    if layer.update == "frozen":
        return window
    # then the window's result and its gradient are gone, and the gradient of the state's queries is there
    return max(window, 4 * width + _scan_chunk_bytes(setting, layer))


def _window_bytes(setting: Setting, layer: object) -> float:
    """Gradients of scores that window attention's backward stores for its second pass, and of the bias by distance."""
    config = setting.local
    keys = _stack_tokens(setting) + setting.rows * config.window_tokens
    stored = min(keys, WINDOW_PIECE_TOKENS + config.window_tokens + 3 * WINDOW_TILE_TOKENS)
    a_key = config.num_heads * (config.window_tokens + WINDOW_TILE_TOKENS)
    scores = stored * a_key * setting.element_bytes
    if isinstance(layer, SlidingWindowConfig) and layer.positions != "t5":
        return scores
    # the bias: fp32 sums by distance of every tile of keys of a row, those of the cache with them
    pieces = (_stack_tokens(setting) / setting.rows, config.window_tokens)
    tiles = setting.rows * sum(math.ceil(tokens / WINDOW_TILE_TOKENS) for tokens in pieces)
    return scores + tiles * config.num_heads * WINDOW_DISTANCES * FP32


def chain_chunk_blocks(setting: Setting, layer: BlockRecurrentConfig) -> int:
    """Blocks of a row that pass through the state path at a time."""
    return math.ceil(_run_blocks(setting) / chain_chunks(setting, layer))


def chain_chunks(setting: Setting, layer: BlockRecurrentConfig) -> int:
    """Parts in which one run of the stack goes back through the state path."""
    config = setting.model
    values = setting.rows // setting.run_slices * max(layer.num_states, config.window_tokens) * config.dim
    return math.ceil(_run_blocks(setting) / max(1, CHAIN_CHUNK_VALUES // values))


def _run_blocks(setting: Setting) -> int:
    """Blocks of a row in one run of the stack."""
    if not runs_by_block(setting.model):
        return math.ceil(setting.segment_tokens / setting.model.window_tokens)
    return math.ceil(stack_tokens_per_token(setting.model))  # the tokens of a memory count too


def _scan_chunk_bytes(setting: Setting, layer: BlockRecurrentConfig) -> float:
    """What exists of one chunk of blocks while the scan goes back through it."""
    config, element = setting.model, setting.element_bytes
    width = config.num_heads * config.head_dim
    blocks = setting.rows // setting.run_slices * chain_chunk_blocks(setting, layer)
    # gradients: of keys and values offered, of all four projections, of both reads; the normalised state's and itself
    of_state = 8 * width + 2 * config.dim
    written = (3 if layer.gate == "lstm" else 1) * config.dim
    of_state += written if layer.gate == "fixed" else 2 * written  # gradient in front of the gate, its inputs again
    if layer.mode != "skip":
        of_state += 2 * config.ffn_dim
    of_tokens = 0
    if not keeps_reads(setting, layer):  # both again
        of_state += 6 * width
        of_tokens = 2 * width
    return blocks * element * (layer.num_states * of_state + config.window_tokens * of_tokens)


def loss_memory(setting: Setting) -> tuple[float, float]:
    """(bytes kept, further bytes while it runs) of linear + cross-entropy.

    The forward pass makes the gradients already: of the vectors, and of the embedding in fp32 when there are several
    chunks of logits. The input and output of the final norm are kept too.
    """
    config, element = setting.local, setting.element_bytes
    row, table = setting.tokens * config.dim * element, config.vocab_size * config.dim
    logits = setting.tokens * config.vocab_size
    if setting.tp > 1:  # logits of the own words are made again in the backward pass, in fp32
        return 2 * row, 2 * FP32 * min(DIVIDED_CHUNK_LOGITS, logits) + row + FP32 * table
    kept = 3 * row + table * (FP32 if logits > LOSS_CHUNK_LOGITS else element)
    # then the backward pass scales the gradients into new tensors, and the final norm makes its own
    return kept, max(element * min(LOSS_CHUNK_LOGITS, logits), 2 * row + element * table)


def _memory_state(setting: Setting) -> float:
    memory: RecurrentMemoryConfig | None = setting.model.memory
    return 0.0 if memory is None else 2 * setting.rows * memory.num_tokens * setting.model.dim * FP32


def _stack_tokens(setting: Setting) -> float:
    """Tokens of a micro-batch as the stack sees them."""
    return setting.tokens * stack_tokens_per_token(setting.model)


def optimizer_bytes(setting: Setting) -> tuple[float, float]:
    """(bytes kept from step to step, further bytes while it updates) on one device.

    bf16 runs in ZeRO 1 to 3, which keep fp32 masters and moments of this device's share of the parameters and convert
    the gradients to fp32 for the update. Adafactor keeps a first moment and, of matrices, two vectors. Offloaded, all
    of it is in the host's memory.
    """
    if setting.offload_optimizer:
        return 0.0, 0.0
    number = total_parameters(setting.model, setting.tp) / (setting.shards if setting.zero_stage else 1)
    if setting.optimizer == "none":
        return 0.0, 0.0
    moments = 2 * FP32 * number if setting.optimizer == "adamw" else 1.01 * FP32 * number
    masters = FP32 * number if setting.precision == "bf16" else 0
    return moments + masters, FP32 * number
