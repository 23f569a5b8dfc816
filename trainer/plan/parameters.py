"""Parameter counts by arithmetic from the configuration, equal to those of the built model. Imports no torch."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from longspan.modeling.config import BlockRecurrentConfig, ModelConfig, SlidingWindowConfig
from longspan.modeling.flops import divided

POSITION_BUCKETS = 32
# what papers leave out of their counts
UNCOUNTED = ("embedding", "norm_scales", "attention_scales", "position_tables")


def count_parameters(config: ModelConfig, tp: int = 1) -> dict[str, int]:
    """Number of parameters by kind, of one of `tp` tensor-parallel ranks; the tied embedding once.

    Kinds: embedding, norm_scales, attention_scales, position_tables, attention (projections of tokens), feed_forward,
    state (initial value, ids, projections, output, FFN of the state), gates (LSTM weights and all gate biases),
    memory (ids of memory tokens).
    """
    total = Counter({"embedding": config.vocab_size // tp * config.dim, "norm_scales": config.dim})
    for layer in config.expanded_layers():
        total += layer_parameters(config, layer, tp)
    if config.memory is not None:
        total += Counter({"norm_scales": config.dim, "memory": 2 * config.memory.num_tokens * config.dim})
    return dict(total)


@lru_cache(maxsize=256)
def total_parameters(config: ModelConfig, tp: int = 1) -> int:
    """All parameters of one of `tp` tensor-parallel ranks, the tied embedding once."""
    return sum(count_parameters(config, tp).values())


def paper_count(config: ModelConfig) -> int:
    """Parameters as papers count them: without embedding, norm scales, attention scales and position tables."""
    return sum(number for kind, number in count_parameters(config).items() if kind not in UNCOUNTED)


def layer_parameters(config: ModelConfig, layer: object, tp: int = 1) -> Counter[str]:
    """Parameters of one layer by kind, of one of `tp` tensor-parallel ranks: norms and the state path are whole."""
    whole, config = config, divided(config, tp)
    dim, width, heads = config.dim, config.num_heads * config.head_dim, config.num_heads
    counts = Counter({"norm_scales": 2 * dim, "attention": 4 * dim * width, "feed_forward": 2 * dim * config.ffn_dim})
    windowed = isinstance(layer, SlidingWindowConfig | BlockRecurrentConfig)
    if windowed:
        counts += Counter({"attention_scales": heads})
    if isinstance(layer, BlockRecurrentConfig) or (isinstance(layer, SlidingWindowConfig) and layer.positions == "t5"):
        counts += Counter({"position_tables": heads * POSITION_BUCKETS})
    if isinstance(layer, BlockRecurrentConfig) or (windowed and config.feedback):
        # a query and a scale for the read of the state, and an output projection twice as wide
        counts += Counter({"attention": 2 * dim * width, "attention_scales": heads})
    if isinstance(layer, BlockRecurrentConfig):
        counts += state_path_parameters(whole, layer)
    return counts


def state_path_parameters(config: ModelConfig, layer: BlockRecurrentConfig) -> Counter[str]:
    """Parameters of a recurrent layer's state path by kind; whole on every tensor-parallel rank."""
    dim, width = config.dim, config.num_heads * config.head_dim
    counts = Counter({"state": 2 * layer.num_states * dim + 2 * dim * width, "norm_scales": dim})
    if layer.update == "frozen":
        return counts
    counts += Counter({"state": 2 * dim * width, "attention_scales": 2 * config.num_heads})
    if layer.mode != "single":
        counts += Counter({"state": 2 * width * dim, "gates": _gate(layer.gate, dim, 2 * width)})
    if layer.mode != "skip":
        hidden = (dim if layer.mode == "dual" else 2 * width) * config.ffn_dim
        counts += Counter({"state": hidden + config.ffn_dim * dim, "gates": _gate(layer.gate, dim, config.ffn_dim)})
    if layer.mode == "dual":
        counts += Counter({"norm_scales": dim})
    return counts


def _gate(kind: str, dim: int, hidden_dim: int) -> int:
    return dim if kind == "fixed" else 2 * (dim * hidden_dim + dim)
