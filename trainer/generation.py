"""Continue a text with a trained model or with its export: the same draws give the same text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.errors import UsageError
from longspan.modeling.model import LanguageModel

_CONTEXT_IDS = 16  # how a token is written depends on no token further before it than this
_MOST_HELD_IDS = 64
_MOST_PENDING = 3  # bytes of a character of four before its last


class Decoder(Protocol):
    """A model in the middle of one document."""

    def read(self, tokens: list[int]) -> Tensor:
        """Read tokens; logits of the next one, float32 [vocabulary] on the CPU."""


class NativeDecoder:
    """A model of the trainer: whole blocks at once, what is left token by token."""

    def __init__(self, model: LanguageModel, device: torch.device | str = "cpu") -> None:
        """Start a document. model: in evaluation mode on `device`."""
        self._model, self._device = model, torch.device(device)
        self._state: Any = None  # of the decode form, once tokens were read

    @torch.inference_mode()
    def read(self, tokens: list[int]) -> Tensor:
        """See `Decoder.read`."""
        logits = None
        if self._state is None:
            whole = len(tokens) // self._model.quantum * self._model.quantum
            state = self._model.init_state(1, self._device)
            if whole:
                start = torch.zeros(1, whole // self._model.quantum, dtype=torch.bool, device=self._device)
                start[:, 0] = True
                ids = torch.tensor([tokens[:whole]], device=self._device)
                every, state, _ = self._model(ids, state, reset=start)
                logits, tokens = every[:, -1], tokens[whole:]
            self._state = self._model.decode_state(state)
        for token in tokens:
            logits, self._state = self._model.step_tokens(torch.tensor([token], device=self._device), self._state)
        assert logits is not None, "nothing to read"
        return logits[0].float().cpu()


class ExportedDecoder:
    """An exported model, its state in its cache."""

    def __init__(self, model: Any, device: torch.device | str = "cpu") -> None:
        """Start a document. model: in evaluation mode on `device`."""
        self._model, self._device = model, torch.device(device)
        self._cache: Any = None

    @torch.inference_mode()
    def read(self, tokens: list[int]) -> Tensor:
        """See `Decoder.read`."""
        ids = torch.tensor([tokens], device=self._device)
        output = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        return output.logits[0, -1].float().cpu()


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raises UsageError if a number is out of range, naming all that are."""
    problems = []
    if max_new_tokens < 1:
        problems.append(f"--max-new-tokens {max_new_tokens}: at least 1")
    if not 0 <= temperature < float("inf"):
        problems.append(f"--temperature {temperature}: 0 (greedy) or above")
    if not 0 < top_p <= 1:
        problems.append(f"--top-p {top_p}: above 0, at most 1")
    if problems:
        raise UsageError("; ".join(problems) + ".")


def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: bytes,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[int]:
    """Ids that continue bos and the prompt, one by one; eos ends it and is not given, and so do logits that are NaN or
    infinite: a model that has diverged has nothing to say, and its run ends by itself.

    Args:
        decoder: at the start of a document.
        tokenizer: of the model.
        prompt: first bytes of the document.
        max_new_tokens: most ids.
        temperature: divides the logits; 0 takes the likeliest id.
        top_p: draws from the likeliest ids that together have this probability.
        seed: of the draws; equal arguments give equal ids.

    Raises:
        UsageError: the tokenizer cannot encode the prompt.
    """
    draws = torch.Generator().manual_seed(seed)
    logits = decoder.read(tokenizer.encode(prompt).ids[:-1].tolist())
    for count in range(max_new_tokens):
        if not logits.isfinite().all():
            return
        token = choose(logits, tokenizer, temperature, top_p, draws)
        if token == tokenizer.eos:
            return
        yield token
        if count + 1 < max_new_tokens:
            logits = decoder.read([token])


def choose(logits: Tensor, tokenizer: Tokenizer, temperature: float, top_p: float, draws: torch.Generator) -> int:
    """One id from logits [vocabulary]; never bos, pad or a padding row, which end no text."""
    never = (tokenizer.bos, tokenizer.pad)
    size = tokenizer.size
    while size - 1 in never:
        size -= 1
    logits = logits[:size].clone()
    logits[[special for special in never if special < size]] = -torch.inf
    if temperature == 0:
        return int(logits.argmax())
    probabilities, ids = torch.softmax(logits.double() / temperature, 0).sort(descending=True, stable=True)
    kept = probabilities.cumsum(0) - probabilities < top_p  # the first is always kept
    return int(ids[torch.multinomial(probabilities * kept, 1, generator=draws)])


def as_text(ids: Iterable[int], tokenizer: Tokenizer, before: Sequence[int] = ()) -> Iterator[str]:
    """Ids as text, as soon as each character is complete; what is no UTF-8 becomes U+FFFD.

    Args:
        ids: to decode.
        tokenizer: of these ids.
        before: ids that come before them and are not given: whether a token begins with a space may depend on them.
    """
    held = list(before)[-_CONTEXT_IDS:]
    shown = len(_complete(tokenizer.decode(held)))
    for token in ids:
        held.append(token)
        whole = tokenizer.decode(held)
        text = _complete(whole)
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
        if len(held) > _MOST_HELD_IDS and text == whole:  # long texts would be decoded over and over
            held = held[-_CONTEXT_IDS:]
            shown = len(_complete(tokenizer.decode(held)))
    rest = tokenizer.decode(held)[shown:]
    if rest:
        yield rest


def _complete(text: str) -> str:
    """`text` without the replacement characters at its end that may still become one character of up to four bytes."""
    for _ in range(_MOST_PENDING):
        text = text.removesuffix("\ufffd")
    return text
