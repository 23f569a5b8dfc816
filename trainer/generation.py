"""Continue a text with a trained model or with its export: the same draws give the same text."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from longspan.data_pipeline.vocabulary import BOS, EOS
from longspan.errors import UsageError
from longspan.modeling.model import LanguageModel


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
    decoder: Decoder, prompt: bytes, *, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> Iterator[int]:
    """Ids that continue bos and the prompt, one by one; eos ends it and is not given, and so do logits that are NaN or
    infinite: a model that has diverged has nothing to say, and its run ends by itself.

    Args:
        decoder: at the start of a document.
        prompt: its first bytes.
        max_new_tokens: most ids.
        temperature: divides the logits; 0 takes the likeliest id.
        top_p: draws from the likeliest ids that together have this probability.
        seed: of the draws; equal arguments give equal ids.
    """
    draws = torch.Generator().manual_seed(seed)
    logits = decoder.read([BOS, *prompt])
    for count in range(max_new_tokens):
        if not logits.isfinite().all():
            return
        token = choose(logits, temperature, top_p, draws)
        if token == EOS:
            return
        yield token
        if count + 1 < max_new_tokens:
            logits = decoder.read([token])


def choose(logits: Tensor, temperature: float, top_p: float, draws: torch.Generator) -> int:
    """One id from logits [vocabulary]; never bos, pad or a padding row, which end no text."""
    logits = logits[: EOS + 1].clone()
    logits[BOS] = -torch.inf
    if temperature == 0:
        return int(logits.argmax())
    probabilities, ids = torch.softmax(logits.double() / temperature, 0).sort(descending=True, stable=True)
    kept = probabilities.cumsum(0) - probabilities < top_p  # the first is always kept
    return int(ids[torch.multinomial(probabilities * kept, 1, generator=draws)])


def as_text(ids: Iterable[int]) -> Iterator[str]:
    """Bytes as text, as soon as each character is complete; what is no UTF-8 becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        piece = decoder.decode(bytes([token]))
        if piece:
            yield piece
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest
