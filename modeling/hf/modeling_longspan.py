"""A Longspan model for transformers: one document a row, everything it remembers carried in the cache.

Tokens run through the stack in pieces that never cross the edge of a block, so that any split of a text into calls
computes the same thing, and no part of a block is ever computed twice.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from longspan.modeling.hf.configuration_longspan import LongspanConfig
from longspan.modeling.hf.mixers_longspan import Norm, take_along
from longspan.modeling.hf.stack_longspan import MemoryStack, Stack


class LongspanCacheLayer(CacheLayerMixin):
    """What one layer carries.

    Attributes:
        tensors: by name, batch first; empty before the first token.
        seen: int64 [B] on the CPU, tokens of each row so far; rows differ where the input was padded.
        columns: columns of input so far, padding included.
    """

    is_sliding = False

    def __init__(self) -> None:
        """An empty layer; the model fills it."""
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Back to the start of a document."""
        self.tensors: dict[str, Tensor] = {}
        self.seen: Tensor | None = None
        self.columns = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Not for callers."""
        raise NotImplementedError("a Longspan cache is filled by the model alone")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not for callers."""
        raise NotImplementedError("a Longspan cache is filled by the model alone")

    def get_seq_length(self) -> int:
        """Columns of input so far, padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over everything so far."""
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may come several times."""
        self.tensors = {name: value.index_select(0, indices.to(value.device)) for name, value in self.tensors.items()}
        self.seen = None if self.seen is None else self.seen[indices.cpu()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the chosen beams."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        if self.seen is not None:
            self.batch_select_indices(torch.arange(len(self.seen)).repeat_interleave(repeats))


class LongspanCache(Cache):
    """One `LongspanCacheLayer` a layer, and one for a memory. Only full attention needs more room for a longer text."""

    def __init__(self, config: LongspanConfig) -> None:
        """An empty cache for a model of this configuration."""
        super().__init__(layers=[LongspanCacheLayer() for _ in range(len(config.blocks) + bool(config.memory))])

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a recurrent state cannot be rolled back."""
        raise ValueError("a Longspan cache cannot be cropped: its recurrent state cannot be rolled back")


class LongspanForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. Every row starts a document; `past_key_values` carries it on."""

    config_class = LongspanConfig
    config: LongspanConfig
    _is_stateful = True  # the library then refuses assisted decoding, which would have to roll the state back
    _no_split_modules = ["Layer"]  # noqa: RUF012

    def __init__(self, config: LongspanConfig) -> None:
        """Build from a configuration; weights are meant to be loaded."""
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.backbone = Stack(config) if config.memory is None else MemoryStack(config)
        self.final_norm = Norm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding, which is the output matrix too."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding, and the output matrix with it."""
        self.embedding = cast(nn.Embedding, value)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        """Called by `generate`, which would take a cache without a recurrent state otherwise."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation = {generation_config.cache_implementation!r}: a Longspan model carries its "
                "state in a cache of its own. Leave cache_implementation unset."
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LongspanCache(self.config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: LongspanCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits of the next token.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], or [B, columns of the cache + T]; 0 is padding. Padding, wherever it stands, is
                left out: it moves no position, no state and no cache. Logits there mean nothing.
            past_key_values: what an earlier call returned; this call continues and changes it.
            use_cache: whether to return a cache; None: as the configuration says.
            labels: int64 [B, T], the inputs again; -100 is not scored. The loss is the mean in nats.
            logits_to_keep: only the last so many columns, or these columns; 0: all.
            return_dict: False: a tuple.

        Returns:
            logits float32 [B, columns kept, vocabulary], the cache and the loss.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is not None and not isinstance(past_key_values, LongspanCache):
            raise TypeError(
                f"past_key_values is a {type(past_key_values).__name__}. This model carries its state in the cache "
                "that it returns: pass that one, or none."
            )
        cache = LongspanCache(self.config) if past_key_values is None else past_key_values
        order, lengths = token_order(input_ids, attention_mask)
        x = self.embedding(input_ids)
        y = self._run(x if order is None else take_along(x, order), lengths, cache)
        y = y if order is None else take_along(y, order.argsort(dim=1))
        if isinstance(logits_to_keep, Tensor):
            y = y[:, logits_to_keep]
        elif logits_to_keep:
            y = y[:, -logits_to_keep:]
        logits = F.linear(self.final_norm(y), self.embedding.weight).float() / math.sqrt(self.config.hidden_size)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)
        return output.to_tuple() if return_dict is False else output

    def _run(self, x: Tensor, lengths: Tensor, cache: LongspanCache) -> Tensor:
        """Tokens [B, T, D], those of each row first, and how many there are -> [B, T, D]; fills the cache."""
        rows, slots = x.shape[0], list[Any](cache.layers)
        if slots[0].seen is None:
            for slot, tensors in zip(slots, self.backbone.start(rows, x.device), strict=True):
                slot.tensors, slot.seen, slot.is_initialized = tensors, torch.zeros(rows, dtype=torch.int64), True
        seen = slots[0].seen
        if len(seen) != rows:
            raise ValueError(f"the cache holds {len(seen)} rows, input_ids has {rows}")
        if not all(slot.seen is not None and torch.equal(slot.seen, seen) for slot in slots):
            raise ValueError("the layers of the cache have seen different tokens; start from an empty cache")
        y, carried = self.backbone(x, lengths, seen, [slot.tensors for slot in slots])
        for slot, tensors in zip(slots, carried, strict=True):
            slot.tensors, slot.seen, slot.columns = tensors, seen + lengths, slot.columns + x.shape[1]
        return y


def token_order(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Where each row's tokens stand among the padding.

    Args:
        input_ids: [B, T].
        attention_mask: [B, T or more] whose last T columns belong to the input, or None.

    Returns:
        int64 [B, T]: columns ordered so that tokens come first, or None where that is so already;
        int64 [B] on the CPU: tokens of each row.
    """
    rows, total = input_ids.shape
    if attention_mask is not None and (
        attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < total
    ):
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)} for input_ids {list(input_ids.shape)}; "
            "it must be [rows, columns], with a column for each of the input at least"
        )
    real = None if attention_mask is None else attention_mask[:, -total:] != 0
    if real is None or bool(real.all()):
        return None, torch.full((rows,), total, dtype=torch.int64)
    return (~real).to(torch.uint8).argsort(dim=1, stable=True), real.sum(1).cpu()
