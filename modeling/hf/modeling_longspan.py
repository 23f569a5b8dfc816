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
from longspan.modeling.hf.mixers_longspan import Norm, align, take_along
from longspan.modeling.hf.stack_longspan import MemoryStack, Stack

PART_TOKENS = 4096  # of a long text that are in memory at the same time


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

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything in it by name, on the CPU, e.g. for `safetensors.torch.save_file`; see `from_tensors`."""
        saved: dict[str, Tensor] = {}
        for index, layer in enumerate(list[Any](self.layers)):
            if layer.seen is not None:
                saved |= {f"{index}.{name}": tensor.cpu().clone() for name, tensor in layer.tensors.items()}
                saved |= {f"{index}.seen": layer.seen.clone(), f"{index}.columns": torch.tensor(layer.columns)}
        return saved

    @classmethod
    def from_tensors(
        cls, config: LongspanConfig, saved: dict[str, Tensor], device: torch.device | str = "cpu"
    ) -> "LongspanCache":
        """The cache that `to_tensors` wrote down, for a model of the same configuration on `device`."""
        cache = cls(config)
        for name, tensor in saved.items():
            index, _, what = name.partition(".")
            if not index.isdigit() or int(index) >= len(cache.layers):
                raise ValueError(f"{name}: this model's cache has layers 0 to {len(cache.layers) - 1}")
            layer: Any = cache.layers[int(index)]
            layer.is_initialized = True
            if what == "seen":
                layer.seen = tensor.cpu().clone()
            elif what == "columns":
                layer.columns = int(tensor)
            else:
                layer.tensors[what] = tensor.to(device, copy=True)
        return cache

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
        self.final_norm = Norm(config.hidden_size, config.kernels)
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
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        if cache is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LongspanCache(self.config)
        # newer versions of the library keep only the width of a mask that hides nothing
        columns = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        if cache is not None and columns is not None and columns <= cache.get_seq_length():
            # the library would read the text a second time
            raise ValueError(
                f"past_key_values has read {cache.get_seq_length()} columns, and the text has {columns}: give the text "
                "that it has read, and one token behind it at least."
            )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LongspanCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        tokenizer: Any = None,
        **refused: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits of the next token.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], or [B, columns of the cache + T]; 0 is padding. Padding, wherever it stands, is
                left out: it moves no position, no state and no cache. Logits there are those of the row's last token
                before it; without one in this call they mean nothing.
            past_key_values: what an earlier call returned; this call continues and changes it.
            use_cache: whether to return a cache; None: as the configuration says.
            labels: int64 [B, T], the inputs again; -100 is not scored. The loss is the mean in nats.
            logits_to_keep: only the last so many columns, or these columns; 0: all.
            return_dict: False: a tuple.
            tokenizer: not used; `generate` hands on what its stop strings need.
            refused: what other models take and this one does not, such as `output_attentions`; see `check_input`.

        Returns:
            logits float32 [B, columns kept, vocabulary], the cache and the loss.
        """
        input_ids = check_input(input_ids, refused)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is not None and not isinstance(past_key_values, LongspanCache):
            raise TypeError(
                f"past_key_values is a {type(past_key_values).__name__}. This model carries its state in the cache "
                "that it returns: pass that one, or none."
            )
        cache = LongspanCache(self.config) if past_key_values is None else past_key_values
        order, places, lengths = token_order(input_ids, attention_mask)
        if order is not None:
            input_ids = take_along(input_ids, order)
        keep = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep or None, None)
        y = self._run(input_ids, lengths, cache, places[:, keep])
        logits = F.linear(self.final_norm(y), self.embedding.weight).float() / math.sqrt(self.config.hidden_size)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)
        return output.to_tuple() if return_dict is False else output

    def _run(self, tokens: Tensor, lengths: Tensor, cache: LongspanCache, places: Tensor) -> Tensor:
        """Read tokens in parts of bounded length, so that a long text needs no more memory than a short one.

        Args:
            tokens: int64 [B, T], those of each row first. lengths: int64 [B] on the CPU, how many each row has.
            cache: of these rows; filled.
            places: int64 [1 or B, K], of the tokens whose results are wanted.

        Returns:
            [B, K, D].
        """
        slots, (rows, total) = list[Any](cache.layers), tokens.shape
        seen, carried = self._opened(slots, rows, tokens.device), [slot.tensors for slot in slots]
        window, everything = self.config.window_tokens, places.shape[1] == total
        parts: list[Tensor] = []
        begin = 0
        while begin < total:
            # parts end where a block does, so that they cut no block
            stop = min(begin + max(PART_TOKENS // window, 1) * window - int(seen[0]) % window, total)
            take = (lengths - begin).clamp(0, stop - begin)
            y, carried = self.backbone(self.embedding(tokens[:, begin:stop]), take, seen, carried)
            seen = seen + take
            if everything:
                parts.append(y)
            else:
                here = take_along(y, (places - begin).clamp(0, stop - begin - 1))
                inside = align((places >= begin) & (places < stop), here)
                parts = [torch.where(inside, here, parts[0] if parts else torch.zeros_like(here))]
            begin = stop
        for slot, tensors in zip(slots, carried, strict=True):
            slot.tensors, slot.seen, slot.columns = tensors, seen, slot.columns + total
        return take_along(torch.cat(parts, 1), places) if everything else parts[0]

    def _opened(self, slots: list[Any], rows: int, device: torch.device) -> Tensor:
        """Tokens that each row of a cache has seen, int64 [B] on the CPU; starts documents in an empty one."""
        if slots[0].seen is None:
            for slot, tensors in zip(slots, self.backbone.start(rows, device), strict=True):
                slot.tensors, slot.seen, slot.is_initialized = tensors, torch.zeros(rows, dtype=torch.int64), True
        seen: Tensor = slots[0].seen
        if len(seen) != rows:
            raise ValueError(f"the cache holds {len(seen)} rows, input_ids has {rows}")
        if not all(slot.seen is not None and torch.equal(slot.seen, seen) for slot in slots):
            raise ValueError("the layers of the cache have seen different tokens; start from an empty cache")
        return seen


_REFUSED = {
    "inputs_embeds": "give input_ids: padding and the end of a block are places of tokens",
    "output_attentions": "no layer keeps attention weights, and layers with a state have none",
    "output_hidden_states": "layers are not kept; a forward hook on `model.backbone.layers` sees them",
}


def check_input(input_ids: Tensor | None, others: dict[str, Any]) -> Tensor:
    """See that there is a token to read, and nothing that this model does not know.

    Args:
        input_ids: [B, T]. others: arguments by name that the model has none of; None and False ask for nothing.

    Raises:
        ValueError: input_ids is not two-dimensional or has no token, or an argument asks for what is not there.
        TypeError: an argument that no model of this library has.
    """
    for name, value in others.items():
        if name not in _REFUSED:
            raise TypeError(f"{name}: a Longspan model takes no such argument")
        if value is not None and value is not False:
            raise ValueError(f"{name} is not supported by a Longspan model: {_REFUSED[name]}")
    if input_ids is None or input_ids.dim() != 2 or not input_ids.numel():
        given = "missing" if input_ids is None else f"{list(input_ids.shape)}"
        raise ValueError(f"input_ids is {given}: give [rows, tokens] with one token at least, bos if the text is empty")
    return input_ids


def token_order(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
    """Where each row's tokens stand among the padding.

    Args:
        input_ids: [B, T].
        attention_mask: [B, T or more] whose last T columns belong to the input, or None.

    Returns:
        int64 [B, T]: columns ordered so that tokens come first, or None where that is so already;
        int64 [1 or B, T]: for each column the place of its token in that order, or of the last token before it;
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
        places = torch.arange(total, device=input_ids.device)[None]
        return None, places, torch.full((rows,), total, dtype=torch.int64)
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    return order, (real.cumsum(1) - 1).clamp(min=0), real.sum(1).cpu()
